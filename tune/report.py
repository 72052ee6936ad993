"""What a sweep leaves: its table, its pictures and its best configuration, in its folder and at the tracker.

In: what became of the trials, the best first. Out: `results.csv`; where a trial has a value `heatmap.png`,
`parallel.png` and `curves.png`; where one finished `best.yaml`, which `train.py --config` takes.
"""

import dataclasses
from collections.abc import Sequence

import yaml

from slm_ray import storage
from slm_ray.config.places import saved_config
from slm_ray.tracking.tracker import Tracker
from tune.config import run_config
from tune.outcomes import validations
from tune.planning import Plan
from tune.plots import draw_curves, draw_heat_map, draw_parallel, fields_that_vary_most
from tune.results import METRIC, Trial, TrialStatus, csv_table, trial_name
from tune.space import Point
from tune.trials import run_folder

TABLE, HEAT_MAP, PARALLEL, CURVES, BEST = "results.csv", "heatmap.png", "parallel.png", "curves.png", "best.yaml"


def keep_results(plan: Plan, trials: Sequence[Trial], parent: Tracker) -> None:
    """Write all of it. A picture of an earlier table that this one has no values for goes."""
    folder = plan.folder
    storage.replace_file(folder / TABLE, csv_table(trials).encode())
    for name in (HEAT_MAP, PARALLEL, CURVES, BEST):
        (folder / name).unlink(missing_ok=True)
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


def _draw_curves(plan: Plan, trials: Sequence[Trial]) -> None:
    curves = {}
    for trial in trials:
        if found := validations(run_folder(plan.trial_config(trial.point))):
            curves[trial_name(trial.point)] = ([one.step for one in found], [one.val_bits_per_byte for one in found])
    if curves:
        draw_curves(curves, plan.folder / CURVES)


def best_config(plan: Plan, point: Point) -> str:
    """The full run of a point as YAML, as `train.py --config` takes it. It registers nothing by itself."""
    config = run_config(plan.sweep, point, name="", resume=False, force=False, register="")
    return yaml.safe_dump(saved_config(dataclasses.asdict(config)), sort_keys=False)
