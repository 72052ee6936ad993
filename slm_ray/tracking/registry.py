"""Models by name: the references that lead to them.

In: `models:/tinystories@champion`, `models:/tinystories/3`, a folder, or `hub:OWNER/NAME`. Out: the folder of its
checkpoint, or of a model that others made, which has no `complete.json`. `locate` says, cheaply, what a reference
points to now, for those who wait until it moves. The store is that of `mlflow_runs`; `registration` makes versions.
"""

import contextlib
import hashlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import unquote, urlparse

from slm_ray.config.schema import ModelConfig
from slm_ray.corpus.instructions import CHAT_TEMPLATE
from slm_ray.errors import UserError, one_line
from slm_ray.generation.cache_size import check_weights
from slm_ray.hub_reference import PREFIX
from slm_ray.model_files import folders
from slm_ray.model_files.folders import PICKLE_SUFFIXES, WEIGHTS, files_identity, has_model_files, pickle_refusal
from slm_ray.model_files.foreign_tokenizer import check_vocabulary, read_tokenizer
from slm_ray.model_files.hub_models import fetch_model
from slm_ray.model_files.json_files import MAX_JSON_BYTES
from slm_ray.runs import checkpoint, verification
from slm_ray.tokenization.tokenizer import Tokenizer
from slm_ray.tracking.mlflow_model import checkpoint_in
from slm_ray.tracking.mlflow_runs import OFF, client, is_place_there, lost_place, resolve_uri
from slm_ray.tracking.store_faults import store_errors

if TYPE_CHECKING:  # who finds a checkpoint need not wait for torch
    from slm_ray.model.decoder import Decoder

REGISTERED = "models:/"
FOREIGN_DIGITS = 8
"""Of the digest of a foreign model's weights, or of the hub's commit, which stand in place of a version."""


class RegistryError(UserError):
    """A reference could not be followed now: the store does not answer, or nothing is there. It may be later."""


@dataclass(frozen=True)
class ResolvedModel:
    """A model reference, resolved to a checkpoint folder on this machine."""

    path: Path
    name: str
    version: str
    run_id: str
    data_fingerprint: str
    step: int
    identity: str
    """What `locate` says of it: the same as long as the reference points to this very checkpoint."""
    scratch: Path | None = None
    """Folder made for a copy of what lies elsewhere, to be removed when the model is needed no more."""
    is_foreign: bool = False
    """Whether it is a folder in Hugging Face's layout and no checkpoint: others made it, or it was exported."""
    pinned: str = ""
    """A reference that names these very weights, today and later: by version or commit; empty of a folder."""


def resolve_model(reference: str, tracking_uri: str = "") -> ResolvedModel:
    """Find the model behind `models:/NAME@ALIAS`, `models:/NAME/VERSION`, `hub:NAME` or a folder; fetch it if needed.

    Raises:
        RegistryError: there is no such model or folder, or the store does not answer.
        UserError: what is there is no checkpoint.
    """
    if reference.startswith(REGISTERED):
        return _resolve_registered(reference, resolve_uri(tracking_uri))
    if reference.startswith(PREFIX):
        fetched = fetch_model(reference)
        name, version = fetched.name, fetched.commit[:FOREIGN_DIGITS]
        pinned = fetched.reference
        return ResolvedModel(fetched.folder, name, version, "", "", 0, reference, is_foreign=True, pinned=pinned)
    path = _folder(reference)
    if is_foreign(path):
        from slm_ray.model_files.reading import weights_bytes

        folders.say_pickles(path)
        check_weights(weights_bytes(path))  # by headers: nobody waits for the digest of a terabyte that is no model
        version, identity = f"hf-{folders.weights_sha256(path)[:FOREIGN_DIGITS]}", _foreign_identity(path)
        return ResolvedModel(path, path.name, version, "", "", 0, identity, is_foreign=True)
    _refuse_pickles(path)
    state = checkpoint.load_state(path)
    name, version = str(state.config.get("name") or path.name), f"step-{state.step}"
    return ResolvedModel(path, name, version, state.run_id, state.data_fingerprint, state.step, _folder_identity(path))


def load_model(found: ResolvedModel) -> "tuple[Decoder, Tokenizer]":
    """The model and its tokenizer, in eval mode on the CPU: of a checkpoint, verified; of others, checked as strictly.

    Raises:
        UserError: a file is missing, corrupt or does not fit the others, or the weights do not fit into memory.
    """
    if not found.is_foreign:
        return checkpoint.load_model(found.path)
    from slm_ray.model_files.reading import read_model, weights_bytes

    check_weights(weights_bytes(found.path))
    model, tokenizer = read_model(found.path), read_tokenizer(found.path)
    check_vocabulary(tokenizer, model.config.vocab_size, found.path)
    return model, tokenizer


def has_instructions(found: ResolvedModel) -> bool:
    """Whether it was trained with instructions before its stories; one that others made was not. Raises: UserError."""
    if not found.is_foreign:
        return checkpoint.has_instructions(found.path)
    try:
        template = folders.model_file(found.path, CHAT_TEMPLATE)  # of a model of ours that was exported
        return template is not None and checkpoint.is_instruction_template(template)
    except OSError as error:
        raise UserError(f"{found.path} is no model: {one_line(error)}") from error


def model_shape(found: ResolvedModel) -> ModelConfig:
    """Its shape, borne out by the headers of its weights. Raises: UserError when they do not fit each other."""
    from slm_ray.model_files.reading import read_shape

    return read_shape(found.path if found.is_foreign else found.path / checkpoint.MODEL)


def weights_digest(found: ResolvedModel) -> str:
    """sha256 of its weights. Raises: UserError when they cannot be read."""
    if found.is_foreign:
        return folders.weights_sha256(found.path)
    return verification.file_digest(found.path, f"{checkpoint.MODEL}/{WEIGHTS}")


@contextlib.contextmanager
def resolved_model(reference: str, tracking_uri: str = "") -> Iterator[ResolvedModel]:
    """As `resolve_model`, for the length of a block: a copy that had to be made of it is removed."""
    model = resolve_model(reference, tracking_uri)
    try:
        yield model
    finally:
        discard(model)


def discard(model: ResolvedModel) -> None:
    """Remove the copy that was made of a model, where one was made."""
    if model.scratch is not None:
        shutil.rmtree(model.scratch, ignore_errors=True)


def locate(reference: str, tracking_uri: str = "") -> str:
    """Say what a reference points to now, without fetching it: another text when it points elsewhere.

    Raises:
        RegistryError: as `resolve_model`.
    """
    if reference.startswith(PREFIX):  # a branch of the hub may move: what was taken at the start is kept
        return reference
    if not reference.startswith(REGISTERED):
        folder = _folder(reference)
        return _foreign_identity(folder) if is_foreign(folder) else _folder_identity(folder)
    return _version_identity(_version(open_store(reference, resolve_uri(tracking_uri)), reference))


def _folder(reference: str) -> Path:
    """Where a folder really is: `best` and `latest` are links that move."""
    path = Path(reference)
    try:
        if path.is_file() and path.suffix in PICKLE_SUFFIXES:
            raise UserError(pickle_refusal(path))
        if path.is_dir():
            return path.resolve()
    except (OSError, ValueError) as error:
        raise RegistryError(f"{reference!r} cannot be looked at: {one_line(error)}") from error
    expected = "models:/NAME@ALIAS, models:/NAME/VERSION, hub:OWNER/NAME or a folder"
    raise RegistryError(f"no model {reference!r}: expected {expected}")


def is_foreign(folder: Path) -> bool:
    """Whether a folder is in Hugging Face's layout and no checkpoint of ours, which has a marker.

    Raises:
        RegistryError: that cannot be known now.
    """
    try:
        return not os.path.lexists(folder / verification.MARKER) and has_model_files(folder)
    except (OSError, ValueError) as error:
        raise RegistryError(f"{folder} cannot be looked at: {one_line(error)}") from error


def _foreign_identity(path: Path) -> str:
    try:
        return f"{path} {files_identity(path)}"
    except OSError as error:
        raise RegistryError(f"{path} cannot be read: {error.strerror}") from error


def _folder_identity(path: Path) -> str:
    """The marker holds the digest of every file, so its own digest stands for all of them."""
    marker = path / verification.MARKER
    try:
        with marker.open("rb") as file:
            content = file.read(MAX_JSON_BYTES + 1)
    except FileNotFoundError as error:
        raise RegistryError(f"{path} is no complete checkpoint: it has no {verification.MARKER}") from error
    except OSError as error:
        raise RegistryError(f"{marker} cannot be read: {error.strerror}") from error
    if len(content) > MAX_JSON_BYTES:
        raise RegistryError(f"{marker} is larger than {MAX_JSON_BYTES} bytes: it is none of this program's")
    return f"{path} {hashlib.sha256(content).hexdigest()[:16]}"


def _version_identity(version: Any) -> str:
    return f"{REGISTERED}{version.name}/{version.version}"


def _refuse_pickles(folder: Path) -> None:
    """Raises: UserError when weights are offered as a pickle; the optimizer's state is not read where one serves."""
    for path in sorted([*folder.glob("*"), *folder.glob(f"{checkpoint.MODEL}/*")]):
        if path.suffix in PICKLE_SUFFIXES and path != folder / checkpoint.OPTIMIZER:
            raise UserError(pickle_refusal(path))


def _resolve_registered(reference: str, uri: str) -> ResolvedModel:
    store = open_store(reference, uri)
    version = _version(store, reference)
    try:
        source = store.get_model_version_download_uri(version.name, version.version)
        if (place := lost_place(uri, source)) is not None:
            raise RegistryError(
                f"the files of {reference} (version {version.version} at {uri}) were kept in {place}, which is not "
                "there (was the project moved?): put that folder or a link to it there, or register the model again"
            )
        folder, scratch = _fetch(source, uri)
    except RegistryError:
        raise
    except Exception as error:  # where files are kept, each client has errors of its own
        raise RegistryError(f"{reference} is not available from {uri}: {one_line(error)}") from error
    try:
        _refuse_pickles(folder)
        folder = checkpoint_in(folder)
        _refuse_pickles(folder)
        state = checkpoint.load_state(folder)
    except BaseException:
        if scratch is not None:
            shutil.rmtree(scratch, ignore_errors=True)
        raise
    lineage_of, identity = (version.run_id or "", state.data_fingerprint, state.step), _version_identity(version)
    return ResolvedModel(folder, version.name, str(version.version), *lineage_of, identity, scratch, pinned=identity)


def open_store(reference: str, uri: str) -> Any:
    """A client of the store that a reference or a model's name is to be found in; none is made.

    Raises:
        RegistryError: there is no store, or it does not answer.
        UserError: tracking is off.
    """
    if uri == OFF:
        raise UserError(f"{reference} needs a tracking store, and tracking is off")
    try:
        is_there = is_place_there(uri)
    except UserError as error:
        raise RegistryError(str(error)) from error
    if not is_there:
        first = "train a model first (`python tune/sweep.py`), or give a checkpoint folder"
        raise RegistryError(f"no model registry at {uri}: {first}")
    return client(uri)


def _version(store: Any, reference: str) -> Any:
    """The registered version, as the store describes it. Raises: RegistryError."""
    spec = reference.removeprefix(REGISTERED)
    name, _, number = spec.partition("/")
    if "@" not in spec and not number:
        raise UserError(f"{reference!r} names no version: write models:/NAME@ALIAS or models:/NAME/VERSION")
    try:
        if "@" in spec:
            return store.get_model_version_by_alias(*spec.split("@", 1))
        return store.get_model_version(name, number)
    except store_errors() as error:
        uri = store.tracking_uri
        raise RegistryError(f"{reference} is not available from {uri}: {one_line(error)}") from error


def _fetch(source: str, uri: str) -> tuple[Path, Path | None]:
    """The folder on this machine, and the scratch folder around it where it had to be copied."""
    parsed = urlparse(source)
    if parsed.scheme in ("", "file"):
        return Path(unquote(parsed.path)), None
    import mlflow.artifacts

    scratch = Path(tempfile.mkdtemp(prefix="slm-model-"))
    try:
        folder = mlflow.artifacts.download_artifacts(artifact_uri=source, dst_path=str(scratch), tracking_uri=uri)
    except BaseException:
        shutil.rmtree(scratch, ignore_errors=True)
        raise
    return Path(folder), scratch
