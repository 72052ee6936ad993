"""Sweep learning rate and FF width: `python tune/sweep.py`.

In: a prepared data set, a base configuration and a grid. Every point of the grid is a real Ray Train run with a
shortened budget, a child of one MLflow run. Out: a table and a heat map of the results, and, unless `--no-final`, the
best point trained at the full budget and registered as the champion. A sweep that was interrupted goes on with
`--resume`: finished trials are kept, unfinished ones continue from their last checkpoint.
"""

if __name__ == "__main__":
    import sys
    from pathlib import Path

    sys.path[0] = str(Path(__file__).resolve().parents[1])  # the checkout, in place of this folder
    from slm_ray.cli.script import run

    run("tune.sweep")

import dataclasses
import datetime
import json
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
from slm_ray.config.files import DEFAULT_PRESET, flatten, load_config
from slm_ray.config.options import parse, take_option
from slm_ray.config.schema import TrainConfig
from slm_ray.dataset.manifest import load_manifest
from slm_ray.distributed import cluster
from slm_ray.distributed.cluster import default_workers
from slm_ray.distributed.driver import TrainResult, run_training
from slm_ray.errors import UserError
from slm_ray.locks import folder_lock
from slm_ray.locks.lease import LEASE
from slm_ray.runs.run_folder import RunFolder
from slm_ray.tracking import mlflow_runs, tracker
from slm_ray.train import describe
from slm_ray.training import hardware
from slm_ray.training.inputs import n_steps
from tune.config import MODEL_NAME, SweepConfig
from tune.results import METRIC, Trial, format_table, keep_results
from tune.trials import DRIVER_CPUS, finished_trial, has_ended, run_trials, trial_name

SWEPT = {"--optim.lr": "--lr", "--model.d-ff": "--d-ff"}
"""Options of a training that a sweep sets itself, and its own that take their place."""


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
        best = trials[0]
        print(format_table(trials))
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


def _resolve(sweep: SweepConfig) -> SweepConfig:
    load_manifest(sweep.data)  # raises before anything starts
    if storage.is_remote(sweep.output):
        raise UserError(f"output ({sweep.output}) must be a folder: a sweep does not go to an object store yet")
    if sweep.resume and not sweep.name:
        raise UserError("--resume needs the sweep's --name")
    register = _registered_name(sweep.register, mlflow_runs.resolve_uri(sweep.tracking_uri))
    cluster.connect(with_dashboard=True)  # which Train asks about lost trials
    for workers in (sweep.trial_workers, sweep.workers or default_workers(sweep)):
        sweep.check_batch(workers)
    for lr, d_ff in sweep.points:
        run_config(sweep, lr, d_ff)  # refuses what no trial could run with
    name = sweep.name or f"sweep-{datetime.datetime.now().astimezone():%Y%m%d-%H%M%S}-{uuid.uuid4().hex[:4]}"
    return dataclasses.replace(
        sweep,
        name=name,
        data=str(storage.storage_path(sweep.data)),
        output=str(storage.storage_path(sweep.output)),
        register=register,
    )


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
    record = folder / "sweep.json"
    shared, store = _shared(sweep), mlflow_runs.resolve_uri(sweep.tracking_uri)
    if record.exists():
        if not sweep.resume:
            raise UserError(f"{folder} holds a sweep already: add --resume to continue it, or take another --name")
        known = _read_record(record)
        changed = sorted(name for name in shared if shared[name] != known["shared"].get(name))
        if changed:
            raise UserError(f"{folder} was made with another {', '.join(changed)}: take another --name")
        if mlflow_runs.has_run(store, known["run_id"], sweep.experiment) or store == mlflow_runs.OFF:
            parent = mlflow_runs.continue_run(store, known["run_id"])
            parent.set_running()
            return parent
    elif any(path.name != LEASE for path in folder.iterdir()):
        raise UserError(f"{folder} is not empty and no folder of a sweep: take another --name or --output")
    grid = {"lr": list(sweep.lr), "d_ff": list(sweep.d_ff)}
    tags = {"data_fingerprint": shared["data_fingerprint"]}
    parent = mlflow_runs.start_run(store, sweep.experiment, sweep.name, flatten(shared) | grid, tags)
    content = {"run_id": parent.run_id, "shared": shared, "grid": grid}
    try:
        folder.mkdir(parents=True, exist_ok=True)
        storage.replace_file(record, (json.dumps(content, indent=2, sort_keys=True) + "\n").encode())
    except OSError as error:
        raise UserError(f"cannot write to {folder}: {error.strerror}") from error
    return parent


def _read_record(path: Path) -> dict[str, Any]:
    try:
        record: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{path} is corrupt ({error}): remove it and resume, or take another --name") from error
    return record


def _shared(sweep: SweepConfig) -> dict[str, Any]:
    """What makes two trials comparable: everything but the grid and how the sweep is run."""
    fields = ("seed", "batch_size", "epochs", "max_steps", "trial_steps", "precision")
    shared = {name: getattr(sweep, name) for name in fields}
    model = {name: value for name, value in dataclasses.asdict(sweep.model).items() if name != "d_ff"}
    optim = {name: value for name, value in dataclasses.asdict(sweep.optim).items() if name != "lr"}
    return shared | {"model": model, "optim": optim, "data_fingerprint": load_manifest(sweep.data).fingerprint}


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
        "cpus_per_worker": 1 - DRIVER_CPUS,
        "register": "",
    }
    configs = {}
    for lr, d_ff in sweep.points:
        configs[trial_name(lr, d_ff)] = run_config(sweep, lr, d_ff, name=trial_name(lr, d_ff), **changes)
    waiting = [name for name, config in configs.items() if finished_trial(config) is None]
    print(f"sweep {sweep.name}: {len(configs)} trials, {len(configs) - len(waiting)} finished before", flush=True)
    if waiting:
        store = mlflow_runs.resolve_uri(sweep.tracking_uri)
        run_trials({name: configs[name] for name in waiting}, at_once, folder, parent_run_id, store)
    done = [trial for config in configs.values() if (trial := finished_trial(config))]
    broken = sum(not has_ended(config) for config in configs.values())
    if broken:
        hint = f"`--resume --name {sweep.name}` tries them again"
        raise UserError(f"{broken} of {len(configs)} trials did not come to their end, see above: {hint}")
    if not done:
        raise UserError(f"the loss of all {len(configs)} trials ceased to be a number: sweep over lower --lr")
    return sorted(done, key=lambda trial: trial.metrics[METRIC])


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
    folder = RunFolder(Path(sweep.output) / sweep.name / name)
    config = run_config(
        sweep,
        best.lr,
        best.d_ff,
        output=str(folder.path.parent),
        name=name,
        resume=folder.latest_valid() is not None,
    )
    return run_training(config, parent_run_id=parent_run_id)


def parse_config(argv: Sequence[str] | None) -> SweepConfig:
    """Preset or file, then the options over it.

    Raises:
        UserError: no such preset or file.
    """
    origin, rest = take_option("config", DEFAULT_PRESET, sys.argv[1:] if argv is None else argv)
    about = f"{(__doc__ or '').splitlines()[0]} --config PRESET|FILE.yaml chooses the defaults ({DEFAULT_PRESET})."
    for word in rest:
        name = word.partition("=")[0].replace("_", "-")
        if name in SWEPT:
            raise UserError(f"{name} is what is swept: give {SWEPT[name]} its values")
    base = load_config(origin)
    own = {field.name: getattr(base, field.name) for field in dataclasses.fields(TrainConfig)}
    default = SweepConfig(**(own | {"register": base.register or MODEL_NAME}))
    return parse(SweepConfig, rest, prog="sweep.py", about=about, default=default)


@command
def main(argv: Sequence[str] | None = None) -> int:
    """Command line: parse, sweep, say what came out."""
    set_default_environment()
    logging.getLogger("ray.tune").setLevel(logging.ERROR)
    with ending_on_sigterm():
        _, final = run_sweep(parse_config(argv))
    if final is not None:
        print(describe(final))
    return 0
