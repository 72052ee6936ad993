"""How much of what the machine can do a run uses: model FLOPs utilization (MFU).

In: a model's shape, and the device and precision of a run. Out: the floating-point operations that a token costs, and
the rate at which this machine multiplies large matrices; MFU is tokens a second x FLOPs a token / that rate.

Source: Chowdhery et al., "PaLM" (arXiv:2204.02311), appendix B. There the rate is the maker's number; here it is
measured, for no maker gives one for two cores of a shared processor.
"""

import functools
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
N_SPANS = 4
SPAN_S = 0.1
ENOUGH_S = 0.01
"""A matrix multiplication that takes this long is large enough to keep the machine busy."""
LARGEST_SIDE = {"cpu": 1024, "cuda": 8192}


def peak_flops_per_s(
    precision: str, device: torch.device, all_reduce_sum: Callable[[Tensor], Tensor], *, is_again: bool = False
) -> float:
    """Rate of large matrix multiplications on all workers at once, in the run's precision, in operations a second.

    Every worker calls it. Each of a few spans of a tenth of a second is summed over the workers; the fastest counts.
    The measurement takes less than a second; a process makes it once, unless asked again. 0 where a worker cannot
    measure.
    """
    if is_again:
        matmul_rates.cache_clear()
    all_reduce_sum(torch.zeros(1, dtype=torch.float64, device=device))  # a barrier: all begin together
    try:
        rates = matmul_rates(DTYPES[precision], device, torch.get_num_threads())
    except RuntimeError:  # no room on the device, or no such kernel: the sum below must be joined all the same
        rates = (0.0,) * N_SPANS
    return float(all_reduce_sum(torch.tensor(rates, dtype=torch.float64, device=device)).max())


@functools.lru_cache
def matmul_rates(dtype: torch.dtype, device: torch.device, n_threads: int) -> tuple[float, ...]:
    """Operations a second of square multiplications of one size on this worker, in `N_SPANS` spans."""
    del n_threads  # part of what is remembered
    size, operands = 128, _operands(128, dtype, device)
    _seconds(operands, device)  # the very first one starts the library, for longer than ENOUGH_S on a GPU
    while _seconds(operands, device) < ENOUGH_S and size < LARGEST_SIDE.get(device.type, 1024):
        size *= 2
        operands = _operands(size, dtype, device)
        _seconds(operands, device)  # a first multiplication of a size also plans
    return tuple(_rate(operands, device) for _ in range(N_SPANS))


def _operands(size: int, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    values = torch.linspace(-1.0, 1.0, size * size, device=device).view(size, size).to(dtype)
    return values, values.T.contiguous(), torch.empty_like(values)


def _rate(operands: tuple[Tensor, Tensor, Tensor], device: torch.device) -> float:
    n_products, seconds = 0, 0.0
    n_at_once = max(1, int(SPAN_S / 4 / max(_seconds(operands, device), 1e-6)))  # a GPU is asked in bursts
    while seconds < SPAN_S:
        seconds += _seconds(operands, device, n_at_once)
        n_products += n_at_once
    return float(2 * len(operands[0]) ** 3 * n_products / seconds)


def _seconds(operands: tuple[Tensor, Tensor, Tensor], device: torch.device, n_products: int = 1) -> float:
    left, right, product = operands
    _wait(device)
    began = time.perf_counter()
    for _ in range(n_products):
        torch.mm(left, right, out=product)
    _wait(device)
    return time.perf_counter() - began


def _wait(device: torch.device) -> Any:
    return torch.cuda.synchronize(device) if device.type == "cuda" else None
