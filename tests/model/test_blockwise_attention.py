"""Attention in blocks against torch's own, with its gradients."""

from collections.abc import Callable

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


@pytest.mark.parametrize("is_causal", [True, False])
@pytest.mark.parametrize("sharpness", [1, 9, 36])
def test_in_bf16_it_is_as_exact_as_torch_however_peaked_the_scores_are(sharpness: int, is_causal: bool) -> None:
    """A score of 36 that is rounded to bfloat16 is wrong by up to an eighth, and its weight with it."""
    halves = [heads(4, 128, seed).detach() * (sharpness if seed == 0 else 1) for seed in range(4)]
    q, k, v, upstream = (half.bfloat16() for half in halves)
    mask = None if is_causal else torch.ones(128, 128, dtype=torch.bool).tril().triu(-40)

    def run(attend: Callable[..., Tensor], dtype: torch.dtype) -> list[Tensor]:
        given = [one.to(dtype).requires_grad_() for one in (q, k, v)]
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):  # as in training
            out = attend(*given)
        assert out.dtype == dtype
        return [out.detach(), *torch.autograd.grad(out, given, upstream.to(dtype))]

    def by_torch(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=is_causal)

    def by_blocks(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return blockwise_attention(q, k, v, scale=None, mask=mask)

    exact = run(by_torch, torch.float64)
    ours, torchs = (run(way, torch.bfloat16) for way in (by_blocks, by_torch))
    for name, right, our, theirs in zip(("out", "q", "k", "v"), exact, ours, torchs, strict=True):
        error, allowed = ((one - right).norm() / right.norm() for one in (our, theirs))
        assert error <= 2 * allowed, (name, float(error), float(allowed))


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
