"""The files of a lease: numbered, each created by one owner, and written to by nobody else.

    .lease/00000003.json   owner, host, process, since when, last sign of life, whether it was given back

In: a folder, here or in an object store. Out: what the one with the highest number says; a new one, created only where
there is none of its number. That is the one conditional write that fsspec has for every store (`mode="create"`:
`If-None-Match` in S3 and Azure, `ifGenerationMatch=0` in Google's), and a disk has with hard links; so a lease is never
replaced, it is outnumbered, and its file is whole from its first moment on, whenever its owner is killed.
"""

import contextlib
import dataclasses
import json
import logging
import os
import re
from pathlib import Path
from typing import Any

from slm_ray import storage
from slm_ray.storage import StoragePath

MAX_BYTES = 64 * 1024
_NAME = re.compile(r"([0-9]{8,})\.json")
_BESIDE = re.compile(r"([0-9]{8,})\.json\.[0-9a-f]+\.partial|\.([0-9]{8,})\.json\.[0-9]+-[0-9a-f]+")
"""Files that become one of a number: what is created, and what is written anew (`storage.replace_file`)."""
_UNKNOWN_MODE = (NotImplementedError, TypeError, ValueError)  # of a file system that has no conditional write
_BEGINNING = b'{"alive_s": '  # of every file that this version writes
LOGGER = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Holder:
    """Who has a lease, as its file says."""

    owner: str = ""
    """A random word; empty where the file cannot be understood."""
    host: str = "an unknown machine"
    pid: int = 0
    since_s: float = 0.0
    """When it was taken: seconds since 1970 by the owner's clock."""
    alive_s: float = 0.0
    """The last sign of life, by the same clock."""
    is_released: bool = False
    """Whether its owner gave it back."""
    is_begun: bool = False
    """Whether its file is the beginning of one: its owner was killed, or is, while it created it, and holds nothing
    before it has looked at the whole file. No field of the file."""

    def to_json(self) -> bytes:
        """The content of its file."""
        fields = dataclasses.asdict(self)
        del fields["is_begun"]
        return json.dumps(fields, sort_keys=True).encode()

    @classmethod
    def from_json(cls, content: bytes) -> "Holder":
        """Read it; what is no such file, or was not written to its end, is held by somebody unknown."""
        try:
            fields: dict[str, Any] = json.loads(content)
        except (ValueError, RecursionError):
            return cls(is_begun=content[: len(_BEGINNING)] == _BEGINNING[: len(content)])
        try:
            return cls(
                owner=str(fields["owner"]),
                host=str(fields["host"])[:255],
                pid=int(fields["pid"]),
                since_s=float(fields["since_s"]),
                alive_s=float(fields["alive_s"]),
                is_released=fields["is_released"] is True,
            )
        except (ValueError, TypeError, KeyError, OverflowError):
            return cls()


class LeaseFiles:
    """The numbered files in a folder. Any method raises what the file system raises where it cannot look or write."""

    def __init__(self, folder: StoragePath) -> None:
        self.folder = folder

    def newest(self) -> tuple[int, Holder | None]:
        """The highest number with its holder; 0 and None where there is none."""
        number = max(self._numbers(), default=0)
        return number, self.read(number) if number else None

    def read(self, number: int) -> Holder | None:
        """Who has it, or None where there is no file of that number."""
        try:
            return Holder.from_json(storage.read_at_most(self._path(number), MAX_BYTES))
        except FileNotFoundError:
            return None
        except storage.TooLargeError:  # than any that we write
            return Holder()

    def create(self, number: int, holder: Holder) -> None:
        """Create the file of a number. Raises: FileExistsError where somebody was faster and the store can say so."""
        path = self._path(number)
        if isinstance(path, Path):
            path.parent.mkdir(parents=True, exist_ok=True)
            _create_whole(path, holder)
            return
        try:
            path.fs.pipe_file(path.path, holder.to_json(), mode="create")
        except _UNKNOWN_MODE:
            path.write_bytes(holder.to_json())

    def is_conditional(self, number: int, holder: Holder) -> bool:
        """Whether the store refuses to create what is there; one that does not has `holder` now as before."""
        if isinstance(self.folder, Path):
            return True
        try:
            self.create(number, holder)
        except FileExistsError:
            return True
        return False

    def write(self, number: int, holder: Holder) -> None:
        """Write one's own file anew."""
        storage.replace_file(self._path(number), holder.to_json())

    def remove_outnumbered(self, number: int) -> None:
        """Remove the files below a number, which say nothing any more, and what killed writers left beside those and
        that one; a file that cannot be removed stays.

        Who would still write one of them comes too late: there is a file of that number, or of a higher one.
        """
        with contextlib.suppress(Exception):
            for name in self._names():
                found, beside = _NAME.fullmatch(name), _BESIDE.fullmatch(name)
                if (found and int(found[1]) < number) or (beside and int(beside[1] or beside[2]) <= number):
                    storage.remove(self.folder / name)

    def _numbers(self) -> list[int]:
        return [int(found[1]) for name in self._names() if (found := _NAME.fullmatch(name))]

    def _names(self) -> list[str]:
        try:
            if isinstance(self.folder, Path):
                return [path.name for path in self.folder.iterdir()]
            return [str(path).rpartition("/")[2] for path in self.folder.fs.ls(self.folder.path, detail=False)]
        except FileNotFoundError:
            return []

    def _path(self, number: int) -> StoragePath:
        return self.folder / f"{number:08d}.json"


def _create_whole(path: Path, holder: Holder) -> None:
    """Write beside it, then link: a file that is there is whole.

    Where that does not work, for a reason that each kind of disk says in its own way, the file itself is created, which
    is as exclusive, and a kill may halve it.
    """
    partial = path.with_name(f"{path.name}.{holder.owner}.partial")
    try:
        partial.write_bytes(holder.to_json())
        try:
            os.link(partial, path)
        except FileExistsError:
            raise
        except OSError:
            with path.open("xb") as file:
                file.write(holder.to_json())
    finally:
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)
