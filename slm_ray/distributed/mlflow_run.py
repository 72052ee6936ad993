"""The MLflow run of a training, as its driver opens and closes it.

In: a plan, and the checkpoint that it goes on from. Out: a run with its parameters, data set, environment and every
config that it had; the workers log to it.
"""

import contextlib
import dataclasses
import logging

import yaml

from slm_ray import storage
from slm_ray.config.files import flatten
from slm_ray.config.mixtures import mixtures_text
from slm_ray.config.places import typed_config
from slm_ray.config.schema import TrainConfig
from slm_ray.dataset.manifest import home_of, load_manifest
from slm_ray.errors import UserError
from slm_ray.runs import run_lock
from slm_ray.runs.checkpoint import Checkpoint
from slm_ray.runs.code_version import code_version
from slm_ray.runs.outcome import RunStatus, has_summary, read_summary
from slm_ray.runs.remote_identity import MLFLOW_ID
from slm_ray.tracking import mlflow_runs, registration, run_inputs
from slm_ray.tracking.attempts import end_lost_attempts
from slm_ray.tracking.mlflow_runs import KIND
from slm_ray.tracking.store_faults import StoreAwayError
from slm_ray.tracking.tracker import NullTracker, Tracker
from slm_ray.training.inputs import RunPlan, plan_run
from slm_ray.training.preflight import resolve

LOGGER = logging.getLogger(__name__)
LOSS_PLOT = "loss.png"
"""The run's curve, in its folder."""


def open_mlflow_run(plan: RunPlan, latest: Checkpoint | None, parent_run_id: str) -> Tracker:
    """The run's MLflow run, begun or continued. It keeps each config that the run had, as it was typed.

    A server that is away stops no run: the record in the run's folder is sent at its end (`reopen_mlflow_run`), or by
    the next `--resume`.

    Raises:
        UserError: the store cannot be used.
    """
    config, fingerprint, run_id = plan.config, plan.data_fingerprint, _recorded_run_id(plan, latest)
    store, typed = mlflow_runs.resolve_uri(config.tracking_uri), typed_config(dataclasses.asdict(config))
    lineage = latest.state.lineage_with(fingerprint) if latest else [(fingerprint, 0)]
    tags = {"data_fingerprint": fingerprint, "data_lineage": registration.lineage_text(lineage)}
    if mixtures := (latest.state.mixtures if latest else {}) | plan.mixture_shares:
        tags["data_mixtures"] = mixtures_text(mixtures)
    tags |= code.tags if (code := code_version()) else {}
    text = yaml.safe_dump(typed, sort_keys=False)  # for --config
    if _is_known(store, run_id, config.experiment):
        tracker = mlflow_runs.continue_run(store, run_id, record=plan.history)
        tracker.set_running()
        tracker.set_tags(tags)
        tracker.log_text(text, f"config-from-step-{latest.state.step if latest else 0:08d}.yaml")
        if latest and latest.state.data_fingerprint != fingerprint:
            _log_data_set(plan, store, run_id)
        return tracker
    tags["slm_ray.folder"] = plan.folder.mirror.address or f"{typed['output']}/{config.name}"
    tags |= {KIND: "training"} | run_inputs.environment()
    params = flatten(typed) | {"resolved_max_steps": plan.max_steps}
    try:
        tracker = mlflow_runs.start_run(
            store, config.experiment, config.name, params, tags, parent_run_id, plan.history
        )
    except StoreAwayError as error:
        later = "what it records is kept in its folder, and sent at its end or by --resume"
        LOGGER.warning("%s goes on without MLflow, %s: %s", config.name, later, error)
        return NullTracker()
    _keep_run_id(plan, tracker.run_id)
    tracker.log_text(text, "config.yaml")
    _log_data_set(plan, store, tracker.run_id)
    if not parent_run_id:
        run_inputs.log_report(store, tracker.run_id, home_of(config.data))
    return tracker


def reopen_mlflow_run(plan: RunPlan, latest: Checkpoint | None, parent_run_id: str, tracker: Tracker) -> Tracker:
    """Once the workers are done: the run's MLflow run, begun now where the server was away before. `latest` is the
    checkpoint that the run went on from. A store that cannot be used costs a warning: the model is trained.
    """
    if tracker.run_id or mlflow_runs.resolve_uri(plan.config.tracking_uri) == mlflow_runs.OFF:
        return tracker
    try:
        return open_mlflow_run(plan, latest, parent_run_id)
    except UserError as error:
        LOGGER.warning("%s ends without MLflow, --resume sends its record: %s", plan.config.name, error)
        return tracker


def send_record(config: TrainConfig, parent_run_id: str) -> str:
    """Begin the MLflow run of a run that has ended while the server was away. Returns its id, empty without a store.

    Raises:
        UserError: the run's folder cannot be read, another driver has it, or the store cannot be used.
    """
    config = resolve(config, lambda _: 1)
    plan = plan_run(config, load_manifest(config.data))
    with run_lock.locked(plan.folder):
        plan.folder.fetch()
        tracker = reopen_mlflow_run(plan, plan.folder.latest_valid(), parent_run_id, NullTracker())
        summary = read_summary(plan.folder) if has_summary(plan.folder) else None
        tracker.set_tags({"status": str(summary.status) if summary else "failed"})  # the sweep's word
        if summary and summary.best:
            tracker.set_tags({"best_step": str(summary.best.step)})
        if (plot := plan.folder.path / LOSS_PLOT).is_file():
            tracker.log_file(plot)
        is_good = summary is not None and summary.status in (RunStatus.FINISHED, RunStatus.STOPPED)
        close_mlflow_run(plan, tracker, "FINISHED" if is_good else "FAILED")
    return tracker.run_id


def _recorded_run_id(plan: RunPlan, latest: Checkpoint | None) -> str:
    """That of the checkpoint; where it was written without one, that which the run got later."""
    if latest is None or latest.state.run_id:
        return latest.state.run_id if latest else ""
    return storage.read_if_there(plan.folder.path / MLFLOW_ID).decode("ascii", errors="replace").strip()


def _keep_run_id(plan: RunPlan, run_id: str) -> None:
    """Beside the checkpoints, which may know none; where it cannot be kept, the next start begins another run."""
    with contextlib.suppress(OSError):
        storage.replace_file(plan.folder.path / MLFLOW_ID, run_id.encode())
        plan.folder.push_record()


def _is_known(store: str, run_id: str, experiment: str) -> bool:
    """Whether the run goes on in the store; a server that is away gets the records later. Raises: `has_run`."""
    try:
        return mlflow_runs.has_run(store, run_id, experiment)
    except StoreAwayError:  # the tracker says so, once
        return True


def _log_data_set(plan: RunPlan, store: str, run_id: str) -> None:
    run_inputs.log_data_sets(store, run_id, plan.config.data, load_manifest(plan.config.data))


def close_mlflow_run(plan: RunPlan, tracker: Tracker, status: str) -> None:
    """Send what the store lacks, end the attempts that could not say so, and the run.

    status: MLflow's word; empty where another driver has taken the run over, which then goes on.
    """
    if not status:
        tracker.close()
        return
    if tracker.run_id:
        with contextlib.suppress(Exception):  # whatever a store's client raises: `finish` says so
            end_lost_attempts(mlflow_runs.resolve_uri(plan.config.tracking_uri), tracker.run_id)
    tracker.finish(status)
