"""What one rank knows of the others, and who watches over it.

In: from Ray Train or from a test, rank, device and how to sum over ranks. Out: an argument of `loop.fit`.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

DDP_OPTIONS: Mapping[str, Any] = {"gradient_as_bucket_view": True, "broadcast_buffers": False}
"""For `wrap`: gradients are not copied back from the buckets they are summed in, and the rotary tables, which are the
same everywhere, are not sent at every step."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainContext:
    """Rank, device and collectives of one process. The defaults are a process alone."""

    rank: int = 0
    world_size: int = 1
    device: torch.device = dataclasses.field(default_factory=lambda: torch.device("cpu"))
    wrap: Callable[[nn.Module], nn.Module] = lambda module: module
    """Makes the gradients of all ranks one (DDP)."""
    all_reduce_sum: Callable[[Tensor], Tensor] = lambda values: values
    """Sums a tensor over the ranks."""
    report: Callable[[Mapping[str, Any]], None] = lambda _metrics: None
    """Called by every rank after each validation; a barrier."""
    is_stop_requested: Callable[[], bool] = lambda: False
    """Whether the run is to save and leave after this step; rank 0 is asked, and tells the others."""
    heartbeat: Callable[[], None] = lambda: None
    """Called after every piece of work; the watchdog of a rank that hangs misses it."""

    @property
    def is_main(self) -> bool:
        """Rank 0 writes and logs."""
        return self.rank == 0
