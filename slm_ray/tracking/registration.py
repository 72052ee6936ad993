"""Checkpoints become versions of a registered model, with their lineage.

In: a checkpoint of a run. Out: a version of its own files, which nothing changes again; no alias moves. The store is
that of `mlflow_runs`; `registry` finds what is registered.
"""

import json
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from slm_ray import storage
from slm_ray.config.mixtures import mixtures_text
from slm_ray.errors import UserError, one_line
from slm_ray.runs import checkpoint, verification
from slm_ray.tracking.mlflow_model import CHECKPOINT, write_mlflow_model
from slm_ray.tracking.mlflow_runs import client
from slm_ray.tracking.registry import RegistryError
from slm_ray.tracking.store_faults import store_errors

KEPT = "checkpoints"
"""Folder of registered checkpoints among a run's artifacts; earlier versions wrote each over the last, to another."""


def register(uri: str, name: str, folder: Path, run_id: str) -> str:
    """Register a checkpoint as a new version of `name`, and give the version; no alias moves.

    The version holds the checkpoint without its optimizer, as a model that MLflow opens too, in a folder named by the
    checkpoint's content, which nothing writes to again. It carries its `lineage` as tags. `evaluation.promotion`
    decides whether it becomes the champion.

    Raises:
        UserError: the checkpoint is corrupt, or the store cannot be used.
    """
    verification.verify(folder)
    store = client(uri)
    try:
        with tempfile.TemporaryDirectory() as scratch:
            copy, model = Path(scratch) / "checkpoint", Path(scratch) / "model"
            checkpoint.copy_for_serving(folder, copy)
            write_mlflow_model(copy, model)
            source = f"{store.get_run(run_id).info.artifact_uri}/{_keep(store, run_id, model)}"
        _create_model(store, name)
        version = store.create_model_version(name, source=source, run_id=run_id, tags=lineage(folder))
    except Exception as error:  # where files are kept, each client has errors of its own
        raise UserError(f"cannot register {name} at {uri}: {one_line(error)}") from error
    return str(version.version)


def _create_model(store: Any, name: str) -> None:
    from mlflow.exceptions import MlflowException

    try:
        store.get_registered_model(name)
    except MlflowException as missing:
        if missing.error_code != "RESOURCE_DOES_NOT_EXIST":
            raise
        try:
            store.create_registered_model(name)
        except MlflowException as error:
            if error.error_code != "RESOURCE_ALREADY_EXISTS":  # another run was faster
                raise


def _keep(store: Any, run_id: str, folder: Path) -> str:
    """Keep an MLflow model among a run's artifacts, once; returns where. What is there is of this very checkpoint."""
    marker = folder / CHECKPOINT / verification.MARKER
    place = f"{KEPT}/{storage.file_sha256(marker)[:16]}"
    inner = f"{place}/{CHECKPOINT}"
    if f"{inner}/{verification.MARKER}" not in {artifact.path for artifact in store.list_artifacts(run_id, inner)}:
        own = marker.rename(folder.parent / marker.name)
        store.log_artifacts(run_id, str(folder), place)
        store.log_artifact(run_id, str(own), inner)  # last: what was broken off is no checkpoint
    return place


def registered_version(uri: str, name: str, folder: Path, run_id: str) -> str:
    """The newest version that is this very checkpoint of this run, else empty.

    Raises:
        RegistryError: the store does not answer, so that nobody can say.
    """
    try:
        found = client(uri).search_model_versions(f"run_id = '{run_id}'")
    except store_errors() as error:
        raise RegistryError(f"cannot look for versions of {name} at {uri}: {one_line(error)}") from error
    ours = lineage(folder)
    same = [int(version.version) for version in found if version.name == name and _holds(version, ours)]
    return str(max(same)) if same else ""


def _holds(version: Any, ours: Mapping[str, str]) -> bool:
    """Whether a version is of a checkpoint with this lineage; those of earlier versions have fewer tags."""
    known = {"step", "data_fingerprint"} <= version.tags.keys()
    return known and all(version.tags.get(tag, value) == value for tag, value in ours.items())


def lineage(folder: Path) -> dict[str, str]:
    """Tags of a registered version, out of its checkpoint."""
    state = checkpoint.load_state(folder)
    tokenizer = verification.file_digest(folder, f"{checkpoint.MODEL}/tokenizer.json")
    taught = state.teachers
    metrics = state.metrics.record if state.metrics else {}
    evaluation = {name: value if isinstance(value, str) else f"{value:.6g}" for name, value in metrics.items()}
    return {
        "data_fingerprint": state.data_fingerprint,
        "data_lineage": lineage_text(state.data_lineage),
        **({"data_mixtures": mixtures_text(state.mixtures)} if state.mixtures else {}),
        "step": str(state.step),
        "tokenizer_sha256": tokenizer,
        "weights_sha256": verification.file_digest(folder, f"{checkpoint.MODEL}/model.safetensors"),
        **({"origin": f"{origin.reference} {origin.weights_sha256}"} if (origin := state.origin) else {}),
        **({"teachers": " ".join(f"{one.reference} {one.weights_sha256}" for one in taught)} if taught else {}),
        **evaluation,
    }


def lineage_text(data: Sequence[tuple[str, int]]) -> str:
    """Data sets and the steps from which on they were trained on: `[["3f2a", 0], ["77c1", 500]]`, as a tag's value."""
    return json.dumps(data)
