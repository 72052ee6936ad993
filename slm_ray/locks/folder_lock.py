"""A lock on a folder of this machine or of a shared disk.

In: a folder. Out: a block within which nobody else who asks for the lock gets it.
"""

import contextlib
import fcntl
import os
from collections.abc import Iterator
from pathlib import Path

from slm_ray.errors import UserError
from slm_ray.locks.lease import Lease


@contextlib.contextmanager
def locked(folder: Path, refusal: str, lease: Lease | None = None) -> Iterator[bool]:
    """Make a folder, and keep others who ask for it out until the end of the block or of this process.

    The folder itself is locked, so that no lock file is in the way of what lies there. One that was made for the lock
    and is still empty at the end is removed, by its owner, while it is locked. Where the file system has no locks for
    folders, as NFS, `lease` is held instead, or one of the folder's own. Gives whether it is the system's lock, which
    no dead process has.

    Raises:
        UserError: it is locked, with `refusal` as the message, or it cannot be made.
        LeaseLostError: at the end, where it was a lease and was lost.
    """
    new = [path for path in (folder, *folder.parents) if not path.exists()]
    descriptor, is_locked = _open_locked(folder, refusal)
    try:
        with contextlib.nullcontext() if is_locked else (lease or Lease(folder)).held(refusal):
            yield is_locked
    finally:
        with contextlib.suppress(OSError):  # not empty: there is something to keep
            for path in new:
                path.rmdir()
        os.close(descriptor)


def _open_locked(folder: Path, refusal: str) -> tuple[int, bool]:
    """A descriptor of the folder that is there now, and whether it is locked: its last owner may have removed it."""
    while True:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(folder, os.O_RDONLY)
        except OSError as error:
            raise UserError(f"cannot write to {folder}: {error.strerror or error}") from error
        try:
            is_locked = _lock(descriptor, refusal)
            with contextlib.suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(descriptor), folder.stat()):
                    return descriptor, is_locked
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)


def _lock(descriptor: int, refusal: str) -> bool:
    """Lock it. False where the file system has no locks for folders (ENOLCK, EOPNOTSUPP, EBADF and others say so)."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise UserError(refusal) from error
    except OSError:
        return False
    return True
