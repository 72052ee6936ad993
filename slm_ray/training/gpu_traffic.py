"""What goes between this process and a GPU without one waiting for the other.

In: arrays of a batch, and numbers that a step leaves on the device. Out: tensors there, and the numbers here. A GPU
works through a queue: who asks for a result waits until the queue is empty, and then the GPU for the next step. So
batches go there from pinned memory, and what decides about going on is read one step late. On a CPU nothing is.
"""

from typing import Any

import numpy.typing as npt
import torch
from torch import Tensor


def to_device(values: npt.NDArray[Any], device: torch.device) -> Tensor:
    """The values as a tensor on the device; on a CPU it shares their memory."""
    tensor = torch.from_numpy(values)
    if device.type == "cuda":  # out of pageable memory the copy would wait for all that is queued before it
        return tensor.contiguous().pin_memory().to(device, non_blocking=True)
    return tensor.to(device)


class LateReading:
    """Reads one number a step: on a GPU that of the step before, which is there by then."""

    def __init__(self, is_late: bool) -> None:
        self._is_late = is_late
        self._waiting: tuple[Tensor, torch.cuda.Event | None] | None = None

    def next(self, value: Tensor) -> float | None:
        """Hand in this step's number. Returns the newest that can be read without waiting; None is none yet."""
        if not self._is_late:
            return float(value)
        before = self.last()
        copy, event = value.to("cpu", non_blocking=True, copy=True), None  # into pinned memory
        if value.is_cuda:
            event = torch.cuda.Event()  # type: ignore[no-untyped-call]
            event.record()
        self._waiting = copy, event
        return before

    def last(self) -> float | None:
        """The number that was handed in last and not yet given back, if there is one: waits for it."""
        if self._waiting is None:
            return None
        (copy, event), self._waiting = self._waiting, None
        if event is not None:
            event.synchronize()
        return float(copy)
