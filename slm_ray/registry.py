"""Models by name: registered versions, and the references that lead to them.

In: a checkpoint to register; `models:/tinystories@champion`, `models:/tinystories/3` or a folder. Out: versions that
carry their lineage, and for a reference the folder of its checkpoint. The store is that of `tracking`.
"""

import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlparse

from slm_ray import checkpoint
from slm_ray.errors import UserError
from slm_ray.outbox import first_line
from slm_ray.tracking import OFF, client, resolve_uri, sqlite_file

CHAMPION = "champion"


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
    except (MlflowException, OSError) as error:
        raise UserError(f"cannot register {name} at {uri}: {first_line(error)}") from error
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
    database = sqlite_file(uri)
    if database is not None and not database.exists():
        raise UserError(
            f"no model registry at {uri}: train a model first (`python tune/sweep.py`), or give a checkpoint folder"
        )
    store = client(uri)
    try:
        version = _version(store, reference)
        folder = _fetch(store.get_model_version_download_uri(version.name, version.version), uri)
    except (MlflowException, OSError) as error:
        raise UserError(f"{reference} is not to be had from {uri}: {first_line(error)}") from error
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
