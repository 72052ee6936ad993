"""Checkpoints of a run in an object store: listed, copied there and back, discarded by their name.

In: checkpoint folders of this machine. Out: the same in the store, each with its marker written last. `remote_run`
says which of them a run has.
"""

import contextlib
import hashlib
import json
import logging
import uuid
from collections.abc import Callable
from pathlib import Path

from slm_ray import storage
from slm_ray.runs import checkpoint, verification
from slm_ray.runs.train_state import TrainState
from slm_ray.storage import StoragePath

ASIDE = ".aside"
"""Ends the name of what lay in the way: it is kept, and no part of the run any more."""
LOGGER = logging.getLogger(__name__)


class RemoteCheckpoints:
    """The checkpoints below a place in a store; `check` raises where they are another driver's now.

    Any method raises what the store's client raises.
    """

    def __init__(self, place: StoragePath, check: Callable[[], None]) -> None:
        self._place, self._check = place, check
        self._states: dict[str, TrainState] = {}

    def names(self) -> list[str]:
        """Names of those that have their marker, oldest first."""
        files = storage.files_below(self._place)  # a glob takes a folder that cannot be listed for an empty one
        found = (path.parent for path in files if path.name == verification.MARKER)
        return sorted(path.name for path in found if path.parent == self._place and path.name.startswith("step-"))

    def upload(self, path: Path) -> None:
        """Copy one there, each file while the run is this driver's: another one may write a checkpoint of that step.

        Raises: OSError also where it is gone from this machine: nothing would be copied.
        """
        target = self._place / path.name
        files = sorted(file.relative_to(path).as_posix() for file in path.rglob("*") if file.is_file())
        if verification.MARKER not in files:
            raise OSError(f"{path} is gone or not complete, so it could not be copied to {self._place.as_posix()}")
        self._states.pop(path.name, None)
        storage.remove(target / verification.MARKER)
        files.remove(verification.MARKER)
        for name in files:
            self._check()
            (target / name).write_bytes((path / name).read_bytes())
        self._check()
        (target / verification.MARKER).write_bytes((path / verification.MARKER).read_bytes())

    def discard(self, name: str) -> None:
        """Remove one, while the run is this driver's."""
        self._check()
        storage.remove(self._place / name / verification.MARKER)
        storage.remove(self._place / name)

    def is_here(self, name: str, folder: Path) -> bool:
        """Whether a run's folder holds one of this name and content."""
        return _has_marker(folder / "checkpoints" / name, storage.read(self._place / name / verification.MARKER))

    def download(self, name: str, folder: Path) -> bool:
        """Have one in a run's folder; returns whether it is valid, for what lies in the store may be corrupt too.

        A folder of that name with another content is put aside.
        """
        target, source = folder / "checkpoints" / name, self._place / name
        if _has_marker(target, storage.read(source / verification.MARKER)) and verification.is_valid(target):
            return True
        partial = target.with_name(f"{name}.{uuid.uuid4().hex[:8]}{checkpoint.PARTIAL}")
        for file in storage.files_below(source):
            own = partial / file.as_posix().removeprefix(source.as_posix()).lstrip("/")
            own.parent.mkdir(parents=True, exist_ok=True)
            own.write_bytes(storage.read(file))
        if verification.is_valid(partial):
            put_aside(target)
            try:
                partial.rename(target)
            except OSError:
                if not target.exists():  # no other worker of this machine was faster
                    raise
        storage.remove(partial)
        return verification.is_valid(target)

    def state(self, name: str) -> TrainState | None:
        """The state of one, or None where it is not the very `state.json` that the marker lists."""
        if name not in self._states:
            content = storage.read(self._place / name / verification.STATE)
            marker = storage.read(self._place / name / verification.MARKER)
            try:
                if json.loads(marker)["files"][verification.STATE] != hashlib.sha256(content).hexdigest():
                    return None
                self._states[name] = TrainState.from_record(json.loads(content))
            except (ValueError, KeyError, TypeError, AttributeError):
                return None
        return self._states[name]


def put_aside(path: Path) -> None:
    """Rename what lies in the way of a run, unless another worker of this machine was faster."""
    kept = path.with_name(f"{path.name}.{uuid.uuid4().hex[:8]}{ASIDE}")
    with contextlib.suppress(FileNotFoundError):
        path.rename(kept)
        LOGGER.warning("%s is not what the run's store has: kept as %s", path, kept.name)


def _has_marker(folder: Path, marker: bytes) -> bool:
    try:
        return (folder / verification.MARKER).read_bytes() == marker
    except FileNotFoundError:
        return False
