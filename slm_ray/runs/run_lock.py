"""One driver at a time works on a run: on one machine by a lock, on several by a lease.

In: a run's folder. Out: a block within which no other driver has the run. A run in an object store has its lease there,
and the lock of its work folder here; one on a disk without locks has its lease in its folder.
"""

import contextlib
from collections.abc import Iterator

from slm_ray.locks import folder_lock, store_lock
from slm_ray.locks.lease import Lease
from slm_ray.runs.run_folder import RunFolder


@contextlib.contextmanager
def locked(run: RunFolder, command: str = "train.py") -> Iterator[None]:
    """Make the folder, and keep other drivers out of the run for the length of a block, also those of other machines.

    command: what writes there, in words for who is refused.

    Raises:
        UserError: there is one already, or that cannot be known, or the folder cannot be made.
        LeaseLostError: at the end, where another driver has taken the run over within the block.
    """
    refusal = f"another {command} is writing to {run.address}: wait for its end, or take another --name"
    lease = run.lease or Lease(run.path)
    if not run.mirror.address:
        with folder_lock.locked(run.path, refusal, lease):
            yield
        return
    with store_lock.locked(lease, run.path, refusal):
        yield
