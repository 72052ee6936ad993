"""Dropout in attention, and in compiled steps, which drop what eager ones drop."""

import math

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from slm_ray.config.schema import ModelConfig
from slm_ray.model import blockwise_attention as module
from slm_ray.model.blockwise_attention import blockwise_attention, suits
from slm_ray.model.decoder import Decoder
from slm_ray.training.trainer import compiled
from tests.support.compiler import needs_compiler


def weights_seen(queries: Tensor, keys: Tensor, dropout: float) -> Tensor:
    """The weights of attention, (B, H, T, T): what comes out when each key's value is a unit vector of its own."""
    steps = queries.shape[2]
    values = torch.eye(steps).expand(queries.shape[0], queries.shape[1], steps, steps)
    return blockwise_attention(queries, keys, values, scale=None, dropout=dropout)


@pytest.mark.parametrize("steps", [1, 64, 65, 150])
def test_attention_drops_weights_after_the_softmax(steps: int) -> None:
    torch.manual_seed(0)
    queries, keys = torch.randn(2, 3, steps, 8), torch.randn(2, 3, steps, 8)
    whole, found = weights_seen(queries, keys, 0.0), weights_seen(queries, keys, 0.25)
    kept = found != 0
    torch.testing.assert_close(found[kept], whole[kept] / 0.75)
    seen = whole != 0
    assert not (kept & ~seen).any()  # a query sees no key that comes after it
    dropped = (~kept & seen).sum().item() / seen.sum().item()
    assert abs(dropped - 0.25) < 5 * math.sqrt(0.25 * 0.75 / seen.sum().item())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_with_dropout_every_precision_takes_this_way_on_a_cpu(dtype: torch.dtype) -> None:
    longest = torch.zeros(1, 1, module.MAX_DROPPED_STEPS, 8, dtype=dtype)
    assert suits(longest, longest, 0.1)
    longer = torch.zeros(1, 1, module.MAX_DROPPED_STEPS + 1, 8, dtype=dtype)
    assert not suits(longer, longer, 0.1)
    assert not suits(longest[:, :, :1], longest, 0.1)  # a step with a cache
    with torch.no_grad():
        assert not suits(longest, longest, 0.1)


@needs_compiler
def test_a_compiled_step_drops_what_an_eager_one_drops() -> None:
    """Two layers, the second with a local mask; three blocks of queries, two heads to a key."""
    heads = {"n_heads": 2, "n_kv_heads": 1, "local_window": 20}
    shape = ModelConfig(vocab_size=19, seq_len=140, n_layers=2, d_model=16, d_ff=24, dropout=0.3, **heads)
    torch.manual_seed(0)
    model = Decoder(shape).train()
    tokens = torch.randint(19, (2, 140))

    def step(run: torch.nn.Module) -> list[Tensor]:
        torch.manual_seed(7)
        loss = F.cross_entropy(run(tokens).flatten(0, 1), tokens.flatten())
        return [loss.detach(), *torch.autograd.grad(loss, list(model.parameters()))]

    one_by_one, at_once = step(model), step(compiled(model, torch.device("cpu")))
    for one, other in zip(one_by_one, at_once, strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-4)
    torch.manual_seed(8)
    other_seed = F.cross_entropy(model(tokens).flatten(0, 1), tokens.flatten())
    assert not math.isclose(other_seed.item(), one_by_one[0].item(), rel_tol=1e-4)
