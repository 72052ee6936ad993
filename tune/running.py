"""A sweep from its first trial to its final training, in its folder.

In: a `SweepConfig`. Out: what became of its trials, their table and pictures, and the run of the best point.
"""

import signal
from collections.abc import Sequence
from typing import Any

from slm_ray import storage
from slm_ray.cli.signals import StoppedError
from slm_ray.distributed.driver import TrainResult, run_training
from slm_ray.errors import UserError, one_line
from slm_ray.locks.lease import LEASE
from slm_ray.runs import run_lock
from slm_ray.storage import StoragePath
from slm_ray.tracking import mlflow_runs
from tune.config import SweepConfig, run_config
from tune.mlflow_sweep import open_sweep, recorded_batches, send_what_lacks
from tune.origin import hold_origin, hold_teachers
from tune.planning import Plan, check_cluster, plan_sweep
from tune.record import read_record, refuse_other_options, shared_options, write_record
from tune.results import METRIC, Trial, TrialStatus, describe, format_table, ranked, trial_name
from tune.rounds import Rounds, run_rounds
from tune.shown.report import keep_results
from tune.shown.view import shown
from tune.space import Point
from tune.trials import TrialRunner


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
        hold_teachers(plan.folder, plan.sweep.teacher)
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
    now = shared_options(plan.sweep, plan.space, plan.origin_sha256, plan.teacher_sha256)
    refuse_other_options(folder, known, now, plan.sweep.data)


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
            teacher_sha256=plan.teacher_sha256,
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
            record=lambda batches: write_record(
                folder, sweep, parent_run_id, plan.space, plan.origin_sha256, batches, plan.teacher_sha256
            ),
            view=view,
        )
        return ranked(run_rounds(rounds))


def _train_final(plan: Plan, point: Point, parent_run_id: str) -> TrainResult:
    """The best point at the full budget, registered; one that is finished and registered already is left as it is.

    The folder is named by the point: a resumed sweep may find another one to be the best.
    """
    name = f"final-{trial_name(point)}"
    own: dict[str, Any] = {"output": str(plan.folder), "name": name, "resume": True}
    config = run_config(plan.sweep, point, **own, init_from=plan.init_from, teacher=plan.teacher)
    pinned: dict[str, Any] = {"origin_sha256": plan.origin_sha256, "teacher_sha256": plan.teacher_sha256}
    return run_training(config, parent_run_id=parent_run_id, **pinned)
