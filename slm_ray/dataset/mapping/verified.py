"""Which large files were read through and found whole, so that nobody reads them through again.

In: a file's marks (size, time of change, inode, digest). Out: whether this process, or another of this machine, found
that very file whole. A process remembers what it checked; for the others of its machine it leaves a marker beside the
file, with the marks and the name of the machine since its start; where nothing can be written there, in the user's
cache folder.
"""

import contextlib
import hashlib
import json
import os
import platform
import time
import uuid
from collections.abc import Iterator
from pathlib import Path

from slm_ray.storage import cache_folder, replace_file

Marks = tuple[int, int, int, str]

TICK_S = 0.02
"""A file system may give changes within one tick of the kernel's clock, at most 10 ms, one time."""
MACHINES_KEPT = 64
_CHECKED: set[tuple[str, Marks]] = set()


def marks_of(status: os.stat_result, sha256: str) -> Marks:
    """What changes when a file is written or replaced, and the digest that it should have."""
    return status.st_size, status.st_mtime_ns, status.st_ino, sha256


def is_verified(path: Path, marks: Marks, *, by_others: bool) -> bool:
    """Whether this process found this very file whole, or `by_others`, another of this machine."""
    if (str(path), marks) in _CHECKED:
        return True
    if by_others and any(_read(marker).get(_machine()) == [*marks] for marker in _markers(path)):
        _CHECKED.add((str(path), marks))
        return True
    return False


def remember(path: Path, marks: Marks) -> None:
    """Keep that a file is whole, and tell the other processes of this machine, where the marker can be written."""
    time.sleep(TICK_S)  # from here on a change of the file has another time
    _CHECKED.add((str(path), marks))
    for marker in _markers(path):
        known = {name: found for name, found in _read(marker).items() if name != _machine()}
        kept = dict([*known.items()][1 - MACHINES_KEPT :]) | {_machine(): [*marks]}
        with contextlib.suppress(OSError):
            marker.parent.mkdir(parents=True, exist_ok=True)
            replace_file(marker, json.dumps(kept).encode())
            return


def marker_path(path: Path) -> Path:
    """Where the marker of a file lies."""
    return path.with_suffix(".verified")


def _markers(path: Path) -> Iterator[Path]:
    """Places for the marker of a file, the second for where the first cannot be written."""
    yield marker_path(path)
    with contextlib.suppress(RuntimeError):  # no home has no cache
        yield cache_folder() / "verified" / f"{hashlib.sha256(str(path).encode()).hexdigest()[:16]}.json"


def _read(marker: Path) -> dict[str, object]:
    try:
        found = json.loads(marker.read_bytes())
    except (OSError, ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def _machine() -> str:
    """This machine since its start, where it says so."""
    with contextlib.suppress(OSError):
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return f"{platform.node()}-{uuid.getnode():x}"
