"""RMSNorm with its written-out gradient against torch's own."""

import pytest
import torch
from torch import Tensor, nn

from slm_ray.model.rms_norm import RMSNorm


def results(norm: nn.RMSNorm, x: Tensor, upstream: Tensor) -> list[Tensor]:
    x = x.detach().requires_grad_()
    norm.zero_grad()
    y = norm(x)
    y.backward(upstream)
    assert x.grad is not None
    assert norm.weight.grad is not None
    return [y.detach(), x.grad, norm.weight.grad.clone()]


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5)], ids=["fp64", "fp32"])
def test_value_and_gradients_are_those_of_torch(dtype: torch.dtype, tolerance: float) -> None:
    torch.manual_seed(0)
    ours, theirs = RMSNorm(24, eps=1e-3, dtype=dtype), nn.RMSNorm(24, eps=1e-3, dtype=dtype)
    nn.init.normal_(ours.weight)
    theirs.load_state_dict(ours.state_dict())
    x, upstream = torch.randn(3, 7, 24, dtype=dtype), torch.randn(3, 7, 24, dtype=dtype)
    x[0, 0] = 0
    torch.testing.assert_close(
        results(ours, x, upstream), results(theirs, x, upstream), rtol=tolerance, atol=10 * tolerance
    )


def test_gradients_follow_finite_differences() -> None:
    torch.manual_seed(0)
    norm = RMSNorm(6, eps=1e-5, dtype=torch.float64)
    assert torch.autograd.gradcheck(norm, torch.randn(2, 3, 6, dtype=torch.float64, requires_grad=True))


def test_strides_do_not_matter() -> None:
    norm, x, upstream = RMSNorm(6, eps=1e-5), torch.randn(4, 3, 6), torch.randn(4, 3, 6)
    got = results(norm, x.transpose(0, 1), upstream.transpose(0, 1))
    torch.testing.assert_close(
        got, results(norm, x.transpose(0, 1).contiguous(), upstream.transpose(0, 1).contiguous())
    )


def test_autocast_changes_nothing() -> None:
    norm, x, upstream = RMSNorm(24, eps=1e-5), torch.randn(5, 24), torch.randn(5, 24)
    expected = results(norm, x, upstream)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        torch.testing.assert_close(results(norm, x, upstream), expected, rtol=0, atol=0)


def test_without_gradients_and_compiled_it_is_torchs_own() -> None:
    norm, x = RMSNorm(24, eps=1e-5), torch.randn(5, 24)
    with torch.no_grad():
        assert torch.equal(norm(x), nn.functional.rms_norm(x, (24,), norm.weight, 1e-5))
    upstream = torch.randn(5, 24)
    compiled = torch.compile(norm, backend="aot_eager", fullgraph=True)
    x.requires_grad_()
    (gradient,) = torch.autograd.grad(compiled(x), x, upstream)
    torch.testing.assert_close(gradient, torch.autograd.grad(norm(x), x, upstream)[0])
