"""Attention in blocks against torch's own, with its gradients."""

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from slm_ray.model import blockwise_attention as module
from slm_ray.model.blockwise_attention import blockwise_attention


def heads(n_heads: int, steps: int, seed: int) -> Tensor:
    return torch.randn(2, n_heads, steps, 8, generator=torch.Generator().manual_seed(seed), requires_grad=True)


@pytest.mark.parametrize("steps", [1, 63, 64, 65, 128, 150])
@pytest.mark.parametrize("shared", [1, 2])
def test_it_is_causal_attention_with_its_gradients(steps: int, shared: int) -> None:
    q, k, v = heads(4, steps, 0), heads(4 // shared, steps, 1), heads(4 // shared, steps, 2)
    upstream = heads(4, steps, 3).detach()
    expected = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=shared > 1)
    got = blockwise_attention(q, k, v, scale=None)
    torch.testing.assert_close(got, expected)
    slopes = [torch.autograd.grad(one, (q, k, v), upstream) for one in (got, expected)]
    torch.testing.assert_close(slopes[0], slopes[1], atol=2e-5, rtol=1e-4)


def test_a_mask_and_a_scale_are_those_of_torch() -> None:
    q, k, v = (heads(2, 100, seed) for seed in range(3))
    behind = torch.arange(100)[:, None] - torch.arange(100)
    mask = ((behind >= 0) & (behind < 20))[None, None]
    expected = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=1.0)
    torch.testing.assert_close(blockwise_attention(q, k, v, scale=1.0, mask=mask), expected)


@pytest.mark.parametrize(
    ("dtype", "steps", "is_compiled", "expected"),
    [
        (torch.bfloat16, module.MAX_STEPS, True, True),
        (torch.bfloat16, module.MAX_STEPS + 1, True, False),
        (torch.bfloat16, module.MAX_EAGER_STEPS, False, True),
        (torch.bfloat16, module.MAX_EAGER_STEPS + 1, False, False),
        (torch.float32, 128, True, False),
        (torch.float32, 128, False, False),
    ],
)
def test_it_is_taken_for_short_contexts_when_training_in_bf16(
    dtype: torch.dtype, steps: int, is_compiled: bool, expected: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    q = torch.zeros(1, 1, steps, 8, dtype=dtype)
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: is_compiled)
    assert module.suits(q, q) == expected
    with torch.no_grad():
        assert not module.suits(q, q)
