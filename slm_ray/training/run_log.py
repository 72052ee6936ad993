"""What a run logs: lines of its own record, metrics and texts at the tracker.

In: messages, the figures of an interval, evaluations. Out: `metrics.jsonl`, which the driver shows, and the tracker's
run. Rank 0 logs; the other ranks log nothing.
"""

from typing import Any

from slm_ray.runs.history import History
from slm_ray.runs.train_state import Evaluation
from slm_ray.tracking.record_sync import sample_name
from slm_ray.tracking.tracker import Tracker


class RunLog:
    """Of the ranks that log nothing."""

    def rewind(self, step: int) -> None:
        """Forget what was logged after `step`: a resumed run logs it again."""

    def message(self, text: str) -> None:
        """Log a sentence, which the driver shows."""

    def step(self, step: int, figures: dict[str, float]) -> None:
        """Log the figures of the interval that ends with `step`."""

    def evaluation(self, evaluation: Evaluation, sample: str | None = None) -> None:
        """Log a validation, with a story by the model where there is one."""

    def repeat(self, evaluation: Evaluation) -> None:
        """Log a validation unless it was logged before: a kill may have come between a checkpoint and its line."""


class MainRunLog(RunLog):
    """Rank 0's log."""

    def __init__(self, history: History, tracker: Tracker) -> None:
        self._history, self._tracker = history, tracker

    def rewind(self, step: int) -> None:
        """Drop the lines after `step`."""
        self._history.rewind(step)

    def message(self, text: str) -> None:
        """Add a line to the record."""
        self._history.message(text)

    def step(self, step: int, figures: dict[str, float]) -> None:
        """Add a line to the record, and metrics at the tracker."""
        self._history.append({"step": step, **figures})
        self._tracker.log_metrics(figures, step)

    def evaluation(self, evaluation: Evaluation, sample: str | None = None) -> None:
        """Add a line to the record, metrics and the story at the tracker."""
        line: dict[str, Any] = {"step": evaluation.step, **evaluation.record}
        self._tracker.log_metrics(evaluation.metrics, evaluation.step)
        if sample is not None:
            self._tracker.log_text(sample, sample_name(evaluation.step))
            line["sample"] = sample
        self._history.append(line)

    def repeat(self, evaluation: Evaluation) -> None:
        """Look for it in the record."""
        if evaluation.step not in self._history.series("val_loss")[0]:
            self.evaluation(evaluation)
