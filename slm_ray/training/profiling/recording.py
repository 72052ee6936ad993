"""A recording of a few steps, for `--profile`.

In: a run, while it trains. Out: in the run's folder `profile/trace.json`, for chrome://tracing or ui.perfetto.dev,
`profile/parts.txt`, the step by part, and `profile/operators.txt`, torch's table of the most expensive operators; all
are artifacts of its MLflow run too. The trace is there a second time, under the name that TensorBoard's plugin
torch-tb-profiler looks for. Rank 0 records a few steps between two validations, after the first ones, in which
compilers and caches warm up. A profile that fails costs a warning; without the option nothing is recorded.
"""

import gzip
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import torch

from slm_ray.training.context import TrainContext
from slm_ray.training.inputs import TrainInputs
from slm_ray.training.metrics import TrainMetrics
from slm_ray.training.profiling import parts

TRACE = "profile/trace.json"
PARTS = "profile/parts.txt"
OPERATORS = "profile/operators.txt"
TENSORBOARD_TRACE = "profile/rank-0.pt.trace.json.gz"
"""As `torch.profiler.tensorboard_trace_handler` names it, but for the time: any folder below `--logdir` will do."""
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


def step_profile(inputs: TrainInputs, context: TrainContext, first_step: int, metrics: TrainMetrics) -> StepProfile:
    """The profile of a run that goes on after `first_step` steps, as its config asks."""
    if not inputs.config.profile or not context.is_main:
        return NoProfile()
    for name in (TRACE, PARTS, OPERATORS, TENSORBOARD_TRACE):  # of an earlier part of the run
        (inputs.folder.path / name).unlink(missing_ok=True)
    start, stop = window(first_step, inputs.max_steps, inputs.eval_interval)
    if start >= stop:
        inputs.history.message("no profile: there are too few steps left")
        return NoProfile()
    return TorchProfile(inputs, context, metrics, (start, stop))


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

    def __init__(
        self, inputs: TrainInputs, context: TrainContext, metrics: TrainMetrics, steps: tuple[int, int]
    ) -> None:
        self._inputs, self._device, self._metrics = inputs, context.device, metrics
        self._n_workers = context.world_size
        self._start, self._stop = steps
        self._profiler: Any = None
        self._marker: Any = None  # of the step that is being recorded

    def after_step(self, step: int) -> None:
        """Begin or end the recording where `step` says so."""
        if step == self._start:
            self._guarded(self._begin)
        elif step == self._stop and self._profiler is not None:
            self._guarded(self._end)
        elif self._profiler is not None:
            self._guarded(lambda: self._mark_step(step + 1))

    def close(self) -> None:
        """End a recording that is still open: the run was cut short."""
        if self._profiler is not None:
            self._guarded(self._end)

    def _begin(self) -> None:
        activities = [torch.profiler.ProfilerActivity.CPU]
        if self._device.type == "cuda":
            activities.append(torch.profiler.ProfilerActivity.CUDA)
        profiler = torch.profiler.profile(activities=activities, with_flops=True)
        profiler.start()
        self._profiler = profiler
        self._mark_step(self._start + 1)

    def _mark_step(self, number: int) -> None:
        """Let a step begin in the trace, under the name by which readers tell steps apart."""
        self._end_step()
        self._marker = torch.profiler.record_function(f"ProfilerStep#{number}")
        self._marker.__enter__()

    def _end_step(self) -> None:
        marker, self._marker = self._marker, None
        if marker is not None:
            marker.__exit__(None, None, None)

    def _end(self) -> None:
        profiler, self._profiler = self._profiler, None
        self._end_step()
        profiler.stop()
        folder = self._inputs.folder.path
        (folder / TRACE).parent.mkdir(parents=True, exist_ok=True)
        profiler.export_chrome_trace(str(folder / TRACE))
        with (folder / TRACE).open("rb") as trace, gzip.open(folder / TENSORBOARD_TRACE, "wb") as copy:
            shutil.copyfileobj(trace, copy)
        place = "cuda" if self._device.type == "cuda" else "cpu"
        table = profiler.key_averages().table(
            sort_by=f"self_{place}_time_total", row_limit=N_ROWS, max_name_column_width=NAME_WIDTH
        )
        (folder / OPERATORS).write_text(table, encoding="utf-8")
        (folder / PARTS).write_text(self._parts(profiler.events()), encoding="utf-8")
        for name in (TRACE, PARTS, OPERATORS):
            self._inputs.tracker.log_file(folder / name, "profile")
        self._inputs.history.message(f"profiled steps {self._start + 1:,} to {self._stop:,}: {folder / TRACE}")

    def _parts(self, events: Any) -> str:
        config, metrics, n_workers = self._inputs.config, self._metrics, self._n_workers
        tokens = config.batch_size * config.model.seq_len / n_workers
        found = parts.rows(events, self._stop - self._start, on_gpu=self._device.type == "cuda")
        return parts.table(found, peak=metrics.peak / n_workers, step_flop=tokens * metrics.flops_per_token)

    def _guarded(self, act: Callable[[], None]) -> None:
        try:
            act()
        except Exception as error:  # whatever a profiler raises, the training goes on
            self._profiler = None
            self._inputs.history.message(f"no profile, the run goes on without: {error!r}")


def read_tables(folder: Path) -> str:
    """The tables that a run has left in its folder, by part and by operator, or an empty text."""
    paths = (folder / PARTS, folder / OPERATORS)
    return "\n".join(path.read_text(encoding="utf-8") for path in paths if path.is_file())
