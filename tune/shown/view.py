"""Shows how a sweep goes: a table that is kept up to date on a terminal, plain lines elsewhere.

In: what happens to the trials. Out: text on stderr.
"""

import dataclasses
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Protocol

from rich.console import Console
from rich.live import Live
from rich.table import Table

from tune.results import METRIC, Trial, TrialStatus

REFRESHES_PER_S = 2


class View(Protocol):
    """What the sweep tells."""

    def started(self, name: str) -> None:
        """A trial runs."""

    def validated(self, name: str, result: Mapping[str, Any]) -> None:
        """A trial has a validation, with its `step` and bits per byte."""

    def settled(self, trial: Trial) -> None:
        """What became of a trial is known."""

    def said(self, line: str) -> None:
        """The sweep says something."""


@contextmanager
def shown(n_trials: int) -> Iterator[View]:
    """A view for as long as a block lasts."""
    if not sys.stderr.isatty():
        yield Lines(n_trials)
        return
    table = LiveTable(n_trials, Console(stderr=True))
    with table.live:
        yield table


def outcome(trial: Trial) -> str:
    """What became of a trial, in a few words."""
    if trial.status == TrialStatus.FINISHED:
        return "finished"
    return f"{trial.status} at step {trial.step:,}"


class Lines:
    """A plain line for each validation and end of a trial."""

    def __init__(self, n_trials: int) -> None:
        self.n_trials = n_trials
        self.n_settled = 0

    def started(self, name: str) -> None:
        """Nothing: its first validation is soon enough."""

    def validated(self, name: str, result: Mapping[str, Any]) -> None:
        """Its step and value."""
        if METRIC in result:
            self.said(f"  {name}  step {int(result['step']):,}  {result[METRIC]:.4f} bits per byte")

    def settled(self, trial: Trial) -> None:
        """How it ended."""
        self.n_settled += 1
        self.said(f"  {trial.name}  {outcome(trial)} ({self.n_settled} of {self.n_trials})")

    def said(self, line: str) -> None:
        """The line."""
        sys.stderr.write(line + "\n")
        sys.stderr.flush()


@dataclasses.dataclass
class _Row:
    state: str = "running"
    step: str = ""
    value: float | None = None


class LiveTable:
    """A row for each trial, the best first."""

    def __init__(self, n_trials: int, console: Console) -> None:
        self.n_trials = n_trials
        self.console = console
        self.rows: dict[str, _Row] = {}
        self.live = Live(console=console, get_renderable=self.table, refresh_per_second=REFRESHES_PER_S)

    def started(self, name: str) -> None:
        """A row, or the same row again."""
        self.rows.setdefault(name, _Row()).state = "running"

    def validated(self, name: str, result: Mapping[str, Any]) -> None:
        """Its step and value."""
        if METRIC in result:
            row = self.rows.setdefault(name, _Row())
            row.step, row.value = f"{int(result['step']):,}", float(result[METRIC])

    def settled(self, trial: Trial) -> None:
        """How it ended."""
        row = self.rows.setdefault(trial.name, _Row())
        row.state, row.step = str(trial.status), f"{trial.step:,}"
        row.value = trial.metrics.get(METRIC, row.value)

    def said(self, line: str) -> None:
        """The line, above the table."""
        self.console.print(line, markup=False, highlight=False)

    def table(self) -> Table:
        """As it stands now."""
        rows = list(self.rows.items())  # another thread adds to them
        n_settled = sum(row.state != "running" for _, row in rows)
        table = Table(title=f"{n_settled} of {self.n_trials} trials ended", title_justify="left")
        for heading in ("trial", "state", "step", "bits/byte"):
            table.add_column(heading, justify="left" if heading in ("trial", "state") else "right")
        best_first = sorted(rows, key=lambda item: (item[1].value is None, item[1].value or 0.0))
        for name, row in best_first[: max(3, self.console.height - 6)]:
            table.add_row(name, row.state, row.step, "" if row.value is None else f"{row.value:.4f}")
        return table
