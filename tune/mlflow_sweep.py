"""The MLflow run of a sweep, above those of its trials.

In: a plan, and later what became of its trials. Out: a run with the space, the data set and the environment; trials
that ended while the server was away get theirs.
"""

import dataclasses
import logging
from collections.abc import Sequence

from slm_ray.config.mixtures import mixtures_text
from slm_ray.dataset.manifest import home_of, load_manifest, mixture_of
from slm_ray.distributed.mlflow_run import send_record
from slm_ray.errors import one_line
from slm_ray.tracking import mlflow_runs, run_inputs
from slm_ray.tracking.mlflow_runs import KIND
from slm_ray.tracking.store_faults import StoreAwayError
from slm_ray.tracking.tracker import Tracker
from tune.outcomes import latest_state
from tune.planning import Plan
from tune.record import plain_space, read_record, shared_options, write_record
from tune.results import Trial
from tune.space import Point

LOGGER = logging.getLogger(__name__)


def open_sweep(plan: Plan) -> Tracker:
    """Begin a sweep's MLflow run and its record, or continue them. A server that is away does not stop the sweep.

    Raises:
        UserError: the store cannot be used.
    """
    known = read_record(plan.folder)
    run_id = known["run_id"] if known else ""
    store = mlflow_runs.resolve_uri(plan.sweep.tracking_uri)
    try:
        if is_known := store == mlflow_runs.OFF or mlflow_runs.has_run(store, run_id, plan.sweep.experiment):
            parent = mlflow_runs.continue_run(store, run_id)
            parent.set_running()
        else:
            parent = _begun(plan, store)
    except StoreAwayError as error:
        later = "what is recorded is kept in its folder, and sent at its end or by --resume"
        LOGGER.warning("%s goes on without MLflow, %s: %s", plan.sweep.name, later, error)
        parent, is_known = mlflow_runs.continue_run(store, run_id), True
    batches = recorded_batches(plan)
    write_record(
        plan.folder, plan.sweep, parent.run_id or run_id, plan.space, plan.origin_sha256, batches, plan.teacher_sha256
    )
    if not is_known:
        run_inputs.log_data_sets(store, parent.run_id, plan.sweep.data, load_manifest(plan.sweep.data))
        run_inputs.log_report(store, parent.run_id, home_of(plan.sweep.data))
    return parent


def _begun(plan: Plan, store: str) -> Tracker:
    shared = shared_options(plan.sweep, plan.space, plan.origin_sha256, plan.teacher_sha256)
    space = {f"space.{field}": values for field, values in plain_space(plan.space).items()}
    tags = {"data_fingerprint": shared["data_fingerprint"], KIND: "sweep"} | run_inputs.environment()
    if mixture := mixture_of(plan.sweep.data, load_manifest(plan.sweep.data)):
        tags["data_mixtures"] = mixtures_text(mixture)
    return mlflow_runs.start_run(store, plan.sweep.experiment, plan.sweep.name, shared | space, tags)


def recorded_batches(plan: Plan) -> list[list[Point]]:
    """Of an Optuna search that goes on, the points that were suggested; those of the others follow from the options."""
    known = read_record(plan.folder) or {}
    return known.get("batches", []) if plan.sweep.search == "optuna" else []


def send_what_lacks(plan: Plan, parent: Tracker, trials: Sequence[Trial]) -> tuple[Tracker, list[Trial]]:
    """After the trials: their runs and the sweep's own, where the server was away before and answers now.

    Returns the sweep's run, and the trials with the ids of theirs.
    """
    store = mlflow_runs.resolve_uri(plan.sweep.tracking_uri)
    if store == mlflow_runs.OFF or (parent.run_id and all(trial.run_id for trial in trials)):
        return parent, list(trials)
    is_new = not parent.run_id
    parent = open_sweep(plan) if is_new else parent
    if not parent.run_id:
        return parent, list(trials)
    return parent, [_with_run(plan, trial, store, parent.run_id, is_new=is_new) for trial in trials]


def _with_run(plan: Plan, trial: Trial, store: str, parent_run_id: str, *, is_new: bool) -> Trial:
    """The trial with an MLflow run below the sweep's, made now where there is none; a warning where it cannot be."""
    config = plan.trial_config(trial.point)
    try:
        if trial.run_id and is_new:
            mlflow_runs.client(store).set_tag(trial.run_id, mlflow_runs.PARENT, parent_run_id)
        if trial.run_id or latest_state(config) is None:
            return trial
        return dataclasses.replace(trial, run_id=send_record(config, parent_run_id))
    except Exception as error:  # whatever a store's client raises, the sweep goes on
        LOGGER.warning("MLflow does not take the trial %s now, --resume sends it: %s", trial.name, one_line(error))
        return trial
