"""Where runs are recorded: MLflow, which lives here, in `registry` and in `system_metrics` only.

In: metrics, parameters and files of a run. Out: MLflow runs. The driver starts a run; worker rank 0 continues it by its
id; the trials of a sweep are its children. A store that fails or is gone while a run goes on costs a warning.
"""

import functools
import logging
import os
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlparse

from slm_ray.errors import UserError, one_line, without_secrets
from slm_ray.runs.history import History
from slm_ray.tracking.delivery_queue import DeliveryQueue
from slm_ray.tracking.record_sync import SYSTEM, RecordSync
from slm_ray.tracking.store_faults import StoreAwayError, store_errors, store_fault
from slm_ray.tracking.tracker import NullTracker, Tracker

LOGGER = logging.getLogger(__name__)
OFF = "none"
PARENT, KIND = "mlflow.parentRunId", "slm_ray.kind"
"""Tags: the run above a run, and what a run is: sweep, training, attempt, evaluation or deployment."""
_SQLITE = "sqlite:///"


class MlflowTracker:
    """One MLflow run, started here or elsewhere, addressed by its id alone; no global state of MLflow is used.

    Every method returns at once: a thread delivers, and a store that fails or is gone costs a warning.
    """

    def __init__(
        self,
        uri: str,
        run_id: str,
        warn: Callable[[str], None] = LOGGER.warning,
        record: History | None = None,
    ) -> None:
        """`record`: the run's own, from which is sent what MLflow lacks after a gap, a restart and at the end."""
        self.run_id, self._uri = run_id, uri
        self._client = client(uri)
        self._sync = None if record is None else RecordSync(self._client, run_id, record)
        self._queue = DeliveryQueue("MLflow", warn, is_kept=record is not None)

    def log_metrics(self, metrics: Mapping[str, float], step: int) -> None:
        """Record values at a step; where there is a record, a step that was sent before is not sent again."""
        from mlflow.entities import Metric

        if self._sync is not None and not any(name.startswith(SYSTEM) for name in metrics):
            self._queue.put(functools.partial(self._sync.send, dict(metrics), step))
            return

        now = int(time.time() * 1000)
        values = [Metric(name, float(value), now, step) for name, value in metrics.items()]
        self._queue.put(lambda: self._client.log_batch(self.run_id, metrics=values))

    def log_params(self, params: Mapping[str, Any]) -> None:
        """Record what the run was made with; a server that goes away now gets it later, or costs a warning.

        Raises:
            UserError: the store refuses it.
        """
        from mlflow.entities import Param

        values = [Param(key, str(value)) for key, value in params.items()]
        send = functools.partial(self._client.log_batch, self.run_id, params=values)
        try:
            send()
        except store_errors() as error:
            fault = store_fault(self._uri, error, is_server=sqlite_file(self._uri) is None)
            if not isinstance(fault, StoreAwayError):
                raise fault from error
            self._queue.put(send)  # the run has begun: another one would be its double

    def log_text(self, text: str, name: str) -> None:
        """Keep a text as an artifact called `name`."""
        self._queue.put(lambda: self._client.log_text(self.run_id, text, name))

    def log_file(self, path: Path, folder: str = "") -> None:
        """Keep a file as an artifact; it must stay as it is until `close`."""
        self._queue.put(lambda: self._client.log_artifact(self.run_id, str(path), folder or None))

    def set_tags(self, tags: Mapping[str, str]) -> None:
        """Attach names with values to the run."""
        for name, value in tags.items():
            self._queue.put(functools.partial(self._client.set_tag, self.run_id, name, value))

    def set_running(self) -> None:
        """Show a run that had ended as running again."""
        self._queue.put(lambda: self._client.update_run(self.run_id, status="RUNNING"))

    def finish(self, status: str = "FINISHED") -> None:
        """End the run, and `close`."""
        if self._sync is not None:
            self._queue.put(self._sync.send_missing)
        self._queue.put(lambda: self._client.set_terminated(self.run_id, status))
        self.close()

    def close(self) -> None:
        """Wait until all is delivered, but not for ever."""
        self._queue.flush()


def resolve_uri(uri: str) -> str:
    """The store meant by an option: itself, MLFLOW_TRACKING_URI, or mlflow.db in the current folder; made absolute.

    An address that was saved has lost its password: where it is that of the variable, the variable is meant.
    """
    known = os.environ.get("MLFLOW_TRACKING_URI", "")
    uri = known if uri in ("", without_secrets(known)) else uri
    uri = uri or f"{_SQLITE}mlflow.db"
    if uri.startswith(_SQLITE) and not uri.startswith(f"{_SQLITE}/"):
        return f"{_SQLITE}{Path(uri.removeprefix(_SQLITE)).absolute()}"
    return uri


def sqlite_file(uri: str) -> Path | None:
    """The database file of a resolved store, or None where the store is a server."""
    return Path(uri.removeprefix(_SQLITE).partition("?")[0]) if uri.startswith(_SQLITE) else None


def is_place_there(uri: str) -> bool:
    """Whether the database file of a store is there; a server is asked otherwise.

    Raises:
        UserError: nobody can say.
    """
    database = sqlite_file(uri)
    try:
        return database is None or database.exists()
    except OSError as error:
        raise UserError(f"{uri} cannot be looked at: {error.strerror}") from error


def client(uri: str) -> Any:
    """An MLflow client of the store `uri` (resolved).

    Raises:
        UserError: the store does not answer or is none.
    """
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "3")  # MLflow's 7 wait for minutes on a dead server
    logging.getLogger("alembic").setLevel(logging.WARNING)
    logging.getLogger("mlflow").setLevel(logging.WARNING)
    from mlflow import MlflowClient

    try:
        return MlflowClient(uri, registry_uri=uri)
    except store_errors() as error:
        raise UserError(f"the MLflow store {uri} cannot be used: {one_line(error)}") from error


def start_run(
    uri: str,
    experiment: str,
    name: str,
    params: Mapping[str, Any],
    tags: Mapping[str, str] | None = None,
    parent_run_id: str = "",
    record: History | None = None,
) -> Tracker:
    """Start a run and record its parameters; with `uri` "none", a tracker that records nothing.

    Raises:
        StoreAwayError: the server does not answer.
        UserError: the store cannot be used.
    """
    if uri == OFF:
        return NullTracker()
    all_tags = dict(tags or {}) | ({PARENT: parent_run_id} if parent_run_id else {})
    store = client(uri)
    try:
        run = store.create_run(_experiment_id(store, uri, experiment), run_name=name, tags=all_tags)
    except store_errors() as error:
        raise store_fault(uri, error, is_server=sqlite_file(uri) is None) from error
    tracker = MlflowTracker(uri, run.info.run_id, record=record)
    tracker.log_params(params)
    return tracker


def continue_run(
    uri: str, run_id: str, warn: Callable[[str], None] = LOGGER.warning, record: History | None = None
) -> Tracker:
    """The tracker of a run that was started elsewhere; without a run or its store, one that records nothing."""
    if not run_id or uri == OFF:
        return NullTracker()
    try:
        return MlflowTracker(uri, run_id, warn, record)
    except UserError as error:
        warn(f"the run goes on without MLflow: {error}")
        return NullTracker()


def has_run(uri: str, run_id: str, experiment: str = "") -> bool:
    """Whether a run can go on in the store, which may be newer than the run's folder; not one that was deleted there.

    Where the place of the run's files is gone, it can in no case: a new one has to be begun, in another `experiment`.

    Raises:
        StoreAwayError: the server does not answer.
        UserError: the store is not there or cannot be read, so that nobody can say; or the files' place is gone.
    """
    if not run_id or uri == OFF:
        return False
    if not is_place_there(uri):
        raise UserError(
            f"{uri} is not there, and run {run_id} was recorded: say where its store is with --tracking-uri "
            f"({OFF} goes on without records)"
        )
    store = client(uri)
    try:
        run = store.get_run(run_id)
        home = store.get_experiment(run.info.experiment_id)
    except store_errors() as error:
        if getattr(error, "error_code", "") == "RESOURCE_DOES_NOT_EXIST":
            LOGGER.warning("%s does not know run %s: a new one is begun", without_secrets(uri), run_id)
            return False
        raise store_fault(uri, error, is_server=sqlite_file(uri) is None) from error
    if run.info.lifecycle_stage == "deleted":
        LOGGER.warning("run %s was deleted at %s: a new one is begun", run_id, without_secrets(uri))
        return False
    if experiment not in ("", home.name) and lost_place(uri, home.artifact_location):
        return False
    _check_place(uri, home)
    return True


def lost_place(uri: str, location: str) -> Path | None:
    """The folder in which a store on this machine remembers its files, where that is elsewhere and not there.

    Raises:
        UserError: nobody can say whether it is there.
    """
    database, parsed = sqlite_file(uri), urlparse(location)
    if database is None or parsed.scheme not in ("", "file"):
        return None
    place = Path(unquote(parsed.path))
    try:
        return None if place.is_relative_to(database.parent) or place.exists() else place
    except OSError as error:
        raise UserError(f"{uri} keeps files in {place}, which cannot be read: {error.strerror}") from error


def _check_place(uri: str, experiment: Any) -> None:
    if (place := lost_place(uri, experiment.artifact_location)) is not None:
        raise UserError(
            f"the experiment {experiment.name!r} of {uri} keeps its files in {place}, which is not there (was the "
            "project moved?): put that folder or a link to it there, or give another --experiment"
        )


def ui_command(uri: str) -> str:
    """The command that shows the runs of a store in a browser; for a server, its address."""
    if "://" in uri and not uri.startswith("sqlite"):
        return without_secrets(uri)
    here = f"{_SQLITE}{Path.cwd() / 'mlflow.db'}"
    return f"mlflow ui --backend-store-uri {'sqlite:///mlflow.db' if uri == here else uri}"


def _experiment_id(store: Any, uri: str, name: str) -> str:
    from mlflow.exceptions import MlflowException

    known = store.get_experiment_by_name(name)
    if known is not None and known.lifecycle_stage == "deleted":
        restore = f"`mlflow experiments restore --experiment-id {known.experiment_id}`"
        raise UserError(
            f"the experiment {name!r} of {uri} was deleted: restore it ({restore}), or give another --experiment"
        )
    if known is not None:
        _check_place(uri, known)
        return str(known.experiment_id)
    location = None
    database = sqlite_file(uri)
    if database is not None:  # MLflow's own default is ./mlruns of the first process
        location = (database.parent / "mlruns").as_uri()
    try:
        return str(store.create_experiment(name, artifact_location=location))
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS" or (made := store.get_experiment_by_name(name)) is None:
            raise
        return str(made.experiment_id)  # another run was faster
