"""Where runs are recorded and models registered. MLflow lives here only.

In: metrics, parameters and files of a run; a checkpoint to register; `models:/tinystories@champion` or the like.
Out: MLflow runs, versions that carry their lineage, and for a reference the folder of its checkpoint.
The driver starts a run; worker rank 0 continues it by its id; the trials of a sweep are its children.
"""

import contextlib
import logging
import os
import tempfile
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol
from urllib.parse import unquote, urlparse

from slm_ray import checkpoint
from slm_ray.errors import UserError

LOGGER = logging.getLogger(__name__)
CHAMPION = "champion"
OFF = "none"
_SQLITE = "sqlite:///"


class Tracker(Protocol):
    """What the loop needs of a tracker."""

    @property
    def run_id(self) -> str:
        """Id of the run, empty where nothing is recorded."""

    def log_metrics(self, metrics: Mapping[str, float], step: int) -> None:
        """Record values at a step; the same step again replaces nothing and harms nothing."""

    def log_text(self, text: str, name: str) -> None:
        """Keep a text as an artifact called `name`."""

    def log_file(self, path: Path, folder: str = "") -> None:
        """Keep a file as an artifact."""

    def set_tags(self, tags: Mapping[str, str]) -> None:
        """Attach names with values to the run."""

    def finish(self, status: str = "FINISHED") -> None:
        """End the run with MLflow's status word: FINISHED, FAILED or KILLED."""


class NullTracker:
    """Records nothing."""

    run_id = ""

    def log_metrics(self, metrics: Mapping[str, float], step: int) -> None:
        """Nothing."""

    def log_text(self, text: str, name: str) -> None:
        """Nothing."""

    def log_file(self, path: Path, folder: str = "") -> None:
        """Nothing."""

    def set_tags(self, tags: Mapping[str, str]) -> None:
        """Nothing."""

    def finish(self, status: str = "FINISHED") -> None:
        """Nothing."""


class MlflowTracker:
    """One MLflow run, started here or elsewhere, addressed by its id alone; no global state of MLflow is used."""

    def __init__(self, uri: str, run_id: str) -> None:
        self.run_id = run_id
        self._client = client(uri)

    def log_metrics(self, metrics: Mapping[str, float], step: int) -> None:
        """Record values at a step."""
        from mlflow.entities import Metric

        now = int(time.time() * 1000)
        values = [Metric(name, float(value), now, step) for name, value in metrics.items()]
        with _survived("metrics"):
            self._client.log_batch(self.run_id, metrics=values)

    def log_text(self, text: str, name: str) -> None:
        """Keep a text as an artifact called `name`."""
        with _survived(name):
            self._client.log_text(self.run_id, text, name)

    def log_file(self, path: Path, folder: str = "") -> None:
        """Keep a file as an artifact."""
        with _survived(path.name):
            self._client.log_artifact(self.run_id, str(path), folder or None)

    def set_tags(self, tags: Mapping[str, str]) -> None:
        """Attach names with values to the run."""
        with _survived("tags"):
            for name, value in tags.items():
                self._client.set_tag(self.run_id, name, value)

    def finish(self, status: str = "FINISHED") -> None:
        """End the run."""
        with _survived("status"):
            self._client.set_terminated(self.run_id, status)


@contextlib.contextmanager
def _survived(what: str) -> Iterator[None]:
    """A store that hiccups must not end a training: its own record, `metrics.jsonl`, has all of it."""
    from mlflow.exceptions import MlflowException

    try:
        yield
    except (MlflowException, OSError) as error:
        LOGGER.warning("MLflow did not take the %s, the run goes on: %s", what, _first_line(error))


def resolve_uri(uri: str) -> str:
    """The store meant by an option: itself, MLFLOW_TRACKING_URI, or mlflow.db in the current folder; made absolute."""
    uri = uri or os.environ.get("MLFLOW_TRACKING_URI", "") or f"{_SQLITE}mlflow.db"
    if uri.startswith(_SQLITE) and not uri.startswith(f"{_SQLITE}/"):
        return f"{_SQLITE}{Path(uri.removeprefix(_SQLITE)).absolute()}"
    return uri


def client(uri: str) -> Any:
    """An MLflow client of the store `uri` (resolved).

    Raises:
        UserError: the store does not answer or is none.
    """
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    logging.getLogger("alembic").setLevel(logging.WARNING)
    logging.getLogger("mlflow").setLevel(logging.WARNING)
    from mlflow import MlflowClient
    from mlflow.exceptions import MlflowException

    try:
        return MlflowClient(uri, registry_uri=uri)
    except (MlflowException, OSError) as error:
        raise UserError(f"the MLflow store {uri} cannot be used: {_first_line(error)}") from error


def start_run(
    uri: str,
    experiment: str,
    name: str,
    params: Mapping[str, Any],
    tags: Mapping[str, str] | None = None,
    parent_run_id: str = "",
) -> Tracker:
    """Start a run and record its parameters; with `uri` "none", a tracker that records nothing.

    Raises:
        UserError: the store cannot be used.
    """
    if uri == OFF:
        return NullTracker()
    from mlflow.entities import Param
    from mlflow.exceptions import MlflowException

    all_tags = dict(tags or {}) | ({"mlflow.parentRunId": parent_run_id} if parent_run_id else {})
    store = client(uri)
    try:
        run = store.create_run(_experiment_id(store, uri, experiment), run_name=name, tags=all_tags)
        store.log_batch(run.info.run_id, params=[Param(key, str(value)) for key, value in params.items()])
    except (MlflowException, OSError) as error:
        raise UserError(f"the MLflow store {uri} cannot be used: {_first_line(error)}") from error
    return MlflowTracker(uri, run.info.run_id)


def continue_run(uri: str, run_id: str) -> Tracker:
    """The tracker of a run that was started elsewhere; without a run, one that records nothing."""
    return MlflowTracker(uri, run_id) if run_id and uri != OFF else NullTracker()


def has_run(uri: str, run_id: str) -> bool:
    """Whether the store knows a run: its database may be newer than a run's folder."""
    if not run_id or uri == OFF:
        return False
    from mlflow.exceptions import MlflowException

    try:
        client(uri).get_run(run_id)
    except MlflowException:
        return False
    return True


def ui_command(uri: str) -> str:
    """The command that shows the runs of a store in a browser; for a server, its address."""
    if "://" in uri and not uri.startswith("sqlite"):
        return uri
    here = f"{_SQLITE}{Path.cwd() / 'mlflow.db'}"
    return f"mlflow ui --backend-store-uri {'sqlite:///mlflow.db' if uri == here else uri}"


def _experiment_id(store: Any, uri: str, name: str) -> str:
    known = store.get_experiment_by_name(name)
    if known is not None:
        return str(known.experiment_id)
    location = None
    if uri.startswith(_SQLITE):  # MLflow's own default is ./mlruns of whoever asks first
        location = (Path(uri.removeprefix(_SQLITE)).parent / "mlruns").as_uri()
    return str(store.create_experiment(name, artifact_location=location))


def register(uri: str, name: str, folder: Path, run_id: str, alias: str = CHAMPION) -> str:
    """Register a checkpoint as a new version of `name`, move the alias to it, and give the version.

    The version holds the checkpoint without its optimizer and carries, as tags, the data fingerprint, the step, the
    tokenizer's digest and every metric of its evaluation.

    Raises:
        UserError: the checkpoint is damaged, or the store cannot be used.
    """
    from mlflow.exceptions import MlflowException

    checkpoint.verify(folder)
    store = client(uri)
    try:
        with tempfile.TemporaryDirectory() as scratch:
            copy = Path(scratch) / "checkpoint"
            checkpoint.copy_for_serving(folder, copy)
            store.log_artifacts(run_id, str(copy), "checkpoint")
        if not store.search_registered_models(f"name = '{name}'"):
            store.create_registered_model(name)
        source = f"{store.get_run(run_id).info.artifact_uri}/checkpoint"
        version = store.create_model_version(name, source=source, run_id=run_id, tags=lineage(folder))
        store.set_registered_model_alias(name, alias, version.version)
    except MlflowException as error:
        raise UserError(f"cannot register {name} at {uri}: {_first_line(error)}") from error
    return str(version.version)


def registered_version(uri: str, name: str, folder: Path, run_id: str, alias: str = CHAMPION) -> str:
    """The version behind the alias if it is this very checkpoint of this run, else empty."""
    from mlflow.exceptions import MlflowException

    try:
        version = client(uri).get_model_version_by_alias(name, alias)
    except MlflowException:
        return ""
    is_same = version.run_id == run_id and lineage(folder).items() <= version.tags.items()
    return str(version.version) if is_same else ""


def lineage(folder: Path) -> dict[str, str]:
    """What a registered version says about itself, out of its checkpoint."""
    state = checkpoint.load_state(folder)
    tokenizer = checkpoint.file_digest(folder, f"{checkpoint.MODEL}/tokenizer.json")
    evaluation = {name: f"{value:.6g}" for name, value in state.metrics.items()}
    return {
        "data_fingerprint": state.data_fingerprint,
        "step": str(state.step),
        "tokenizer_sha256": tokenizer,
        **evaluation,
    }


@dataclass(frozen=True)
class ResolvedModel:
    """A model reference, resolved to a checkpoint folder on this machine."""

    path: Path
    name: str
    version: str
    run_id: str
    data_fingerprint: str
    step: int


def resolve_model(reference: str, tracking_uri: str = "") -> ResolvedModel:
    """Find the checkpoint behind `models:/NAME@ALIAS`, `models:/NAME/VERSION` or a folder; fetch it where needed.

    Raises:
        UserError: there is no such model or folder.
    """
    if reference.startswith("models:/"):
        return _resolve_registered(reference, resolve_uri(tracking_uri))
    path = Path(reference)
    if not path.is_dir():
        raise UserError(f"no model {reference!r}: expected models:/NAME@ALIAS, models:/NAME/VERSION or a folder")
    path = path.resolve()
    state = checkpoint.load_state(path)
    name = str(state.config.get("name") or path.name)
    return ResolvedModel(path, name, f"step-{state.step}", state.run_id, state.data_fingerprint, state.step)


def _resolve_registered(reference: str, uri: str) -> ResolvedModel:
    from mlflow.exceptions import MlflowException

    if uri == OFF:
        raise UserError(f"{reference} needs a tracking store, and tracking is off")
    if uri.startswith(_SQLITE) and not Path(uri.removeprefix(_SQLITE)).exists():
        raise UserError(
            f"no model registry at {uri}: train a model first (`python tune/sweep.py`), or give a checkpoint folder"
        )
    store = client(uri)
    try:
        version = _version(store, reference)
        folder = _fetch(store.get_model_version_download_uri(version.name, version.version), uri)
    except (MlflowException, OSError) as error:
        raise UserError(f"{reference} is not to be had from {uri}: {_first_line(error)}") from error
    state = checkpoint.load_state(folder)
    return ResolvedModel(
        folder, version.name, str(version.version), version.run_id or "", state.data_fingerprint, state.step
    )


def _version(store: Any, reference: str) -> Any:
    spec = reference.removeprefix("models:/")
    if "@" in spec:
        return store.get_model_version_by_alias(*spec.split("@", 1))
    name, _, version = spec.partition("/")
    if not version:
        raise UserError(f"{reference!r} names no version: write models:/NAME@ALIAS or models:/NAME/VERSION")
    return store.get_model_version(name, version)


def _fetch(source: str, uri: str) -> Path:
    parsed = urlparse(source)
    if parsed.scheme in ("", "file"):
        return Path(unquote(parsed.path))
    import mlflow.artifacts

    return Path(mlflow.artifacts.download_artifacts(artifact_uri=source, tracking_uri=uri))


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
