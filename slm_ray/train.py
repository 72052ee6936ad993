"""Train a model: `python slm_ray/train.py`, alone or through `ray job submit`.

In: a `TrainConfig` from preset and command line, and a prepared data set. Out: `runs/NAME/` with the checkpoints `best`
and `latest`, an MLflow run, and a summary on the terminal. `run_training` is the whole of it as a function; the sweep
calls it for every trial. The driver checks everything a user can get wrong before any worker starts, then watches the
run's own record for progress; the workers of `worker_group` run `loop.fit`.
"""

if __name__ == "__main__":
    from slm_ray.cli.script import run

    run("slm_ray.train")

import contextlib
import dataclasses
import logging
import math
import signal
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import ray
import yaml
from ray.train import UserCallback

from slm_ray.cli.command import command
from slm_ray.cli.script import quiet_environment
from slm_ray.cli.signals import StoppedError, ending_on_sigterm
from slm_ray.config.schema import TrainConfig
from slm_ray.distributed import cluster
from slm_ray.distributed.progress import watch
from slm_ray.distributed.workers import run_workers
from slm_ray.errors import UserError
from slm_ray.runs import checkpoint
from slm_ray.runs.history import History, plot_loss
from slm_ray.runs.run_folder import RunFolder
from slm_ray.tracking import mlflow_runs, registry
from slm_ray.tracking.mlflow_runs import Tracker
from slm_ray.tracking.tensorboard_tracker import require_tensorboard
from slm_ray.training import loop
from slm_ray.training.inputs import Task
from slm_ray.training.preflight import load_task, parse_config, refuse_conflicts, resolve
from slm_ray.training.profiling import read_operators

LOGGER = logging.getLogger(__name__)
MAX_CPU_WORKERS = 2


@dataclasses.dataclass(frozen=True)
class TrainResult:
    """What a run ended with."""

    name: str
    best: Path
    latest: Path
    metrics: dict[str, float]  # of the best checkpoint: val_loss, val_perplexity, val_bits_per_byte, step
    run_id: str
    version: str  # of the registered model, empty where none was asked for
    tracking_uri: str
    kept_at: str  # the run's folder, or its address in an object store
    operators: str = ""  # the profile's table, where one was asked for


def run_training(
    config: TrainConfig, *, parent_run_id: str = "", is_quiet: bool = False, callbacks: Sequence[UserCallback] = ()
) -> TrainResult:
    """Train as the config says, through Ray Train, and give where the result lies.

    `callbacks` are Ray Train's own, called with what each validation reports.
    Starts a local Ray, or joins the cluster that RAY_ADDRESS names, unless Ray is already running in this process.

    Raises:
        UserError: the config, the data set or the run's folder does not allow it, or the loss diverged.
        StoppedError: a signal asked for it; the run can be resumed without the loss of a step.
    """
    if config.tensorboard:
        require_tensorboard()
    config = resolve(config, default_workers)
    task = load_task(config, mlflow_runs.NullTracker())
    refuse_conflicts(config, task)
    cluster.connect()
    _check_resources(config)
    try:
        with task.folder.held():
            refuse_conflicts(config, task)  # once more: another run of this name may have come and gone
            return _run_held(config, task, parent_run_id, is_quiet, callbacks)
    finally:
        with contextlib.suppress(OSError):  # not empty: there is something to keep
            task.folder.path.rmdir()


def _run_held(
    config: TrainConfig, task: Task, parent_run_id: str, is_quiet: bool, callbacks: Sequence[UserCallback]
) -> TrainResult:
    """The run, once nobody else can be at work on its folder."""
    folder = task.folder
    tracker = _tracker(config, task, parent_run_id)
    status = "FAILED"
    try:
        if not _is_finished(task):
            with watch(task.history, task.max_steps, is_quiet=is_quiet), _saying_where_it_stopped(config, folder):
                run_workers(config, task, tracker.run_id, callbacks)
        result = _conclude(config, folder, tracker)
        status = "FINISHED"
        return result
    except KeyboardInterrupt:
        status = "KILLED"
        raise
    finally:
        tracker.finish(status)


def _check_resources(config: TrainConfig) -> None:
    """On a single node, more workers than it has CPUs would wait for ever; a cluster of several may still grow.

    Raises:
        UserError: too many workers, or some would get a GPU and others none.
    """
    resources = ray.cluster_resources()
    cpus, gpus = resources.get("CPU", 0), resources.get("GPU", 0)
    fewest, _ = config.worker_range
    if config.precision == "fp16" and not gpus:
        raise UserError("precision fp16 needs a GPU, and there is none: take bf16 or fp32, or leave it to auto")
    if 0 < gpus < fewest:
        raise UserError(f"{config.workers} workers and {gpus:g} GPU(s): give --workers {int(gpus) or 1}, one each")
    wanted = fewest * config.cpus_per_worker
    if len(ray.nodes()) == 1 and wanted > cpus:
        raise UserError(f"{config.workers} workers need {wanted:g} CPUs and this machine has {cpus:g}: lower --workers")


def default_workers() -> int:
    """Every GPU of the cluster or, without one, up to two CPU workers."""
    cluster.connect()
    resources = ray.cluster_resources()
    return int(resources.get("GPU", 0)) or max(1, min(MAX_CPU_WORKERS, int(resources.get("CPU", 1))))


def _tracker(config: TrainConfig, task: Task, parent_run_id: str) -> Tracker:
    newest = task.folder.newest_whole()
    run_id = checkpoint.load_state(newest).run_id if newest is not None else ""
    if mlflow_runs.has_run(config.tracking_uri, run_id):
        tracker = mlflow_runs.continue_run(config.tracking_uri, run_id)
        tracker.set_running()
        return tracker
    tags = {"data_fingerprint": task.data_fingerprint, "slm_ray.folder": str(task.folder.path)}
    params = flatten(dataclasses.asdict(config)) | {"resolved_max_steps": task.max_steps}
    tracker = mlflow_runs.start_run(config.tracking_uri, config.experiment, config.name, params, tags, parent_run_id)
    tracker.log_text(yaml.safe_dump(dataclasses.asdict(config), sort_keys=False), "config.yaml")  # for --config
    return tracker


def flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested fields by their dotted names: `{"model": {"d_ff": 512}}` -> `{"model.d_ff": 512}`."""
    flat: dict[str, Any] = {}
    for name, value in values.items():
        flat |= flatten(value, f"{prefix}{name}.") if isinstance(value, Mapping) else {f"{prefix}{name}": value}
    return flat


@contextlib.contextmanager
def _saying_where_it_stopped(config: TrainConfig, folder: RunFolder) -> Iterator[None]:
    """Give a stop its place and how to go on, unless the run came to its end at the same time."""
    try:
        yield
    except StoppedError as stop:
        status = folder.read_summary()["status"] if folder.has_summary() else loop.STOPPED
        if status != loop.STOPPED:
            return
        newest = folder.newest_whole()
        if newest is None:
            raise StoppedError(f"{stop or 'stopped'}; there is no checkpoint", stop.signal_number) from None
        said = f"{stop}; the last checkpoint is that of" if str(stop) else "stopped, with a checkpoint of"
        message = (
            f"{said} step {checkpoint.load_state(newest).step:,}: `--resume --name {config.name}` goes on from there"
        )
        raise StoppedError(message, stop.signal_number) from None


def _is_finished(task: Task) -> bool:
    """Whether a resumed run has nothing left to do."""
    folder = task.folder
    newest = folder.newest_whole()
    if newest is None or not folder.has_summary() or not folder.best.exists():
        return False
    summary, state = folder.read_summary(), checkpoint.load_state(newest)
    if (
        summary["status"] != loop.FINISHED
        or not summary["step"] == state.step <= summary["max_steps"] == task.max_steps
    ):
        return False
    return state.step == task.max_steps or loop.is_out_of_patience(task.config, state.n_unimproved)


def _conclude(config: TrainConfig, folder: RunFolder, tracker: Tracker) -> TrainResult:
    """Plot, tags, and the registry, once the workers are done. Raises: UserError when the run has no result."""
    summary = folder.read_summary()
    if summary["status"] != loop.FINISHED:
        raise UserError(_unfinished(summary, folder))
    _keep_plot(folder, tracker)
    try:
        folder.push_record()
    except OSError as error:
        raise UserError(f"the run is finished and its record could not be copied: {error}") from error
    tracker.set_tags({"status": str(summary["status"]), "best_step": str(int(summary["best"]["step"]))})
    version = ""
    if config.register and config.tracking_uri != mlflow_runs.OFF:
        version = registry.registered_version(config.tracking_uri, config.register, folder.best, tracker.run_id)
        version = version or registry.register(config.tracking_uri, config.register, folder.best, tracker.run_id)
    return TrainResult(
        name=config.name,
        best=folder.best,
        latest=folder.latest,
        metrics=dict(summary["best"]),
        run_id=tracker.run_id,
        version=version,
        tracking_uri=config.tracking_uri,
        kept_at=folder.address,
        operators=read_operators(folder.path) if config.profile else "",
    )


def _keep_plot(folder: RunFolder, tracker: Tracker) -> None:
    path = folder.path / "loss.png"
    try:
        plot_loss(History(folder.path / "metrics.jsonl"), path)
    except Exception as error:  # whatever a plotting library raises, the model is trained
        LOGGER.warning("no %s: %s", path, error)
    else:
        tracker.log_file(path)


def _unfinished(summary: Mapping[str, Any], folder: RunFolder) -> str:
    kept = (
        f"the last checkpoint is {folder.latest.resolve()}" if folder.latest.exists() else "no checkpoint was written"
    )
    if summary["status"] == loop.DIVERGED:
        return f"{summary['reason']} after step {summary['step']:,}: lower --optim.lr; {kept}"
    if summary["status"] == loop.STOPPED:
        return f"the run was asked to stop after step {summary['step']:,}: --resume goes on from there; {kept}"
    return f"step {summary['step']:,} could not be saved: make room on the disk and --resume; {kept}"


@command
def main(argv: Sequence[str] | None = None) -> int:
    """Command line: parse, train, say what came out."""
    quiet_environment()
    try:
        with ending_on_sigterm():
            result = run_training(parse_config(argv))
    except StoppedError as stop:
        sys.stderr.write(f"{stop}\n")
        if stop.signal_number == signal.SIGINT:
            raise  # said as every command says it
        return stop.exit_code
    print(describe(result))
    return 0


def describe(result: TrainResult) -> str:
    """The last lines of a run: where its checkpoints lie, and how good the best is."""
    metrics = result.metrics
    lines = [
        f"best     {result.best}  (step {int(metrics['step']):,})",
        f"latest   {result.latest}",
        f"loss     {metrics['val_loss']:.4f} nats per token, {metrics['val_bits_per_byte']:.4f} bits per byte, "
        f"perplexity {math.exp(metrics['val_loss']):.2f} on the validation split",
    ]
    if "://" in result.kept_at:
        lines.insert(0, f"kept     {result.kept_at}  (best and latest below are copies of it)")
    if result.run_id:
        lines.append(f"run      {result.run_id}  (to see it: {mlflow_runs.ui_command(result.tracking_uri)})")
    if result.version:
        lines.append(f"model    version {result.version} is the champion now")
    if result.operators:
        lines += [
            "profile  time of a step by operator, without the operators that it calls:",
            result.operators.rstrip(),
        ]
    return "\n".join(lines)
