"""The order in which a sweep's trials are run: batch after batch, and within a batch rung after rung.

In: a search, the rungs, and what runs trials. Out: what became of all of them. Each decision follows from values that
lie in the trials' folders, and waits until all those are there that it depends on: the order in which trials end, an
interruption and the number that run at once change nothing.
"""

import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping, Sequence

from slm_ray.config.schema import TrainConfig
from slm_ray.errors import UserError
from tune.halving import promoted
from tune.outcomes import failed_trial, refuse_other_trial, trial_at
from tune.results import METRIC, Trial, TrialStatus, trial_name
from tune.search import Searcher, Tried
from tune.shown.view import View
from tune.space import Point


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rounds:
    """What `run_rounds` works with."""

    searcher: Searcher
    rungs: Sequence[int]
    factor: int
    retries: int
    trial_config: Callable[[Point], TrainConfig]
    run: Callable[[Mapping[str, TrainConfig], int], dict[str, str]]
    """Trains trials up to a step; says why each that failed did."""
    recorded: Sequence[Sequence[Point]]
    """Batches that were suggested before an interruption."""
    record: Callable[[Sequence[Sequence[Point]]], None]
    """Keeps the batches, before the trials of the last one begin."""
    view: View


def run_rounds(rounds: Rounds) -> list[Trial]:
    """All trials of a sweep, in the order in which they were suggested.

    Raises:
        UserError: a trial's folder is another's, no new point is found, or trials were interrupted.
    """
    trials: list[Trial] = []
    values: list[dict[str, float]] = [{} for _ in rounds.rungs]
    for batch in _batches(rounds, trials):
        trials += _climb(rounds, {trial_name(point): point for point in batch}, values)
    return trials


def _batches(rounds: Rounds, trials: Sequence[Trial]) -> Iterator[Sequence[Point]]:
    """Those of the record, then new ones that follow from what the trials came to; `trials` grows meanwhile."""
    batches = [list(batch) for batch in rounds.recorded]
    yield from batches
    while batch := rounds.searcher.next_points([_tried(trial, rounds.rungs) for trial in trials]):
        batches.append(batch)
        rounds.record(batches)
        yield batch


def _tried(trial: Trial, rungs: Sequence[int]) -> Tried:
    is_stopped = trial.status == TrialStatus.STOPPED
    rung = rungs.index(trial.step) if is_stopped else len(rungs) - 1
    return Tried(trial.point, trial.metrics[METRIC] if trial.has_value else None, rung, is_stopped)


def _climb(rounds: Rounds, batch: Mapping[str, Point], values: Sequence[dict[str, float]]) -> list[Trial]:
    """A batch up to where each of its trials ends. `values` holds those of all trials at each rung, and grows."""
    for point in batch.values():
        refuse_other_trial(rounds.trial_config(point))
    settled: dict[str, Trial] = {}
    going = list(batch)
    for step, here in zip(rounds.rungs, values, strict=True):
        found = _run_to(rounds, {name: batch[name] for name in going}, step)
        settled |= found
        arrived = {name: trial.metrics[METRIC] if trial.has_value else math.inf for name, trial in found.items()}
        going = promoted(arrived, here, rounds.factor) if step != rounds.rungs[-1] else []
        here.update(arrived)
        for name in found.keys() - set(going):
            rounds.view.settled(found[name])
    return [settled[name] for name in batch]


def _run_to(rounds: Rounds, points: Mapping[str, Point], step: int) -> dict[str, Trial]:
    """Trials as they stand at a rung, after those that were not there yet were run; a crash is tried again."""
    configs = {name: rounds.trial_config(point) for name, point in points.items()}
    found = {name: trial_at(configs[name], point, step) for name, point in points.items()}
    failures: dict[str, str] = {}
    for attempt in range(1 + rounds.retries):
        waiting = {name: configs[name] for name, trial in found.items() if trial is None}
        if not waiting:
            break
        if attempt:
            rounds.view.said(f"  {len(waiting)} failed and are tried again: {', '.join(waiting)}")
        failures = rounds.run(waiting, step)
        found |= {name: trial_at(configs[name], points[name], step) for name in waiting}
        if interrupted := [name for name in waiting if found[name] is None and name not in failures]:
            raise UserError(f"{len(interrupted)} of {len(points)} trials did not come to their end: --resume goes on")
    return {name: found[name] or failed_trial(configs[name], point, failures[name]) for name, point in points.items()}
