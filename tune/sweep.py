"""Sweep learning rate and FF width: `python tune/sweep.py`.

In: a prepared data set, a base configuration and a grid. Every point of the grid is a real Ray Train run with a
shortened budget, a child of one MLflow run. Out: a table and a heat map of the results, and, unless `--no-final`, the
best point trained at the full budget and registered as the champion. With `--resume` a sweep begins or, where there is
one, goes on: finished trials are kept, unfinished ones continue from their last checkpoint.
"""

if __name__ == "__main__":
    import sys
    from pathlib import Path

    sys.path[0] = str(Path(__file__).resolve().parents[1])  # the checkout, in place of this folder
    from slm_ray.cli.script import run

    run("tune.sweep")

import dataclasses
import datetime
import logging
import signal
import sys
import uuid
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import ray

from slm_ray import storage
from slm_ray.cli.command import command
from slm_ray.cli.script import set_default_environment
from slm_ray.cli.signals import StoppedError, ending_on_sigterm
from slm_ray.config.files import DEFAULT_PRESET, flatten, from_dict, load_config
from slm_ray.config.options import parse, take_option
from slm_ray.config.resuming import asks_for_help, asks_to_resume, refuse_lone_force
from slm_ray.config.schema import TrainConfig
from slm_ray.dataset.manifest import load_manifest
from slm_ray.distributed import cluster
from slm_ray.distributed.cluster import default_workers
from slm_ray.distributed.driver import TrainResult, run_training
from slm_ray.errors import UserError
from slm_ray.evaluation.promotion import held_out_split, promote_on
from slm_ray.locks import folder_lock
from slm_ray.locks.lease import LEASE
from slm_ray.tracking import mlflow_runs, tracker
from slm_ray.tracking.tensorboard_tracker import require_tensorboard
from slm_ray.train import describe
from slm_ray.training import hardware
from slm_ray.training.inputs import check_files, check_length, n_steps
from slm_ray.training.preflight import resolve
from tune.config import MODEL_NAME, SweepConfig
from tune.record import config_to_resume, read_record, refuse_other_options, shared_options, write_record
from tune.results import METRIC, Trial, TrialStatus, format_table, keep_results, ranked
from tune.trials import DRIVER_CPUS, ended_trial, failed_trial, run_trials, trial_name

SWEPT = {"--optim.lr": "--lr", "--model.d-ff": "--d-ff"}
"""Options of a training that a sweep sets itself, and its own that take their place."""
FINAL_ONLY = ("workers", "register", "sample-prompt", "profile")
"""Options that trials have not."""


def run_config(sweep: SweepConfig, lr: float, d_ff: int, **changes: Any) -> TrainConfig:
    """The training run of one point: what the sweep's runs share, its rate and its width."""
    shared = {field.name: getattr(sweep, field.name) for field in dataclasses.fields(TrainConfig)}
    min_lr = None if sweep.optim.min_lr is None else min(sweep.optim.min_lr, lr)
    point = {
        "optim": dataclasses.replace(sweep.optim, lr=lr, min_lr=min_lr),
        "model": dataclasses.replace(sweep.model, d_ff=d_ff),
    }
    return TrainConfig(**(shared | point | changes))


def run_sweep(sweep: SweepConfig) -> tuple[list[Trial], TrainResult | None]:
    """Run the grid and the final training. Returns the trials, best first, and the final run where there was one.

    Raises:
        UserError: the sweep, the data set or the folder does not allow it, or every trial failed.
        StoppedError: a signal asked for it; the sweep can be resumed.
    """
    sweep = _resolve(sweep)
    folder = Path(sweep.output) / sweep.name
    refusal = f"another sweep.py is writing to {folder}: wait for its end, or take another --name"
    with folder_lock.locked(folder, refusal):
        return _run_locked(sweep, folder)


def _run_locked(sweep: SweepConfig, folder: Path) -> tuple[list[Trial], TrainResult | None]:
    """The sweep, once nobody else can write to its folder."""
    parent = _open(sweep, folder)
    status = "FAILED"
    try:
        trials = _run_trials(sweep, folder, parent.run_id)
        keep_results(trials, folder, parent)
        print(format_table(trials))
        best = trials[0]
        if best.status != TrialStatus.FINISHED:
            raise UserError(_no_result(trials, sweep.name))
        if failed := sum(trial.status == TrialStatus.FAILED for trial in trials):
            print(f"{failed} of {len(trials)} trials failed: `--resume --name {sweep.name}` tries them again")
        print(f"best: lr {best.lr:g}, d_ff {best.d_ff} with {best.metrics[METRIC]:.4f} bits per byte", flush=True)
        final = _train_final(sweep, best, parent.run_id) if sweep.final else None
        status = "FINISHED"
        return trials, final
    except KeyboardInterrupt as stop:
        status = "KILLED"
        number = stop.signal_number if isinstance(stop, StoppedError) else signal.SIGINT
        resume = f"stopped: `--resume --name {sweep.name}` goes on from the last checkpoint of each trial"
        raise StoppedError(resume, number) from None
    finally:
        parent.finish(status)


def _no_result(trials: Sequence[Trial], name: str) -> str:
    """Why there is no best trial: all diverged, or some failed."""
    diverged = sum(trial.status == TrialStatus.DIVERGED for trial in trials)
    if diverged == len(trials):
        return f"all {len(trials)} trials diverged ({trials[0].reason}): sweep over lower --lr"
    failed = f"{len(trials) - diverged} failed and {diverged} diverged"
    return f"no trial finished, {failed}, see above: `--resume --name {name}` tries those that failed again"


def _resolve(sweep: SweepConfig) -> SweepConfig:
    manifest = load_manifest(sweep.data)  # what a trial could not begin with is refused before anything starts
    check_length(sweep, manifest)
    check_files(sweep, manifest)
    if storage.is_remote(sweep.output):
        raise UserError(f"output ({sweep.output}) must be a folder: a sweep does not go to an object store yet")
    if sweep.tensorboard:
        require_tensorboard()
    register = _registered_name(sweep.register, mlflow_runs.resolve_uri(sweep.tracking_uri))
    for lr, d_ff in sweep.points:
        resolve(run_config(sweep, lr, d_ff, workers=sweep.trial_workers, register=""), default_workers)
    cluster.connect(with_dashboard=True)  # which Train asks about lost trials
    trial = run_config(
        sweep, *sweep.points[0], workers=sweep.trial_workers, cpus_per_worker=cpus_of_trial_worker(sweep)
    )
    cluster.check_resources(trial)
    if sweep.final:
        cluster.check_resources(resolve(run_config(sweep, *sweep.points[0], register=register), default_workers))
    name = sweep.name or f"sweep-{datetime.datetime.now().astimezone():%Y%m%d-%H%M%S}-{uuid.uuid4().hex[:4]}"
    return dataclasses.replace(
        sweep,
        name=name,
        data=str(storage.storage_path(sweep.data)),
        output=str(storage.storage_path(sweep.output)),
        register=register,
    )


def cpus_of_trial_worker(sweep: SweepConfig) -> float:
    """What a worker is given, less what its trial's driver takes."""
    return max(sweep.cpus_per_worker - DRIVER_CPUS, sweep.cpus_per_worker / 2)


def _registered_name(register: str, tracking_uri: str) -> str:
    """The name for the registry, if there is one: without a store the default name means none.

    Raises:
        UserError: a name of the user's own, and no store.
    """
    if tracking_uri != mlflow_runs.OFF:
        return register
    if register not in ("", MODEL_NAME):
        raise UserError(f"register ({register}) needs an MLflow store, and tracking_uri is {mlflow_runs.OFF}")
    return ""


def _open(sweep: SweepConfig, folder: Path) -> tracker.Tracker:
    """Begin a sweep's folder and MLflow run, or continue them."""
    shared, store = shared_options(sweep), mlflow_runs.resolve_uri(sweep.tracking_uri)
    known = read_record(folder)
    if known is not None:
        if not sweep.resume:
            raise UserError(f"{folder} holds a sweep already: add --resume to continue it, or take another --name")
        refuse_other_options(folder, known, shared)
        if mlflow_runs.has_run(store, known["run_id"], sweep.experiment) or store == mlflow_runs.OFF:
            parent = mlflow_runs.continue_run(store, known["run_id"])
            parent.set_running()
            write_record(folder, sweep, known["run_id"])  # its grid may have grown
            return parent
    elif any(path.name != LEASE for path in folder.iterdir()):
        raise UserError(f"{folder} is not empty and no folder of a sweep: take another --name or --output")
    grid = {"lr": list(sweep.lr), "d_ff": list(sweep.d_ff)}
    tags = {"data_fingerprint": shared["data_fingerprint"]}
    parent = mlflow_runs.start_run(store, sweep.experiment, sweep.name, flatten(shared) | grid, tags)
    write_record(folder, sweep, parent.run_id)
    return parent


def _run_trials(sweep: SweepConfig, folder: Path, parent_run_id: str) -> list[Trial]:
    """Every point of the grid through Ray Tune, best first."""
    at_once = _concurrent_trials(sweep)
    threads = sweep.threads or max(1, hardware.cpu_count() // (min(at_once, len(sweep.points)) * sweep.trial_workers))
    steps = _trial_steps(sweep)
    changes = {
        "output": str(folder / "trials"),
        "workers": sweep.trial_workers,
        "max_steps": steps,
        "eval_interval_steps": sweep.eval_interval_steps or -(-steps // 3),
        "sample_prompt": "",
        "profile": False,
        "threads": threads,
        "cpus_per_worker": cpus_of_trial_worker(sweep),
        "register": "",
    }
    configs = {}
    for lr, d_ff in sweep.points:
        configs[trial_name(lr, d_ff)] = run_config(sweep, lr, d_ff, name=trial_name(lr, d_ff), **changes)
    waiting = {name: config for name, config in configs.items() if ended_trial(config) is None}
    print(f"sweep {sweep.name}: {len(configs)} trials, {len(configs) - len(waiting)} finished before", flush=True)
    failures: dict[str, str] = {}
    if waiting:
        store = mlflow_runs.resolve_uri(sweep.tracking_uri)
        failures = run_trials(waiting, at_once, folder, parent_run_id, store)
    ended = {name: ended_trial(config) for name, config in configs.items()}
    trials = [
        trial or failed_trial(configs[name], failures[name])
        for name, trial in ended.items()
        if trial or name in failures
    ]
    if interrupted := len(configs) - len(trials):
        hint = f"`--resume --name {sweep.name}` goes on with them"
        raise UserError(f"{interrupted} of {len(configs)} trials did not come to their end: {hint}")
    return ranked(trials)


def _point(config: TrainConfig) -> tuple[float, int]:
    return config.optim.lr, config.model.d_ff


def _trial_steps(sweep: SweepConfig) -> int:
    return sweep.trial_steps or max(1, min(200, n_steps(sweep, load_manifest(sweep.data)) // 5))


def _concurrent_trials(sweep: SweepConfig) -> int:
    resources = ray.cluster_resources()
    room = resources.get("GPU", 0) or resources.get("CPU", 1)
    return max(1, int(room) // sweep.trial_workers)


def _train_final(sweep: SweepConfig, best: Trial, parent_run_id: str) -> TrainResult:
    """The best point at the full budget, registered; one that is finished and registered already is left as it is.

    The folder is named by the point: a resumed sweep may find another one to be the best.
    """
    name = f"final-{trial_name(best.lr, best.d_ff)}"
    folder = Path(sweep.output) / sweep.name
    config = run_config(sweep, best.lr, best.d_ff, output=str(folder), name=name, resume=True)
    return run_training(config, parent_run_id=parent_run_id)


def parse_config(argv: Sequence[str] | None) -> SweepConfig:
    """Preset or file, then the options over it; with --resume, where there is a sweep, both over the sweep's own.

    Raises:
        UserError: no such preset or file, or it cannot be known whether there is a sweep.
    """
    origin, rest = take_option("config", "", sys.argv[1:] if argv is None else argv)
    about = f"{(__doc__ or '').splitlines()[0]} --config PRESET|FILE.yaml chooses the defaults ({DEFAULT_PRESET})."
    names = {word.partition("=")[0].replace("_", "-") for word in rest}
    if set_twice := names & SWEPT.keys():
        raise UserError(f"{min(set_twice)} is what is swept: give {SWEPT[min(set_twice)]} its values")
    preset = load_config(origin or DEFAULT_PRESET)
    own = {field.name: getattr(preset, field.name) for field in dataclasses.fields(TrainConfig)}
    base = SweepConfig(**(own | {"register": preset.register or MODEL_NAME}))
    if asks_to_resume(rest, base.resume) and not asks_for_help(rest):
        place = {name: take_option(name, getattr(base, name), rest)[0] for name in ("output", "name")}
        from_dict(TrainConfig, place, "options")  # the others are checked over the sweep's own config
        base = config_to_resume(base, origin, **place)
    sweep = parse(SweepConfig, rest, prog="sweep.py", about=about, default=base)
    refuse_lone_force(sweep)
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
        print(describe(final), flush=True)
        if final.version:
            reference = f"models:/{config.register}/{final.version}"
            print(f"model    {promote_on(reference, config.data, held_out_split(config.data), final.tracking_uri)}")
    return 0
