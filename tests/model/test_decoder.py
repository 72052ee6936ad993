"""The decoder against naive code, against itself with a cache, and against transformers."""

import dataclasses
import math
from typing import Any

import pytest
import torch
from torch import Tensor

from slm_ray.config.schema import IGNORED_TARGET, ModelConfig
from slm_ray.model.decoder import (
    Attention,
    Decoder,
    KVCache,
    _Window,
    count_parameters,
)
from slm_ray.model.rms_norm import RMSNorm
from slm_ray.model.rotary import rotary_tables, rotate
from tests.support.tiny_model import random_model, some_tokens

SHAPE = {"vocab_size": 97, "seq_len": 24, "n_layers": 2, "d_model": 32, "n_heads": 4, "d_ff": 48}
LLAMA = ModelConfig(**SHAPE)
GPT2 = ModelConfig(**SHAPE, positions="learned", norm="layer", mlp="gelu", bias=True)
VARIANTS = {
    "llama": LLAMA,
    "grouped": ModelConfig(**SHAPE, n_kv_heads=2),
    "one-kv-head-wide": ModelConfig(**SHAPE, n_kv_heads=1, d_head=10),
    "untied-biases": ModelConfig(**SHAPE, tie_embeddings=False, bias=True),
    "gpt2": GPT2,
    "learned-grouped": ModelConfig(**SHAPE, positions="learned", n_kv_heads=2, d_head=7),
    "mixed": ModelConfig(**SHAPE, norm="layer", mlp="swiglu", d_head=6),
    "qk-norm-grouped": ModelConfig(**SHAPE, qk_norm=True, n_kv_heads=2, d_head=10),
    "gpt-neo": dataclasses.replace(GPT2, qkv_bias=False, scale_attention=False, local_window=5),
    "rotary-local": ModelConfig(**SHAPE, qk_norm=True, local_window=7, o_bias=True, mlp_bias=True),
}


@pytest.fixture(params=VARIANTS.values(), ids=VARIANTS.keys())
def model(request: pytest.FixtureRequest) -> Decoder:
    return random_model(request.param)


@torch.no_grad()
def test_a_token_does_not_change_what_stands_before_it(model: Decoder) -> None:
    tokens = some_tokens(SHAPE["vocab_size"])
    changed = tokens.clone()
    changed[:, 12] = (changed[:, 12] + 1) % SHAPE["vocab_size"]
    before, after = model(tokens), model(changed)
    assert torch.equal(before[:, :12], after[:, :12])
    assert not torch.allclose(before[:, 12:], after[:, 12:])


@torch.no_grad()
def test_the_cache_changes_nothing(model: Decoder) -> None:
    tokens = some_tokens(SHAPE["vocab_size"])
    cache = KVCache.empty(model.config, rows=3)
    parts = [model.decode(tokens[:, :7], cache), *(model.decode(tokens[:, i : i + 1], cache) for i in range(7, 20))]
    torch.testing.assert_close(torch.cat(parts, dim=1), model(tokens), atol=1e-5, rtol=1e-5)
    assert cache.lengths.tolist() == [20, 20, 20]


@torch.no_grad()
def test_rows_of_different_length_share_a_cache() -> None:
    model, tokens = random_model(LLAMA), some_tokens(SHAPE["vocab_size"])
    cache = KVCache.empty(LLAMA, rows=2)
    for row, length in ((0, 5), (1, 11)):
        alone = KVCache(cache.keys[:, row : row + 1], cache.values[:, row : row + 1], cache.lengths[row : row + 1])
        model.decode(tokens[row : row + 1, :length], alone)
    together = model.decode(torch.stack([tokens[0, 5:6], tokens[1, 11:12]]), cache)
    torch.testing.assert_close(together[0, 0], model(tokens[:1, :6])[0, -1], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(together[1, 0], model(tokens[1:2, :12])[0, -1], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_turning_swaps_the_halves_to_the_bit(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 5, 3, 8, generator=generator).to(dtype).requires_grad_()
    cos, sin = (table[:, None] for table in rotary_tables(5, 8, 10_000.0))
    expected = (x * cos + x.roll(4, dims=-1) * sin).to(dtype)
    upstream = torch.randn(x.shape, generator=generator).to(dtype)
    assert torch.equal(rotate(x, cos, sin), expected)
    (ours,), (theirs,) = (torch.autograd.grad(y, x, upstream) for y in (rotate(x, cos, sin), expected))
    assert torch.equal(ours, theirs)


def test_rotary_turns_pairs_by_position_times_frequency() -> None:
    cos, sin = rotary_tables(10, 6, 100.0)
    x = torch.randn(1, 10, 1, 6)
    turned = rotate(x, cos[:, None], sin[:, None])
    for position in range(10):
        for pair in range(3):
            angle = position * 100.0 ** (-2 * pair / 6)
            z = complex(x[0, position, 0, pair], x[0, position, 0, pair + 3]) * complex(
                math.cos(angle), math.sin(angle)
            )
            assert turned[0, position, 0, pair].item() == pytest.approx(z.real, abs=1e-5)
            assert turned[0, position, 0, pair + 3].item() == pytest.approx(z.imag, abs=1e-5)


@pytest.mark.parametrize("is_rotary", [False, True], ids=["learned", "rotary"])
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"n_kv_heads": 2},
        {"n_kv_heads": 1},
        {"qk_norm": True, "n_kv_heads": 2},
        {"scale_attention": False},
        {"local_window": 4, "qk_norm": True, "scale_attention": False},
    ],
    ids=lambda changes: "-".join(changes) or "plain",
)
def test_attention_and_its_gradients_equal_a_naive_loop(changes: dict[str, Any], is_rotary: bool) -> None:
    torch.manual_seed(0)
    config = ModelConfig(**SHAPE, **changes)
    attention = Attention(config, layer=1).double()
    for parameter in attention.parameters():
        torch.nn.init.normal_(parameter, std=0.4)
    cos, sin = (table[:9, None].double() for table in rotary_tables(24, 8, 100.0))
    x = torch.randn(2, 9, 32, dtype=torch.float64, requires_grad=True)
    q, k, v = (p(x).view(2, 9, -1, 8) for p in (attention.q_proj, attention.k_proj, attention.v_proj))
    if config.qk_norm:
        q, k = naive_norm(q, attention.q_norm, config), naive_norm(k, attention.k_norm, config)
    if is_rotary:
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
    scale, span = 1 / math.sqrt(8) if config.scale_attention else 1.0, config.attention_span(1)
    steps = [naive_step(q, k, v, step, scale, span) for step in range(9)]
    expected = attention.o_proj(torch.stack(steps, dim=1))
    behind = torch.arange(9)[:, None] - torch.arange(9)
    local = ((behind >= 0) & (behind < config.local_window))[None, None] if config.local_window else None
    got = attention(x, _Window(*((cos, sin) if is_rotary else (None, None)), local_mask=local))
    torch.testing.assert_close(got, expected, atol=1e-12, rtol=1e-10)
    weights = [x, *attention.parameters()]
    upstream = torch.randn_like(got)
    torch.testing.assert_close(
        torch.autograd.grad(got, weights, upstream),
        torch.autograd.grad(expected, weights, upstream),
        atol=1e-10,
        rtol=0,
    )


def naive_norm(x: Tensor, norm: RMSNorm, config: ModelConfig) -> Tensor:
    return x / (x.square().mean(-1, keepdim=True) + config.norm_eps).sqrt() * norm.weight


def naive_step(q: Tensor, k: Tensor, v: Tensor, step: int, scale: float, span: int) -> Tensor:
    """What every head reads at one step, head after head: (B, H * d_head)."""
    group = q.shape[2] // k.shape[2]
    heads = []
    for head in range(q.shape[2]):
        past = range(max(0, step + 1 - span), step + 1)
        scores = torch.stack([(q[:, step, head] * k[:, i, head // group]).sum(-1) * scale for i in past], dim=1)
        weights = scores.softmax(dim=1)  # (B, len(past))
        heads.append(sum(weights[:, n, None] * v[:, i, head // group] for n, i in enumerate(past)))
    return torch.cat(heads, dim=1)


@torch.no_grad()
def test_a_local_block_sees_its_window_and_every_second_block_is_one() -> None:
    """One block after another hides what lies further back than the windows of the local ones together."""
    assert [VARIANTS["gpt-neo"].attention_span(layer) for layer in range(4)] == [24, 5, 24, 5]
    assert [ModelConfig(seq_len=8, local_window=9).attention_span(layer) for layer in range(2)] == [8, 8]
    model, tokens = random_model(VARIANTS["gpt-neo"]), some_tokens(SHAPE["vocab_size"])
    model.layers[0].self_attn.o_proj.weight.zero_()  # nothing is carried but by the local block
    changed = tokens.clone()
    changed[:, 3] = (changed[:, 3] + 1) % SHAPE["vocab_size"]
    moved = (model(tokens) - model(changed)).abs().amax(dim=(0, 2)) > 1e-6
    assert moved.tolist() == [3 <= step < 8 for step in range(20)]


@pytest.mark.parametrize("name", ["qk-norm-grouped", "gpt-neo", "rotary-local"])
def test_in_bfloat16_loss_and_gradients_stay_near(name: str) -> None:
    model, tokens = random_model(VARIANTS[name]).train(), some_tokens(SHAPE["vocab_size"])
    losses, norms = [], []
    for is_bfloat16 in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=is_bfloat16):
            loss = model(tokens[:, :-1], tokens[:, 1:])
        model.zero_grad()
        loss.backward()
        losses.append(loss.item())
        norms.append(torch.nn.utils.clip_grad_norm_(model.parameters(), 1e9).item())
    assert losses[1] == pytest.approx(losses[0], rel=0.02)
    assert norms[1] == pytest.approx(norms[0], rel=0.1)


def test_parameter_count_follows_the_formula() -> None:
    d, ff, v, layers = 32, 48, 97, 2
    assert count_parameters(Decoder(LLAMA)) == v * d + layers * (4 * d * d + 3 * d * ff + 2 * d) + d
    grouped = 2 * d * d + 2 * d * 16 + 3 * d * ff + 2 * d
    assert count_parameters(Decoder(VARIANTS["grouped"])) == v * d + layers * grouped + d


@pytest.mark.parametrize("config", VARIANTS.values(), ids=VARIANTS.keys())
def test_the_first_loss_is_that_of_a_guess(config: ModelConfig) -> None:
    torch.manual_seed(0)
    tokens = some_tokens(SHAPE["vocab_size"], 8, 24)
    loss = Decoder(config)(tokens, torch.roll(tokens, 5)).item() / tokens.numel()
    assert loss == pytest.approx(math.log(97), rel=0.02)


def test_ignored_targets_do_not_count() -> None:
    model, tokens = random_model(LLAMA), some_tokens(SHAPE["vocab_size"], 1)
    targets = tokens.clone()
    targets[:, 10:] = IGNORED_TARGET
    assert model(tokens, targets).item() == pytest.approx(model(tokens[:, :10], tokens[:, :10]).item(), rel=1e-5)


def test_a_two_layer_model_overfits_one_batch() -> None:
    torch.manual_seed(0)
    model, tokens = Decoder(LLAMA), some_tokens(SHAPE["vocab_size"], 4, 17)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(150):
        loss = model(tokens[:, :-1], tokens[:, 1:]) / 64
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.05
