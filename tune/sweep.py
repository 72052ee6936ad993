"""Sweep learning rate, FF width or any other field of the config: `python tune/sweep.py`.

In: a prepared data set, a base configuration and what is varied. Every point is a real Ray Train run with a shortened
budget, a child of one MLflow run. Out: a table and pictures of the results, and, unless `--no-final`, the best point
trained at the full budget and registered as the champion. With `--resume` a sweep begins or, where there is one, goes
on: finished trials are kept, unfinished ones continue from their last checkpoint.
"""

if __name__ == "__main__":
    import sys
    from pathlib import Path

    sys.path[0] = str(Path(__file__).resolve().parents[1])  # the checkout, in place of this folder
    from slm_ray.cli.script import run

    run("tune.sweep")

import dataclasses
import logging
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

from slm_ray import storage
from slm_ray.cli.command import command
from slm_ray.cli.script import set_default_environment
from slm_ray.cli.signals import StoppedError, ending_on_sigterm
from slm_ray.config.files import DEFAULT_PRESET, from_dict, load_config
from slm_ray.config.options import parse, take_option
from slm_ray.config.resuming import asks_for_help, asks_to_resume, refuse_lone_force
from slm_ray.config.schema import TrainConfig
from slm_ray.distributed.driver import TrainResult, run_training
from slm_ray.errors import UserError, one_line
from slm_ray.evaluation.promotion import held_out_split, promote_on
from slm_ray.locks.lease import LEASE
from slm_ray.runs import run_lock
from slm_ray.storage import StoragePath
from slm_ray.tracking import mlflow_runs
from slm_ray.train import describe as describe_run
from slm_ray.training.starting_point import begun_from
from tune.config import MODEL_NAME, SweepConfig, run_config
from tune.mlflow_sweep import open_sweep, recorded_batches, send_what_lacks
from tune.origin import hold_origin
from tune.planning import Plan, check_cluster, fields_set_twice, plan_sweep
from tune.record import (
    config_to_resume,
    read_record,
    refuse_other_options,
    shared_options,
    space_to_sweep,
    write_record,
)
from tune.report import keep_results
from tune.results import METRIC, Trial, TrialStatus, describe, format_table, ranked, trial_name
from tune.rounds import Rounds, run_rounds
from tune.space import Point
from tune.trials import TrialRunner
from tune.view import shown

FINAL_ONLY = ("workers", "register", "sample-prompt", "profile")
"""Options that trials have not."""


def run_sweep(sweep: SweepConfig) -> tuple[list[Trial], TrainResult | None]:
    """Run the trials and the final training. Returns the trials, best first, and the final run where there was one.

    Raises:
        UserError: the sweep, the data set or the folder does not allow it, or every trial failed.
        StoppedError: a signal asked for it; the sweep can be resumed.
    """
    plan = plan_sweep(sweep)
    with run_lock.locked(plan.run_folder, "sweep.py"):
        return _run_locked(plan)


def _run_locked(plan: Plan) -> tuple[list[Trial], TrainResult | None]:
    """The sweep, once nobody else can write to its folder."""
    _refuse_conflicts(plan)
    check_cluster(plan)
    name = plan.sweep.name
    parent = open_sweep(plan)
    status = "FAILED"
    try:
        hold_origin(plan.folder, plan.sweep.init_from)
        trials = _run_trials(plan, parent.run_id)
        parent, trials = send_what_lacks(plan, parent, trials)
        keep_results(plan, trials, parent)
        print(format_table(trials))
        best = trials[0]
        if best.status != TrialStatus.FINISHED:
            raise UserError(_no_result(trials, name))
        if failed := sum(trial.status == TrialStatus.FAILED for trial in trials):
            print(f"{failed} of {len(trials)} trials failed: `--resume --name {name}` tries them again")
        print(f"best: {describe(best.point)} with {best.metrics[METRIC]:.4f} bits per byte", flush=True)
        final = _train_final(plan, best.point, parent.run_id) if plan.sweep.final else None
        status = "FINISHED"
        return trials, final
    except KeyboardInterrupt as stop:
        status = "KILLED"
        number = stop.signal_number if isinstance(stop, StoppedError) else signal.SIGINT
        resume = f"stopped: `--resume --name {name}` goes on from the last checkpoint of each trial"
        raise StoppedError(resume, number) from None
    finally:
        parent.finish(status)


def _no_result(trials: Sequence[Trial], name: str) -> str:
    """Why there is no best trial: all diverged, or some failed."""
    counts = {status: sum(trial.status == status for trial in trials) for status in TrialStatus}
    if counts[TrialStatus.DIVERGED] == len(trials):
        return f"all {len(trials)} trials diverged ({trials[0].reason}): sweep over lower --lr"
    said = f"{counts[TrialStatus.FAILED]} failed and {counts[TrialStatus.DIVERGED]} diverged"
    said += f", {counts[TrialStatus.STOPPED]} stopped early" if counts[TrialStatus.STOPPED] else ""
    return f"no trial finished, {said}, see above: `--resume --name {name}` tries those that failed again"


def _refuse_conflicts(plan: Plan) -> None:
    """Raises: UserError when the folder holds another sweep, or anything else."""
    folder = plan.folder
    known = read_record(folder)
    if known is None:
        if _is_in_use(folder):
            raise UserError(f"{folder} is not empty and no folder of a sweep: take another --name or --output")
        return
    if not plan.sweep.resume:
        raise UserError(f"{folder} holds a sweep already: add --resume to continue it, or take another --name")
    refuse_other_options(folder, known, shared_options(plan.sweep, plan.space, plan.origin_sha256))


def _is_in_use(folder: StoragePath) -> bool:
    """Whether anything lies there. Raises: UserError when that cannot be known."""
    if storage.is_local(folder):
        return any(path.name != LEASE for path in folder.iterdir())
    try:
        return any(LEASE not in path.parts for path in storage.files_below(folder))
    except Exception as error:  # each store has errors of its own
        raise UserError(f"{folder} cannot be listed: {one_line(error)}") from error


def _run_trials(plan: Plan, parent_run_id: str) -> list[Trial]:
    """Every point through Ray Tune, best first."""
    sweep, folder = plan.sweep, plan.folder
    at_once = plan.concurrent_trials()
    threads = plan.threads(at_once)
    with shown(plan.n_trials) as view:
        runner = TrialRunner(
            folder=plan.run_folder,
            at_once=at_once,
            parent_run_id=parent_run_id,
            origin_sha256=plan.origin_sha256,
            tracking_uri=mlflow_runs.resolve_uri(sweep.tracking_uri),
            view=view,
        )
        rungs = f" in rungs of {', '.join(f'{step:,}' for step in plan.rungs)} steps" if plan.rungs[:-1] else ""
        view.said(f"sweep {sweep.name}: {plan.n_trials} trials{rungs}, {at_once} at once")
        rounds = Rounds(
            searcher=plan.searcher,
            rungs=plan.rungs,
            factor=sweep.reduction_factor,
            retries=sweep.trial_retries,
            trial_config=lambda point: plan.trial_config(point, threads),
            run=runner.run,
            recorded=recorded_batches(plan),
            record=lambda batches: write_record(folder, sweep, parent_run_id, plan.space, plan.origin_sha256, batches),
            view=view,
        )
        return ranked(run_rounds(rounds))


def _train_final(plan: Plan, point: Point, parent_run_id: str) -> TrainResult:
    """The best point at the full budget, registered; one that is finished and registered already is left as it is.

    The folder is named by the point: a resumed sweep may find another one to be the best.
    """
    name = f"final-{trial_name(point)}"
    config = run_config(plan.sweep, point, output=str(plan.folder), name=name, resume=True, init_from=plan.init_from)
    return run_training(config, parent_run_id=parent_run_id, origin_sha256=plan.origin_sha256)


def parse_config(argv: Sequence[str] | None) -> SweepConfig:
    """Preset or file, then the options over it; with --resume, where there is a sweep, both over the sweep's own.

    Raises:
        UserError: no such preset or file, or it cannot be known whether there is a sweep.
    """
    origin, rest = take_option("config", "", sys.argv[1:] if argv is None else argv)
    about = f"{(__doc__ or '').splitlines()[0]} --config PRESET|FILE.yaml chooses the defaults ({DEFAULT_PRESET})."
    names = {word.partition("=")[0].replace("_", "-") for word in rest}
    preset = load_config(origin or DEFAULT_PRESET)
    own = {field.name: getattr(preset, field.name) for field in dataclasses.fields(TrainConfig)}
    base, record = SweepConfig(**(own | {"register": preset.register or MODEL_NAME})), None
    if asks_to_resume(rest, base.resume) and not asks_for_help(rest):
        place = {name: take_option(name, getattr(base, name), rest)[0] for name in ("output", "name")}
        from_dict(TrainConfig, place, "options")  # the others are checked over the sweep's own config
        base = config_to_resume(base, origin, **place)
        where = storage.storage_path(base.output)
        record = read_record(where / base.name) if base.name else None
    if record is None and not asks_for_help(rest):
        base = begun_from(base, origin, rest)
    sweep = parse(SweepConfig, rest, prog="sweep.py", about=about, default=base)
    refuse_lone_force(sweep)
    if set_twice := fields_set_twice(names, space_to_sweep(sweep, record), is_short=not sweep.space):
        raise UserError(set_twice)
    if not sweep.final and (ignored := names & {f"--{name}" for name in FINAL_ONLY}):
        raise UserError(f"{min(ignored)} is of the final training, which --no-final leaves out")
    return sweep


@command
def main(argv: Sequence[str] | None = None) -> int:
    """Command line: parse, sweep, say what came out."""
    set_default_environment()
    logging.getLogger("ray.tune").setLevel(logging.CRITICAL)  # a trial's traceback goes to its log
    config = parse_config(argv)
    with ending_on_sigterm():
        _, final = run_sweep(config)
    if final is not None:
        print(describe_run(final), flush=True)
        if final.version:
            reference = f"models:/{config.register}/{final.version}"
            print(f"model    {promote_on(reference, config.data, held_out_split(config.data), final.tracking_uri)}")
    return 0
