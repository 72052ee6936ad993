"""Whether a file can be written, asked before what takes minutes.

In: a path. Out: nothing, or the reason why not. Nothing is made; a disk may still be full at the end.
"""

import errno
import os
from pathlib import Path

from slm_ray.errors import UserError


def check_file(path: str) -> None:
    """Raises: UserError when there is no folder for the file, or it cannot be written to."""
    place = Path(path)
    if place.is_dir():
        raise _refusal(path, errno.EISDIR)
    if not place.parent.is_dir():
        raise _refusal(path, errno.ENOTDIR if place.parent.exists() else errno.ENOENT)
    if not os.access(place if place.exists() else place.parent, os.W_OK):
        raise _refusal(path, errno.EACCES)


def check_folder(path: str) -> None:
    """Raises: UserError when a folder, there or to be made, cannot be written to."""
    place = Path(path).absolute()
    there = next(one for one in (place, *place.parents) if one.exists())
    if not there.is_dir():
        raise _refusal(path, errno.ENOTDIR)
    if not os.access(there, os.W_OK | os.X_OK):
        raise _refusal(path, errno.EACCES)


def _refusal(path: str, number: int) -> UserError:
    return UserError(f"cannot write {path}: {os.strerror(number)}")
