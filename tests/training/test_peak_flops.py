"""Operations a token, and the machine's own rate."""

import dataclasses
import time

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from slm_ray.config.schema import ModelConfig
from slm_ray.model.decoder import Decoder
from slm_ray.model.flops import matmul_weights, train_flops_per_token
from slm_ray.training.peak_flops import matmul_rates, peak_flops_per_s

SHAPES = [
    ModelConfig(vocab_size=96, seq_len=16, n_layers=2, d_model=32, n_heads=4, d_ff=48),
    ModelConfig(vocab_size=96, seq_len=16, n_layers=3, d_model=32, n_heads=4, n_kv_heads=2, d_head=6, d_ff=48),
    ModelConfig(
        vocab_size=96, seq_len=16, n_layers=1, d_model=32, n_heads=2, d_ff=64,
        mlp="gelu", norm="layer", positions="learned", bias=True, tie_embeddings=False,
    ),
]  # fmt: skip


@pytest.mark.parametrize("config", SHAPES)
def test_the_formula_agrees_with_counting_every_product(config: ModelConfig) -> None:
    tokens = torch.zeros(2, config.seq_len, dtype=torch.long)
    # the fused kernel of the CPU is one that the counter does not know
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        Decoder(config)(tokens)
    forward = counter.get_total_flops() / tokens.numel()
    assert forward == train_flops_per_token(config) / 3  # the backward pass costs twice as much
    d_attn = config.n_heads * config.head_width
    assert forward == 2 * matmul_weights(config) + 4 * config.n_layers * d_attn * config.seq_len


def test_a_local_block_counts_its_window() -> None:
    everywhere = dataclasses.replace(SHAPES[1], qk_norm=True)
    local = dataclasses.replace(everywhere, local_window=4)
    fewer = train_flops_per_token(everywhere) - train_flops_per_token(local)
    assert fewer == 12 * 24 * (16 - 4)  # 4 heads of 6, in the second of three blocks
    assert matmul_weights(local) == matmul_weights(SHAPES[1])


def test_the_peak_is_summed_over_workers_and_measured_once_in_less_than_a_second() -> None:
    cpu = torch.device("cpu")
    matmul_rates.cache_clear()
    began = time.process_time()
    alone = peak_flops_per_s("fp32", cpu, lambda values: values)
    assert time.process_time() - began < 2.0  # one thread here; the clock on the wall runs on busy machines
    assert alone > 1e8
    assert peak_flops_per_s("fp32", cpu, lambda values: values) == alone
    assert peak_flops_per_s("fp32", cpu, lambda values: values * 2) == 2 * alone
    assert matmul_rates.cache_info().misses == 1
    peak_flops_per_s("fp32", cpu, lambda values: values, is_again=True)
    assert matmul_rates.cache_info().hits == 0  # measured anew


class FakeMachine:
    """Multiplies at a teraflop a second, ten microseconds a product behind; the first product takes a second."""

    def __init__(self, first_s: float) -> None:
        self.now, self._extra_s = 0.0, first_s

    def mm(self, left: torch.Tensor, _right: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
        self.now += 2 * len(left) ** 3 / 1e12 + 1e-5 + self._extra_s
        self._extra_s = 0.0
        return out


@pytest.mark.parametrize("first_s", [0.0, 1.0])
def test_a_first_product_that_starts_the_library_does_not_end_the_search_for_a_size(
    first_s: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine = FakeMachine(first_s)
    monkeypatch.setattr(torch, "mm", machine.mm)
    monkeypatch.setattr(time, "perf_counter", lambda: machine.now)
    rates = matmul_rates.__wrapped__(torch.float32, torch.device("cpu"), 1)
    assert rates == pytest.approx([1e12] * len(rates), rel=0.01)  # of small ones a third


def test_the_peak_leaves_the_random_numbers_alone() -> None:
    matmul_rates.cache_clear()
    torch.manual_seed(3)
    expected = torch.rand(1)
    torch.manual_seed(3)
    peak_flops_per_s("fp32", torch.device("cpu"), lambda values: values)
    assert torch.equal(torch.rand(1), expected)
