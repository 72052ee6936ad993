"""What a run measures about itself beside the loss: utilization, time spent on reading batches, memory.

In: the run's shape, and how long its steps took. Out: figures for the progress line and the tracker. A figure that
cannot be had is left out: a training does not end for it.
"""

import contextlib
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import torch

from slm_ray.config.schema import TrainConfig
from slm_ray.model.flops import train_flops_per_token
from slm_ray.training.context import TrainContext
from slm_ray.training.peak_flops import peak_flops_per_s


class TrainMetrics:
    """The measures of one rank."""

    def __init__(self, config: TrainConfig, context: TrainContext, precision: str) -> None:
        self.flops_per_token = train_flops_per_token(config.model)
        self.peak = 0.0
        self._context, self._precision = context, precision
        self._data_s = 0.0

    def measure_peak(self) -> str:
        """Measure the machine, on all ranks at once. Returns a sentence on what `mfu` is a share of."""
        context = self._context
        self.peak = peak_flops_per_s(self._precision, context.device, context.all_reduce_sum)
        return (
            f"share of peak: {self.flops_per_token / 1e6:,.1f} MFLOP a token (6 N + 12 layers x heads x head width x "
            f"context) x tokens/s, over {self.peak / 1e9:,.0f} GFLOP/s, the rate of large {self._precision} matrix "
            f"multiplications measured now on {context.world_size} worker(s) at once"
        )

    def measure_peak_again(self) -> None:
        """Keep the higher rate: the machine may have been busy with other things the first time. On all ranks."""
        context = self._context
        again = peak_flops_per_s(self._precision, context.device, context.all_reduce_sum, is_again=True)
        self.peak = max(self.peak, again)

    @contextlib.contextmanager
    def timing_data(self) -> Iterator[None]:
        """Count the time that the body takes as time spent on reading a batch."""
        began = time.perf_counter()
        try:
            yield
        finally:
            self._data_s += time.perf_counter() - began

    def figures(self, tokens_per_s: float, elapsed_s: float) -> dict[str, float]:
        """Figures of the interval of `elapsed_s` that ends now; the next one begins.

        `mfu` and `data_share` (time of this rank spent on reading batches) from 0 to 1, memory of this rank in bytes.
        """
        figures = {"data_share": self._data_s / elapsed_s}
        self._data_s = 0.0
        if self.peak > 0:
            figures["mfu"] = tokens_per_s * self.flops_per_token / self.peak
        return figures | memory(self._context.device)


def forget_peaks(device: torch.device) -> None:
    """Let the most that `memory` gives count from now on: another run of this process may have held more.

    Where the system cannot forget it, as macOS, it stays that of the process.
    """
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # proc(5): the peak of the resident set
    # before the process has used the GPU there is no peak, and PyTorch raises
    if device.type == "cuda" and torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        torch.cuda.reset_peak_memory_stats(device)


def memory(device: torch.device) -> dict[str, float]:
    """Bytes that this process holds: resident now and at most so far, and the same of its GPU's memory."""
    figures: dict[str, float] = {}
    with contextlib.suppress(Exception):  # neither psutil nor `resource` is everywhere
        import resource

        import psutil

        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
        figures |= {"memory_bytes": float(psutil.Process().memory_info().rss), "peak_memory_bytes": float(peak)}
    if device.type == "cuda":
        figures["gpu_memory_bytes"] = float(torch.cuda.memory_allocated(device))
        figures["gpu_peak_memory_bytes"] = float(torch.cuda.max_memory_allocated(device))
    return figures
