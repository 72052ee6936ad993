"""TensorBoard's event files: `--tensorboard`.

In: metrics and samples. Out: `runs/NAME/tensorboard/`, to be seen with `tensorboard --logdir runs`. TensorBoard is
an optional package and lives here only.
"""

import importlib.util
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from slm_ray.errors import UserError
from slm_ray.tracking.delivery_queue import DeliveryQueue
from slm_ray.tracking.tracker import NullTracker

FOLDER = "tensorboard"
FLUSH_EVERY_S = 10


def require_tensorboard() -> None:
    """Say what is missing before anything starts.

    Raises:
        UserError: the package is not installed.
    """
    if importlib.util.find_spec("tensorboard") is None:
        raise UserError(
            "--tensorboard needs the package tensorboard: `pip install 'slm-ray[tensorboard]'`, or leave the option out"
        )


class TensorBoardTracker(NullTracker):
    """A tracker that writes metrics and samples to TensorBoard's files; a failure costs a warning."""

    def __init__(self, folder: Path, warn: Callable[[str], None]) -> None:
        self._folder = folder
        self._queue = DeliveryQueue("TensorBoard", warn)
        self._writer: Any = None

    def log_metrics(self, metrics: Mapping[str, float], step: int) -> None:
        """Record values at a step."""
        copy = dict(metrics)
        self._queue.put(lambda: self._write_metrics(copy, step))

    def _write_metrics(self, metrics: Mapping[str, float], step: int) -> None:
        writer = self._open(step)
        for name, value in metrics.items():
            writer.add_scalar(name, value, step)

    def _open(self, step: int) -> Any:
        """The writer, made at the first value: events from its step on are of a run that was cut off there."""
        if self._writer is None:
            from torch.utils.tensorboard import SummaryWriter

            self._writer = SummaryWriter(str(self._folder), purge_step=step, flush_secs=FLUSH_EVERY_S)
        return self._writer

    def log_text(self, text: str, name: str) -> None:
        """Keep a sample, which is named by its step; other texts are left out."""
        folder, _, step = name.removesuffix(".txt").partition("/step-")
        if step.isdigit():
            self._queue.put(lambda: self._open(int(step)).add_text(folder, text, int(step)))

    def finish(self, status: str = "FINISHED") -> None:  # noqa: ARG002  # event files have no status
        """`close`."""
        self.close()

    def close(self) -> None:
        """Wait until all is written."""
        self._queue.put(lambda: self._writer and self._writer.close())
        self._queue.flush()
