"""What the training loop asks of a tracker, and the tracker that records nothing."""

from collections.abc import Mapping
from pathlib import Path
from typing import Protocol


class Tracker(Protocol):
    """What the loop needs of a tracker."""

    @property
    def run_id(self) -> str:
        """Id of the run, empty where nothing is recorded."""

    def log_metrics(self, metrics: Mapping[str, float], step: int) -> None:
        """Record values at a step; the same step again replaces nothing and harms nothing."""

    def log_text(self, text: str, name: str) -> None:
        """Keep a text as an artifact called `name`."""

    def log_file(self, path: Path, folder: str = "") -> None:
        """Keep a file as an artifact."""

    def set_tags(self, tags: Mapping[str, str]) -> None:
        """Attach names with values to the run."""

    def set_running(self) -> None:
        """Show a run that had ended as running again."""

    def finish(self, status: str = "FINISHED") -> None:
        """End the run with MLflow's status word: FINISHED, FAILED or KILLED; then `close`."""

    def close(self) -> None:
        """Wait until what was recorded is delivered; the run may go on."""


class NullTracker:
    """Records nothing."""

    run_id = ""

    def log_metrics(self, metrics: Mapping[str, float], step: int) -> None:
        """Nothing."""

    def log_text(self, text: str, name: str) -> None:
        """Nothing."""

    def log_file(self, path: Path, folder: str = "") -> None:
        """Nothing."""

    def set_tags(self, tags: Mapping[str, str]) -> None:
        """Nothing."""

    def set_running(self) -> None:
        """Nothing."""

    def finish(self, status: str = "FINISHED") -> None:
        """Nothing."""

    def close(self) -> None:
        """Nothing."""


class CompositeTracker:
    """Several trackers as one, whose run is that of the first."""

    def __init__(self, *trackers: Tracker) -> None:
        self._trackers = trackers

    @property
    def run_id(self) -> str:
        """Id of the first one's run."""
        return self._trackers[0].run_id

    def log_metrics(self, metrics: Mapping[str, float], step: int) -> None:
        """Record values at a step with each."""
        for tracker in self._trackers:
            tracker.log_metrics(metrics, step)

    def log_text(self, text: str, name: str) -> None:
        """Keep a text with each."""
        for tracker in self._trackers:
            tracker.log_text(text, name)

    def log_file(self, path: Path, folder: str = "") -> None:
        """Keep a file with each."""
        for tracker in self._trackers:
            tracker.log_file(path, folder)

    def set_tags(self, tags: Mapping[str, str]) -> None:
        """Attach names with values to each one's run."""
        for tracker in self._trackers:
            tracker.set_tags(tags)

    def set_running(self) -> None:
        """Show each one's run as running again."""
        for tracker in self._trackers:
            tracker.set_running()

    def finish(self, status: str = "FINISHED") -> None:
        """End each one's run."""
        for tracker in self._trackers:
            tracker.finish(status)

    def close(self) -> None:
        """Wait until all is delivered."""
        for tracker in self._trackers:
            tracker.close()
