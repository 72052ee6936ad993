"""TensorBoard's event files: `--tensorboard`.

In: what a tracker is told. Out: `runs/NAME/tensorboard/`, to be seen with `tensorboard --logdir runs`. TensorBoard is
an optional package and lives here only.
"""

import importlib.util
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from slm_ray.errors import UserError
from slm_ray.tracking.delivery_queue import DeliveryQueue
from slm_ray.tracking.tracker import Tracker

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


class WithEventLog:
    """A tracker that also writes metrics and texts to TensorBoard's files; a failure costs a warning."""

    def __init__(self, tracker: Tracker, folder: Path, warn: Callable[[str], None]) -> None:
        self._tracker, self._folder = tracker, folder
        self._outbox = DeliveryQueue("TensorBoard", warn)
        self._writer: Any = None

    @property
    def run_id(self) -> str:
        """Id of the run at the tracker."""
        return self._tracker.run_id

    def log_metrics(self, metrics: Mapping[str, float], step: int) -> None:
        """Record values at a step, here and there."""
        self._tracker.log_metrics(metrics, step)
        copy = dict(metrics)
        self._outbox.put(lambda: self._write_metrics(copy, step))

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
        """Keep a text at the tracker; samples, which are named by their step, here too."""
        self._tracker.log_text(text, name)
        folder, _, step = name.removesuffix(".txt").partition("/step-")
        if step.isdigit():
            self._outbox.put(lambda: self._open(int(step)).add_text(folder, text, int(step)))

    def log_file(self, path: Path, folder: str = "") -> None:
        """Keep a file at the tracker."""
        self._tracker.log_file(path, folder)

    def set_tags(self, tags: Mapping[str, str]) -> None:
        """Attach names with values to the run at the tracker."""
        self._tracker.set_tags(tags)

    def set_running(self) -> None:
        """Show the run as running again at the tracker."""
        self._tracker.set_running()

    def finish(self, status: str = "FINISHED") -> None:
        """End the run at the tracker, and `close`."""
        self.close()
        self._tracker.finish(status)

    def close(self) -> None:
        """Wait until all is delivered, here and there."""
        self._outbox.put(lambda: self._writer and self._writer.close())
        self._outbox.flush()
        self._tracker.close()
