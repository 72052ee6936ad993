"""The driver of a run: it checks all that a user can get wrong before any worker starts, then watches the run.

In: a `TrainConfig`. Out: `runs/NAME/`, an MLflow run, and a `TrainResult`. The sweep calls `run_training` for every
trial.
"""

import contextlib
import dataclasses
import logging
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from ray.train import UserCallback

from slm_ray.cli.signals import StoppedError
from slm_ray.config.schema import TrainConfig
from slm_ray.dataset.manifest import load_manifest
from slm_ray.distributed import cluster
from slm_ray.distributed.mlflow_run import LOSS_PLOT, close_mlflow_run, open_mlflow_run, reopen_mlflow_run
from slm_ray.distributed.progress import show_progress
from slm_ray.distributed.worker_process import Report
from slm_ray.distributed.workers import run_alone, run_workers
from slm_ray.errors import UserError, one_line
from slm_ray.locks.lease import LeaseLostError
from slm_ray.runs import run_lock
from slm_ray.runs.checkpoint import Checkpoint
from slm_ray.runs.history import plot_loss
from slm_ray.runs.outcome import RunStatus, RunSummary, has_summary, read_summary
from slm_ray.runs.ownership import refuse_foreign
from slm_ray.runs.run_folder import RunFolder
from slm_ray.runs.train_state import Evaluation
from slm_ray.storage import is_remote
from slm_ray.tracking import mlflow_runs, registration
from slm_ray.tracking.besides.tensorboard_tracker import require_tensorboard
from slm_ray.tracking.besides.wandb_tracker import require_wandb
from slm_ray.tracking.tracker import Tracker
from slm_ray.training.besides.teachers import check_teachers, refuse_others
from slm_ray.training.checkpointing import is_out_of_patience
from slm_ray.training.inputs import RunPlan, check_files, plan_run
from slm_ray.training.preflight import names_its_teachers, refuse_conflicts, resolve, with_its_origin
from slm_ray.training.profiling.recording import read_tables
from slm_ray.training.starting_point import StartingPoint, starting_point

LOGGER = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class TrainResult:
    """What a run ended with."""

    name: str
    best: Path
    latest: Path
    metrics: Evaluation  # of the best checkpoint
    run_id: str
    version: str  # of the registered model, empty where none was asked for
    tracking_uri: str
    kept_at: str  # the run's folder, or its address in an object store
    profile: str = ""  # its tables, where one was asked for


class PausedError(UserError):
    """The run left off where it was to; it is not at its end."""


def run_training(
    config: TrainConfig,
    *,
    parent_run_id: str = "",
    is_quiet: bool = False,
    callbacks: Sequence[UserCallback] = (),
    alone: Report | None = None,
    pause_at: int = 0,
    origin_sha256: str = "",
    teacher_sha256: Sequence[str] = (),
) -> TrainResult:
    """Train as the config says, through Ray Train. Returns where the result lies.

    With `pause_at`, it leaves off after the validation of that step; the next call goes on as if nothing had happened.
    `callbacks` are Ray Train's own, called with what each validation reports. With `alone`, which is called with the
    same, the run's one worker is this process of Ray's, without Ray Train, and nobody starts it again. `origin_sha256`
    is that of the weights that the run must begin with, or must have begun with, `teacher_sha256` those of its
    teachers; any, when not given.
    Starts a local Ray, or joins the cluster that RAY_ADDRESS names, unless Ray is already running in this process.

    Raises:
        UserError: the config, the data set or the run's folder does not allow it, or the loss diverged.
        PausedError: the run is at `pause_at`.
        StoppedError: a signal asked for it; the run can be resumed without the loss of a step.
    """
    if config.tensorboard:
        require_tensorboard()
    if config.wandb:
        require_wandb()
    config = resolve(config, cluster.default_workers)
    plan = dataclasses.replace(_plan(config), pause_at=pause_at)
    refuse_foreign(plan.folder.path)
    with run_lock.locked(plan.folder):
        plan.folder.fetch()
        latest = plan.folder.latest_valid()
        refuse_conflicts(plan, latest)
        plan = with_its_origin(plan, latest) if latest else plan
        _check_teachers(plan, latest, teacher_sha256)
        start = starting_point(plan) if latest is None and config.init_from else None
        _check_origin(plan, latest or start, origin_sha256)
        cluster.connect(cpus=cluster.least_cpus(config))
        cluster.check_resources(config)

        def work(run_id: str) -> None:
            if alone is None:
                run_workers(plan, run_id, callbacks)
            else:
                run_alone(plan, run_id, alone)

        return _run_locked(plan, latest or start, parent_run_id, is_quiet, work)


def _check_origin(plan: RunPlan, begin: Checkpoint | StartingPoint | None, wanted: str) -> None:
    """Raises: UserError when the run's first weights are not those of a sha256, where one is given."""
    origin = begin.state.origin if isinstance(begin, Checkpoint) else begin.origin if begin else None
    if not wanted or (origin and origin.weights_sha256 == wanted):
        return
    what = f"{plan.config.init_from} has" if isinstance(begin, StartingPoint) else f"{plan.folder.address} began with"
    raise UserError(f"{what} other weights than were asked for (sha256 {wanted[:12]})")


def _check_teachers(plan: RunPlan, latest: Checkpoint | None, wanted: Sequence[str]) -> None:
    """Raises: UserError as `check_teachers`, also where they are not those that the run, or a sweep, began with. A run
    that is at its end learns no more: its teachers need not be there, unless others are named now."""
    known = latest.state.teachers if latest else []
    if latest and names_its_teachers(plan.config, latest) and _is_finished(plan, latest):
        refuse_others(known, wanted, plan.config.teacher)
    else:
        check_teachers(plan.config, wanted, [one.weights_sha256 for one in known])


def _plan(config: TrainConfig) -> RunPlan:
    """The plan, once every file of the data set was found to be the one that its manifest lists."""
    manifest = load_manifest(config.data)
    plan = plan_run(config, manifest)
    check_files(config, manifest)
    return plan


def _run_locked(
    plan: RunPlan,
    begin: Checkpoint | StartingPoint | None,
    parent_run_id: str,
    is_quiet: bool,
    work: Callable[[str], None],
) -> TrainResult:
    """The run, once nobody else can write to its folder: from its latest checkpoint, from given weights, or anew."""
    latest = begin if isinstance(begin, Checkpoint) else None
    tracker = open_mlflow_run(plan, latest, parent_run_id)
    status = "FAILED"
    try:
        if isinstance(begin, StartingPoint):
            begin.write(tracker.run_id)
        if not _is_finished(plan, latest):
            with show_progress(plan.history, plan.max_steps, is_quiet=is_quiet), _place_of_a_stop(plan):
                work(tracker.run_id)
        tracker = reopen_mlflow_run(plan, latest, parent_run_id, tracker)
        result = _conclude(plan, tracker)
        status = "FINISHED"
        return result
    except PausedError:
        status = "FINISHED"
        raise
    except KeyboardInterrupt:
        status = "KILLED"
        raise
    except LeaseLostError:
        status = ""  # another driver goes on with it
        raise
    finally:
        close_mlflow_run(plan, tracker, status)


@contextlib.contextmanager
def _place_of_a_stop(plan: RunPlan) -> Iterator[None]:
    """Let a `StoppedError` name its step and how to resume, unless the run came to its end at the same time."""
    folder = plan.folder
    try:
        yield
    except StoppedError as stop:
        if has_summary(folder) and read_summary(folder).status != RunStatus.STOPPED:
            return
        try:
            latest = folder.latest_valid()
        except UserError as error:  # how the run ended counts, not what cannot be read of it
            raise StoppedError(f"{stop or 'stopped'}; {one_line(error)}", stop.signal_number) from error
        if latest is None:
            raise StoppedError(f"{stop or 'stopped'}; there is no checkpoint", stop.signal_number) from None
        how = f"{stop}; the last checkpoint is that of" if str(stop) else "stopped, with a checkpoint of"
        resume = f"`--resume --name {plan.config.name}` goes on from there"
        raise StoppedError(f"{how} step {latest.state.step:,}: {resume}", stop.signal_number) from None


def _is_finished(plan: RunPlan, latest: Checkpoint | None) -> bool:
    """Whether a resumed run has nothing left to do."""
    folder = plan.folder
    if latest is None or not has_summary(folder) or not folder.best.exists():
        return False
    summary, state = read_summary(folder), latest.state
    if summary.status != RunStatus.FINISHED:
        return False
    if not summary.step == state.step <= summary.max_steps == plan.max_steps:
        return False
    return state.step == plan.max_steps or is_out_of_patience(plan.config, state.n_stale_validations)


def _conclude(plan: RunPlan, tracker: Tracker) -> TrainResult:
    """Plot, tags, and the registry, once the workers are done. Raises: UserError when the run has no result."""
    config, folder = plan.config, plan.folder
    summary = read_summary(folder)
    if plan.pause_at and summary.status == RunStatus.STOPPED and summary.step == plan.pause_at:
        tracker.set_tags({"status": "paused"})
        raise PausedError(f"paused at step {summary.step:,}")
    if summary.status != RunStatus.FINISHED or summary.best is None:
        tracker.set_tags({"status": str(summary.status)})
        raise UserError(_unfinished(summary, folder))
    if summary.best.step not in plan.history.series("val_loss")[0]:  # to its end, or it had said so itself
        LOGGER.warning("%s misses lines, which the workers' disk did not take; no step is lost", plan.history.path)
    _keep_plot(plan, tracker)
    try:
        folder.push_record()
    except OSError as error:
        raise UserError(f"the run is finished and its record could not be copied: {error}") from error
    tracker.set_tags({"status": str(summary.status), "best_step": str(summary.best.step)})
    version, store = "", mlflow_runs.resolve_uri(config.tracking_uri)
    if config.register and store != mlflow_runs.OFF:
        if not tracker.run_id:
            raise UserError(
                f"{config.name} is trained and kept, and not registered: the MLflow server does not answer; "
                f"`--resume --name {config.name}` registers it"
            )
        version = registration.registered_version(store, config.register, folder.best, tracker.run_id)
        version = version or registration.register(store, config.register, folder.best, tracker.run_id)
    return TrainResult(
        name=config.name,
        best=folder.best,
        latest=folder.latest,
        metrics=summary.best,
        run_id=tracker.run_id,
        version=version,
        tracking_uri=store,
        kept_at=folder.address,
        profile=read_tables(folder.path) if config.profile else "",
    )


def _keep_plot(plan: RunPlan, tracker: Tracker) -> None:
    path = plan.folder.path / LOSS_PLOT
    try:
        plot_loss(plan.history, path)
    except Exception as error:  # whatever a plotting library raises, the model is trained
        LOGGER.warning("no %s: %s", path, error)
    else:
        tracker.log_file(path)


def _unfinished(summary: RunSummary, folder: RunFolder) -> str:
    kept = (
        f"the last checkpoint is {folder.latest.resolve()}" if folder.latest.exists() else "no checkpoint was written"
    )
    if summary.status == RunStatus.FINISHED:
        return (
            f"the run is at its last step, {summary.step:,}, without a validation on these stories: raise --max-steps"
        )
    if summary.status == RunStatus.DIVERGED:
        return f"{summary.reason} after step {summary.step:,}: lower --optim.lr; {kept}"
    if summary.status == RunStatus.STOPPED:
        return f"the run was asked to stop after step {summary.step:,}: --resume goes on from there; {kept}"
    need = "make room on the disk" + (", or let the store take files," if is_remote(folder.address) else "")
    return f"step {summary.step:,} could not be saved: {need} and --resume; {kept}"
