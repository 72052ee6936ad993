"""Whether a checkpoint is complete and what was written: its marker holds the sha256 of every file.

In: a folder. Out: nothing, or an error that tells a corrupt checkpoint from one that cannot be read now.
"""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from slm_ray import storage
from slm_ray.errors import UserError
from slm_ray.model_files.json_files import read_json
from slm_ray.runs.checked_files import listed_files

FORMAT_VERSION = 1
MARKER, STATE = "complete.json", "state.json"
NEEDED = (STATE, *(f"model/{name}" for name in ("config.json", "model.safetensors", "tokenizer.json")))
"""Files without which there is no model."""


class CorruptCheckpointError(UserError):
    """The folder is no complete checkpoint, or not what was written: another one has to do."""


class UnreadableCheckpointError(UserError):
    """The disk did not give a file that may be there and right: the same read may succeed later."""


def verify(folder: Path) -> None:
    """Check that every file is there and unchanged.

    Raises:
        CorruptCheckpointError: the folder is no complete checkpoint; the message names the file.
        UnreadableCheckpointError: a file could not be read now.
        UserError: it is of another format version.
    """
    marker = _read_marker(folder)
    for name, digest in marker["files"].items():
        with read_errors(folder / name):
            found = storage.file_sha256(folder / name)
        if found != digest:
            message = f"{folder / name} is not what was written (its sha256 differs): the checkpoint is corrupt"
            raise CorruptCheckpointError(message)


def _read_marker(folder: Path) -> dict[str, Any]:
    path = folder / MARKER
    try:
        marker = read_json(path)
        version = marker.get("format_version", FORMAT_VERSION)
        if version != FORMAT_VERSION:  # of a later version, perhaps: it is not corrupt
            raise UserError(f"{path} has format version {version}, expected {FORMAT_VERSION}")
        return marker | {"files": listed_files(marker, NEEDED)}
    except FileNotFoundError as error:
        raise CorruptCheckpointError(f"{folder} is no complete checkpoint: it has no {MARKER}") from error
    except OSError as error:
        raise UnreadableCheckpointError(f"{path} cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise CorruptCheckpointError(f"{path} cannot be read ({error}): the checkpoint is corrupt") from error


@contextlib.contextmanager
def read_errors(path: Path) -> Iterator[None]:
    """A file that is missing is corruption; one that the disk does not give is not."""
    try:
        yield
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError) as error:
        raise CorruptCheckpointError(f"{path} is missing: the checkpoint is corrupt") from error
    except OSError as error:
        raise UnreadableCheckpointError(f"{path} cannot be read: {error.strerror or error}") from error


def is_valid(folder: Path) -> bool:
    """Whether it is a complete checkpoint. Raises: UnreadableCheckpointError when that cannot be known now."""
    try:
        verify(folder)
    except CorruptCheckpointError:
        return False
    return True


def file_digest(folder: Path, name: str) -> str:
    """sha256 of one file of a checkpoint, as its marker has it. Raises: as `verify`."""
    try:
        return str(_read_marker(folder)["files"][name])
    except KeyError as error:
        raise CorruptCheckpointError(f"{folder / MARKER} does not list {name}: the checkpoint is corrupt") from error


def is_state_complete(folder: Path) -> bool:
    """Whether the folder has its marker and the very `state.json` that it lists; the other files are not looked at.

    Raises:
        UnreadableCheckpointError: that cannot be known now.
    """
    try:
        expected = file_digest(folder, STATE)
        with read_errors(folder / STATE):
            return storage.file_sha256(folder / STATE) == expected
    except CorruptCheckpointError:
        return False
