"""Where a step's time goes: `--profile`.

In: a run, while it trains. Out: `profile/trace.json` in the run's folder, for chrome://tracing or ui.perfetto.dev, and
`profile/operators.txt`, a table of the most expensive operators; both are artifacts of its MLflow run too. Rank 0
records a few steps between two validations, after the first ones, in which compilers and caches warm up. A profile that
fails costs a warning; without the option nothing is recorded and nothing costs anything.
"""

import dataclasses
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, Protocol

import torch

from slm_ray.training.context import TrainContext
from slm_ray.training.inputs import TrainInputs

TRACE = "profile/trace.json"
OPERATORS = "profile/operators.txt"
WARM_UP_STEPS = 10
N_STEPS = 3
N_ROWS = 20
NAME_WIDTH = 44


class StepProfile(Protocol):
    """What the loop tells of its steps."""

    def after_step(self, step: int) -> None:
        """`step` optimizer steps are done."""

    def close(self) -> None:
        """No step follows."""


class NoProfile:
    """Records nothing."""

    def after_step(self, step: int) -> None:
        """Nothing."""

    def close(self) -> None:
        """Nothing."""


def step_profile(task: TrainInputs, around: TrainContext, first_step: int) -> StepProfile:
    """The profile of a run that goes on after `first_step` steps, as its config asks."""
    if not task.config.profile or not around.is_main:
        return NoProfile()
    for name in (TRACE, OPERATORS):  # of an earlier part of the run
        (task.folder.path / name).unlink(missing_ok=True)
    start, stop = window(first_step, task.max_steps, task.eval_interval)
    if start >= stop:
        task.history.append({"message": "no profile: there are too few steps left"})
        return NoProfile()
    return TorchProfile(task, around.device, start, stop)


def window(first_step: int, max_steps: int, eval_interval: int) -> tuple[int, int]:
    """Between which step numbers to record: (a, b) records the steps a + 1 to b.

    They lie after the warm-up and between two validations, where the run is long enough; else what there is. At least
    one step is always left out before them: the first one compiles. Where none follows, a >= b.
    `window(0, 1000, 100) -> (10, 13)`; `window(95, 1000, 100) -> (105, 108)`; `window(88, 1000, 100) -> (100, 103)`.
    """
    start = min(first_step + WARM_UP_STEPS, max(max_steps - N_STEPS, first_step + 1))
    next_validation = (start // eval_interval + 1) * eval_interval
    if start + N_STEPS > next_validation and next_validation + min(N_STEPS, eval_interval) <= max_steps:
        start, next_validation = next_validation, next_validation + eval_interval
    return start, min(start + N_STEPS, next_validation, max_steps)


class TorchProfile:
    """A torch profiler around the steps of `window`."""

    def __init__(self, task: TrainInputs, device: torch.device, start: int, stop: int) -> None:
        self._task, self._device = task, device
        self._start, self._stop = start, stop
        self._profiler: Any = None

    def after_step(self, step: int) -> None:
        """Begin or end the recording where `step` says so."""
        if step == self._start:
            self._guarded(self._begin)
        elif step == self._stop and self._profiler is not None:
            self._guarded(self._end)

    def close(self) -> None:
        """End a recording that is still open: the run was cut short."""
        if self._profiler is not None:
            self._guarded(self._end)

    def _begin(self) -> None:
        activities = [torch.profiler.ProfilerActivity.CPU]
        if self._device.type == "cuda":
            activities.append(torch.profiler.ProfilerActivity.CUDA)
        profiler = torch.profiler.profile(activities=activities)
        profiler.start()
        self._profiler = profiler

    def _end(self) -> None:
        profiler, self._profiler = self._profiler, None
        profiler.stop()
        folder = self._task.folder.path
        (folder / TRACE).parent.mkdir(parents=True, exist_ok=True)
        profiler.export_chrome_trace(str(folder / TRACE))
        rows = [OperatorTime.of(event) for event in profiler.key_averages()]
        table = operator_table(rows, self._stop - self._start)
        (folder / OPERATORS).write_text(table, encoding="utf-8")
        for name in (TRACE, OPERATORS):
            self._task.tracker.log_file(folder / name, "profile")
        self._task.history.append(
            {"message": f"profiled steps {self._start + 1:,} to {self._stop:,}: {folder / TRACE}"}
        )

    def _guarded(self, act: Callable[[], None]) -> None:
        try:
            act()
        except Exception as error:  # whatever a profiler raises, the training goes on
            self._profiler = None
            self._task.history.append({"message": f"no profile, the run goes on without: {error!r}"})


@dataclasses.dataclass(frozen=True)
class OperatorTime:
    """What one operator cost in all, without the operators that it calls."""

    name: str
    calls: int
    seconds: float
    """On the GPU where the operator ran there, else on the CPU."""

    @classmethod
    def of(cls, event: Any) -> "OperatorTime":
        """Out of one of torch's `key_averages`, which count in microseconds."""
        micros = event.self_device_time_total or event.self_cpu_time_total
        return cls(str(event.key), int(event.count), micros / 1e6)


def operator_table(rows: Iterable[OperatorTime], n_steps: int) -> str:
    """The operators that take longest, as lines of text: calls and milliseconds a step, and the share of all."""
    ranked = sorted(rows, key=lambda row: row.seconds, reverse=True)
    total = sum(row.seconds for row in ranked) or 1.0
    lines = [f"{'operator':<{NAME_WIDTH}} {'calls/step':>10} {'ms/step':>9} {'share':>7}"]
    for row in ranked[:N_ROWS]:
        name = row.name if len(row.name) <= NAME_WIDTH else row.name[: NAME_WIDTH - 1] + "…"
        calls, milliseconds = row.calls / n_steps, 1e3 * row.seconds / n_steps
        lines.append(f"{name:<{NAME_WIDTH}} {calls:>10,.1f} {milliseconds:>9,.2f} {row.seconds / total:>7.1%}")
    rest = sum(row.seconds for row in ranked[N_ROWS:])
    if rest:
        lines.append(f"{'all others':<{NAME_WIDTH}} {'':>10} {1e3 * rest / n_steps:>9,.2f} {rest / total:>7.1%}")
    return "\n".join(lines) + "\n"


def read_operators(folder: Path) -> str:
    """The table that a run has left in its folder, or an empty text."""
    path = folder / OPERATORS
    return path.read_text(encoding="utf-8") if path.is_file() else ""
