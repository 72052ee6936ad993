"""A run's own record brought to its MLflow run: each value of each step once, whatever was away meanwhile.

In: `metrics.jsonl` of a run's folder, which is the record that counts. Out: metrics and samples at the store. What
MLflow has is asked of MLflow, so neither a server that was away nor a killed process loses or doubles a step. A step
that was done again and came out otherwise, with another rate or other data, is sent again: MLflow shows the last value.
"""

import math
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping
from typing import Any

from slm_ray.runs.history import History
from slm_ray.runs.train_state import HOW_MEASURED

SAMPLES = "samples"
SYSTEM = "system/"
"""Metrics of machines begin so; they are no part of a run's record."""
_BATCH = 1000
"""The most values that MLflow takes at once."""
_NO_METRICS = frozenset({"step", "message", "sample", *HOW_MEASURED})
_DECISIVE = ("lr", "train_loss", "val_loss")
"""What tells a step that was done otherwise; times, which are others each time, do not."""
_ROUNDING = 1e-3
"""Between two computations of the same step, relative: other hardware, another number of workers."""


def sample_name(step: int) -> str:
    """The artifact of the story that was written at a step."""
    return f"{SAMPLES}/step-{step:08d}.txt"


class RecordSync:
    """What of a run's record its MLflow run has. For one thread at a time.

    Every method raises what the client of the store raises; the next one asks the store anew.
    """

    def __init__(self, client: Any, run_id: str, record: History) -> None:
        self._client, self._run_id, self._record = client, run_id, record
        self._known: dict[str, dict[int, float]] | None = None  # metric -> its values at the store, by step

    def send(self, metrics: Mapping[str, float], step: int) -> None:
        """Log values at a step, but for those that are there; before them, at first and after a failure, what lacks."""
        if self._known is None:
            self.send_missing()
        self._log([(name, value, step) for name, value in metrics.items()])

    def send_missing(self) -> None:
        """Log every value and sample of the record that the store lacks."""
        self._known = self._values()
        last = {(name, step): value for name, value, step in self._points()}
        self._log([(name, value, step) for (name, step), value in last.items()])
        self._send_samples()

    def _points(self) -> Iterator[tuple[str, float, int]]:
        for line in self._record.lines():
            if "step" in line:
                values = {name: value for name, value in line.items() if name not in _NO_METRICS}
                yield from ((name, float(value), int(line["step"])) for name, value in values.items())

    def _send_samples(self) -> None:
        texts = {sample_name(int(line["step"])): line["sample"] for line in self._record.lines() if "sample" in line}
        kept = {artifact.path for artifact in self._client.list_artifacts(self._run_id, SAMPLES)} if texts else set()
        for name in sorted(texts.keys() - kept):
            self._client.log_text(self._run_id, str(texts[name]), name)

    def _log(self, points: list[tuple[str, float, int]]) -> None:
        from mlflow.entities import Metric

        known = self._known if self._known is not None else self._values()
        self._known = None  # until all of it is known to be there
        again = {step for name, value, step in points if name in _DECISIVE and _is_other(value, known[name].get(step))}
        missing = [(name, value, step) for name, value, step in points if step in again or step not in known[name]]
        now = int(time.time() * 1000)
        for start in range(0, len(missing), _BATCH):
            batch = missing[start : start + _BATCH]
            self._client.log_batch(
                self._run_id, metrics=[Metric(name, value, now, step) for name, value, step in batch]
            )
        for name, value, step in missing:
            known[name][step] = value
        self._known = known

    def _values(self) -> dict[str, dict[int, float]]:
        found: dict[str, dict[int, float]] = defaultdict(dict)
        for name in self._client.get_run(self._run_id).data.metrics:
            if not name.startswith(SYSTEM):
                history = sorted(self._client.get_metric_history(self._run_id, name), key=lambda one: one.timestamp)
                found[name] |= {metric.step: metric.value for metric in history}
        return found


def _is_other(value: float, there: float | None) -> bool:
    """Whether the store has another value than this one; not where it has none."""
    if there is None or not (math.isfinite(value) and math.isfinite(there)):
        return there is not None and math.isfinite(value) != math.isfinite(there)
    return not math.isclose(value, there, rel_tol=_ROUNDING)
