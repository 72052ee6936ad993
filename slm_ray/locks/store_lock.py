"""One at a time in a place of an object store, on one machine and on several.

In: a place in a store, a folder of this machine. Out: a block within which nobody else has the place: its lease lies in
the store, and the lock of the folder here tells at once that another process of this machine is gone.
"""

import contextlib
from collections.abc import Iterator
from pathlib import Path

from slm_ray import storage
from slm_ray.locks import folder_lock
from slm_ray.locks.lease import Lease
from slm_ray.locks.process_identity import is_near, own_process

LEASE_OWNER = ".lease-owner"
"""In the folder of this machine: the last lease that a process here had, and which process."""


@contextlib.contextmanager
def locked(lease: Lease, here: Path, refusal: str) -> Iterator[None]:
    """Hold a lease for the length of a block; `here` is a folder that stands for its place on this machine.

    Raises:
        UserError: another one has it, with `refusal`, or that cannot be known, or the folder cannot be made.
        LeaseLostError: at the end, where it was lost within the block.
    """
    with folder_lock.locked(here, refusal) as is_certain:
        mine, dead_owner = here / LEASE_OWNER, ""
        with contextlib.suppress(OSError):  # without it the next one has to wait
            owner, _, process = storage.read_if_there(mine).decode(errors="replace").partition("\n")
            # whoever wrote it had the lock and has it no more; but two machines may see the folder, each with its locks
            if is_certain and is_near(process):
                dead_owner = owner
        with lease.held(refusal, dead_owner):
            with contextlib.suppress(OSError):
                storage.replace_file(mine, f"{lease.owner}\n{own_process()}".encode())
            yield
