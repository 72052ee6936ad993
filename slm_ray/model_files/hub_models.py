"""Models of the Hugging Face hub: `hub:OWNER/NAME[@REVISION]`.

In: a reference. Out: the folder of its files in the hub client's own cache, and the commit. Only the files that a model
is read from are asked for; without an answer, the copy that the cache holds is used.
"""

import contextlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from slm_ray.errors import UserError, one_line
from slm_ray.hub_reference import ANSWER_TIMEOUT_S, PREFIX, HubReference, parse_hub_reference
from slm_ray.model_files.folders import (
    CONFIG,
    GENERATION_CONFIG,
    INDEX,
    TOKENIZER,
    TOKENIZER_CONFIG,
    WEIGHTS,
    shard_names,
)

_OPTIONAL = (TOKENIZER, TOKENIZER_CONFIG, GENERATION_CONFIG)  # a missing tokenizer is said where it is read


@dataclass(frozen=True, kw_only=True)
class HubModel:
    """Where the files of a model lie, and which they are."""

    folder: Path
    name: str
    """OWNER/NAME."""
    commit: str
    is_online: bool
    """Whether the hub answered; if not, nothing more is asked of it."""

    @property
    def reference(self) -> str:
        """That names these very files, today and later."""
        return f"{PREFIX}{self.name}@{self.commit}"


def hub_model(reference: str) -> HubReference:
    """The parts of a reference. Raises: UserError when it is none of a model."""
    named = parse_hub_reference(reference)
    if named is None or named.split:
        raise UserError(f"{reference} is not a model of the hub: expected {PREFIX}OWNER/NAME[@REVISION]")
    return named


def fetch_model(reference: str) -> HubModel:
    """Bring the files of a model here.

    Raises:
        UserError: it is no reference, the hub has no such model or does not answer and no copy is here, or the model
            has no safetensors.
    """
    named = hub_model(reference)
    try:
        config, is_online = _first_file(named)
    except Exception as error:  # every layer below has its own family of exceptions
        raise UserError(
            f"cannot get the model {reference} ({_why(error)}): try again with a network, or give a folder"
        ) from error
    folder = config.parent
    found = HubModel(folder=folder, name=named.name, commit=folder.name, is_online=is_online)
    try:
        for name in _OPTIONAL:
            _file(found, name, must_exist=False)
        if _file(found, WEIGHTS, must_exist=False) is None:
            _fetch_shards(found, reference)
    except UserError:
        raise
    except Exception as error:
        raise UserError(f"cannot get the model {reference} ({_why(error)}): try again") from error
    return found


def _first_file(named: HubReference) -> tuple[Path, bool]:
    """config.json, which every model has: so the commit is known, and all else is of the same. And whether the hub
    answered."""
    from huggingface_hub import get_hf_file_metadata, hf_hub_download, hf_hub_url

    file: dict[str, Any] = {"repo_id": named.name, "filename": CONFIG, "revision": named.revision}
    try:
        get_hf_file_metadata(hf_hub_url(**file), timeout=ANSWER_TIMEOUT_S)  # one question; the download asks for 24 s
        return Path(hf_hub_download(**file)), True
    except Exception:
        with contextlib.suppress(Exception):
            return Path(hf_hub_download(**file, local_files_only=True)), False
        raise


def _file(model: HubModel, name: str, *, must_exist: bool = True) -> Path | None:
    """One file of the commit, if it has it; out of the cache where it is there, which needs no network."""
    from huggingface_hub import hf_hub_download, try_to_load_from_cache
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    known = try_to_load_from_cache(model.name, name, revision=model.commit)
    if known is not None:  # a path, or that the commit was found to have no such file
        return Path(known) if isinstance(known, str) else None
    try:
        return Path(hf_hub_download(model.name, name, revision=model.commit, local_files_only=not model.is_online))
    except LocalEntryNotFoundError:  # the hub does not answer: that is not "there is none"
        raise
    except EntryNotFoundError:
        if must_exist:
            raise
        return None


def _fetch_shards(model: HubModel, reference: str) -> None:
    index = _file(model, INDEX, must_exist=False)
    if index is None:
        raise UserError(
            f"{reference} has neither {WEIGHTS} nor {INDEX}: pickles (.bin, .pt) are not read, as they can run any "
            "code; where the hub has converted them, the reference is that of its branch, such as "
            f"{PREFIX}{model.name}@refs/pr/1"
        )
    for name in shard_names(index):
        _file(model, name)


def _why(error: Exception) -> str:
    return one_line(error)[:200]
