"""What a sweep found, as a table.

In: what became of the trials. Out: `results.csv`, lines of text, and the config of the best one as YAML. A trial that
was stopped early, diverged or failed is a row too.
"""

import csv
import dataclasses
import hashlib
import io
import json
from collections.abc import Iterable, Sequence
from enum import StrEnum
from typing import Any

from tune.space import Point, short_name

METRIC = "val_bits_per_byte"
MAX_NAME_LETTERS = 120
"""Of a trial; a folder takes a few more."""


class TrialStatus(StrEnum):
    """What became of a trial, the best first."""

    FINISHED = "finished"
    STOPPED = "stopped"  # early, as others were better at the same step
    DIVERGED = "diverged"
    FAILED = "failed"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Trial:
    """One point, run."""

    point: Point
    metrics: dict[str, float] = dataclasses.field(default_factory=dict)
    """Of its best validation; empty unless it finished or was stopped."""
    run_id: str = ""
    status: TrialStatus = TrialStatus.FINISHED
    reason: str = ""  # why it did not finish
    step: int = 0  # at which it ended or, as far as is known, failed
    tokens: int = 0  # trained on up to there
    wall_s: float = 0.0  # spent on it, starts of workers included

    @property
    def name(self) -> str:
        """Its folder's name."""
        return trial_name(self.point)

    @property
    def has_value(self) -> bool:
        """Whether it has bits per byte to compare."""
        return self.status in (TrialStatus.FINISHED, TrialStatus.STOPPED) and METRIC in self.metrics


def trial_name(point: Point) -> str:
    """Folder and run name of a point, another one for each: that of lr 5e-4 and d_ff 512 is `"lr0.0005-dff512"`."""
    parts = [short_name(field).replace("_", "") + value_text(value) for field, value in point.items()]
    name = "".join(letter if letter.isalnum() or letter in "-+._" else "_" for letter in "-".join(parts))
    if len(name) <= MAX_NAME_LETTERS:
        return name
    return f"{name[: MAX_NAME_LETTERS - 13]}-{_digest(point)}"


def _digest(point: Point) -> str:
    return hashlib.sha256(json.dumps(dict(point), sort_keys=True).encode()).hexdigest()[:12]


def value_text(value: Any) -> str:
    """A value in few letters, another text for each: `0.001`, `512`, `muon`."""
    if isinstance(value, float):
        short = f"{value:g}"
        return short if float(short) == value else repr(value)
    return str(value)


def ranked(trials: Iterable[Trial]) -> list[Trial]:
    """Those that finished by their bits per byte; those that were stopped, the latest first and then by bits per byte;
    those that diverged; those that failed."""
    order = list(TrialStatus)

    def place(trial: Trial) -> tuple[float, ...]:
        step = -trial.step if trial.status == TrialStatus.STOPPED else 0
        return (order.index(trial.status), step, trial.metrics.get(METRIC, 0.0))

    return sorted(trials, key=place)


def csv_table(trials: Sequence[Trial]) -> str:
    """The content of `results.csv`: a row for each trial."""
    text = io.StringIO()
    table = csv.writer(text, lineterminator="\n")
    fields = list(trials[0].point) if trials else []
    measures = ("val_loss", METRIC)
    own = ["step", *measures, "run_id", "status", "reason", "tokens", "wall_s"]
    table.writerow([*map(short_name, fields), *own])
    for trial in trials:
        values = [value_text(trial.point[field]) for field in fields]
        found = [f"{trial.metrics[name]:.6f}" if name in trial.metrics else "" for name in measures]
        step = int(trial.metrics["step"]) if trial.status == TrialStatus.FINISHED else trial.step
        ends = [trial.run_id, trial.status, trial.reason, trial.tokens, f"{trial.wall_s:.1f}"]
        table.writerow([*values, step, *found, *ends])
    return text.getvalue()


def format_table(trials: Sequence[Trial]) -> str:
    """The trials as lines of text."""
    fields = list(trials[0].point) if trials else []
    rows = [[value_text(trial.point[field]) for field in fields] for trial in trials]
    widths = [max(6, *(len(row[i]) for row in rows), len(short_name(field))) for i, field in enumerate(fields)]

    def left(values: Iterable[str]) -> str:
        return " ".join(f"{value:>{width}}" for value, width in zip(values, widths, strict=True))

    lines = [f"  {left(map(short_name, fields))} {'nats':>8} {'bits/byte':>10}"]
    for row, trial in zip(rows, trials, strict=True):
        line = f"  {left(row)} "
        if trial.has_value:
            line += f"{trial.metrics['val_loss']:>8.4f} {trial.metrics[METRIC]:>10.4f}"
        if trial.status != TrialStatus.FINISHED:
            reason = f": {trial.reason}" if trial.reason else ""
            line += f"{trial.status:>9} at step {trial.step:,}{reason}"
        lines.append(line)
    return "\n".join(lines)


def describe(point: Point) -> str:
    """A point in words: `lr 0.001, d_ff 512`."""
    return ", ".join(f"{short_name(field)} {value_text(value)}" for field, value in point.items())
