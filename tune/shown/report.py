"""What a sweep leaves: its table, its pictures and its best configuration, in its folder and at the tracker.

In: what became of the trials, the best first. Out: `results.csv`; where a trial has a value `heatmap.png`,
`parallel.png` and `curves.png`; where one finished `best.yaml`, which `train.py --config` takes.
"""

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import yaml

from slm_ray import storage
from slm_ray.config.places import saved_config
from slm_ray.errors import UserError, one_line
from slm_ray.storage import StoragePath
from slm_ray.tracking.tracker import Tracker
from tune.config import run_config
from tune.outcomes import validations
from tune.planning import Plan
from tune.results import METRIC, Trial, TrialStatus, csv_table, trial_name
from tune.shown.plots import draw_curves, draw_heat_map, draw_parallel, fields_that_vary_most
from tune.space import Point

TABLE, HEAT_MAP, PARALLEL, CURVES, BEST = "results.csv", "heatmap.png", "parallel.png", "curves.png", "best.yaml"


def keep_results(plan: Plan, trials: Sequence[Trial], parent: Tracker) -> None:
    """Write all of it. A picture of an earlier table that this one has no values for goes."""
    folder = plan.run_folder.path  # of this machine
    storage.replace_file(folder / TABLE, csv_table(trials).encode())
    for name in (HEAT_MAP, PARALLEL, CURVES, BEST):
        storage.remove(folder / name)
        storage.remove(plan.folder / name)
    if valued := [trial for trial in trials if trial.has_value]:
        fields = plan.sweep.heat_map or fields_that_vary_most(valued)
        draw_heat_map(valued, fields, folder / HEAT_MAP)
        draw_parallel(valued, folder / PARALLEL)
        _draw_curves(plan, trials)
    if trials and trials[0].status == TrialStatus.FINISHED:
        storage.replace_file(folder / BEST, best_config(plan, trials[0].point).encode())
        parent.log_metrics({f"best_{METRIC}": trials[0].metrics[METRIC]}, 0)
    spent = {"tokens": float(sum(trial.tokens for trial in trials)), "wall_s": sum(trial.wall_s for trial in trials)}
    parent.log_metrics(spent, 0)
    for name in (TABLE, HEAT_MAP, PARALLEL, CURVES, BEST):
        if (folder / name).exists():
            parent.log_file(folder / name)
            _copy(folder / name, plan.folder / name)


def _copy(file: Path, kept: StoragePath) -> None:
    """Raises: UserError when the store refuses it."""
    if storage.is_local(kept):
        return  # it is the same file
    try:
        kept.write_bytes(file.read_bytes())
    except Exception as error:  # each store has errors of its own
        raise UserError(f"{kept} could not be written: {one_line(error)}") from error


def _draw_curves(plan: Plan, trials: Sequence[Trial]) -> None:
    curves = {}
    for trial in trials:
        if found := validations(plan.trial_config(trial.point)):
            curves[trial_name(trial.point)] = ([one.step for one in found], [one.val_bits_per_byte for one in found])
    if curves:
        draw_curves(curves, plan.run_folder.path / CURVES)


def best_config(plan: Plan, point: Point) -> str:
    """The full run of a point as YAML, as `train.py --config` takes it. It registers nothing by itself."""
    config = run_config(plan.sweep, point, name="", resume=False, force=False, register="")
    return yaml.safe_dump(saved_config(dataclasses.asdict(config)), sort_keys=False)
