"""The driver of a run: it checks all that a user can get wrong before any worker starts, then watches the run.

In: a `TrainConfig`. Out: `runs/NAME/`, an MLflow run, and a `TrainResult`. The sweep calls `run_training` for every
trial.
"""

import contextlib
import dataclasses
import logging
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from ray.train import UserCallback

from slm_ray.cli.signals import StoppedError
from slm_ray.config.files import flatten
from slm_ray.config.schema import TrainConfig
from slm_ray.distributed import cluster
from slm_ray.distributed.cluster import check_resources, default_workers
from slm_ray.distributed.progress import watch
from slm_ray.distributed.workers import run_workers
from slm_ray.errors import UserError
from slm_ray.runs import checkpoint, outcome
from slm_ray.runs.history import History, plot_loss
from slm_ray.runs.run_folder import RunFolder
from slm_ray.tracking import mlflow_runs, registry
from slm_ray.tracking.tensorboard_tracker import require_tensorboard
from slm_ray.tracking.tracker import NullTracker, Tracker
from slm_ray.training import loop
from slm_ray.training.inputs import TrainInputs, load_inputs
from slm_ray.training.preflight import refuse_conflicts, resolve
from slm_ray.training.profiling import read_operators

LOGGER = logging.getLogger(__name__)


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
    task = load_inputs(config, NullTracker())
    refuse_conflicts(config, task)
    cluster.connect()
    check_resources(config)
    try:
        with task.folder.locked():
            refuse_conflicts(config, task)  # once more: another run of this name may have come and gone
            return _run_held(config, task, parent_run_id, is_quiet, callbacks)
    finally:
        with contextlib.suppress(OSError):  # not empty: there is something to keep
            task.folder.path.rmdir()


def _run_held(
    config: TrainConfig, task: TrainInputs, parent_run_id: str, is_quiet: bool, callbacks: Sequence[UserCallback]
) -> TrainResult:
    """The run, once nobody else can write to its folder."""
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


def _tracker(config: TrainConfig, task: TrainInputs, parent_run_id: str) -> Tracker:
    newest = task.folder.latest_valid()
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


@contextlib.contextmanager
def _saying_where_it_stopped(config: TrainConfig, folder: RunFolder) -> Iterator[None]:
    """Give a stop its place and how to go on, unless the run came to its end at the same time."""
    try:
        yield
    except StoppedError as stop:
        status = folder.read_summary()["status"] if folder.has_summary() else outcome.STOPPED
        if status != outcome.STOPPED:
            return
        newest = folder.latest_valid()
        if newest is None:
            raise StoppedError(f"{stop or 'stopped'}; there is no checkpoint", stop.signal_number) from None
        said = f"{stop}; the last checkpoint is that of" if str(stop) else "stopped, with a checkpoint of"
        message = (
            f"{said} step {checkpoint.load_state(newest).step:,}: `--resume --name {config.name}` goes on from there"
        )
        raise StoppedError(message, stop.signal_number) from None


def _is_finished(task: TrainInputs) -> bool:
    """Whether a resumed run has nothing left to do."""
    folder = task.folder
    newest = folder.latest_valid()
    if newest is None or not folder.has_summary() or not folder.best.exists():
        return False
    summary, state = folder.read_summary(), checkpoint.load_state(newest)
    if (
        summary["status"] != outcome.FINISHED
        or not summary["step"] == state.step <= summary["max_steps"] == task.max_steps
    ):
        return False
    return state.step == task.max_steps or loop.is_out_of_patience(task.config, state.n_stale_validations)


def _conclude(config: TrainConfig, folder: RunFolder, tracker: Tracker) -> TrainResult:
    """Plot, tags, and the registry, once the workers are done. Raises: UserError when the run has no result."""
    summary = folder.read_summary()
    if summary["status"] != outcome.FINISHED:
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
    if summary["status"] == outcome.DIVERGED:
        return f"{summary['reason']} after step {summary['step']:,}: lower --optim.lr; {kept}"
    if summary["status"] == outcome.STOPPED:
        return f"the run was asked to stop after step {summary['step']:,}: --resume goes on from there; {kept}"
    return f"step {summary['step']:,} could not be saved: make room on the disk and --resume; {kept}"
