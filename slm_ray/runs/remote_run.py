"""A run in an object store: written to a work folder of this machine, every complete checkpoint copied to the store.

    s3://BUCKET/RUNS/NAME/checkpoints/step-00000250/   a checkpoint each, its marker written last
    s3://BUCKET/RUNS/NAME/latest.txt, best.txt         the name of one of them
    s3://BUCKET/RUNS/NAME/metrics.jsonl, summary.json  as on a disk, as of the newest checkpoint
    s3://BUCKET/RUNS/NAME/run.id                       a random word: a work folder that has another is not of this run
    s3://BUCKET/RUNS/NAME/.lease/00000001.json         which driver may write to it (see `locks/lease.py`)

In: what `RunFolder` asks of its mirror. Out: the store holds the run. The store is the truth: a run continues from the
latest valid checkpoint there, so that workers on any machine agree on it. Nothing is dropped, here or there, because it
is not in the other place.
"""

import contextlib
import hashlib
import logging
import math
import os
import time
from collections.abc import Iterator
from pathlib import Path

from slm_ray import storage
from slm_ray.errors import UserError, one_line
from slm_ray.locks.lease import Lease
from slm_ray.runs import verification
from slm_ray.runs.checkpoint import Checkpoint
from slm_ray.runs.remote_checkpoints import RemoteCheckpoints
from slm_ray.runs.remote_identity import RECORD, RemoteIdentity
from slm_ray.runs.run_folder import RAY_STATE, RunFolder, link, repair_links
from slm_ray.runs.train_state import TrainState
from slm_ray.storage import StoragePath, storage_path

STOP_POLL_S = 5.0
LOGGER = logging.getLogger(__name__)


def open_run(output: str, name: str, lease: str = "") -> RunFolder:
    """The folder of a run under `output`, which is a folder or the address of an object store.

    `lease` is the token of the driver in whose name a worker writes.

    Raises:
        UserError: nothing reaches such an address.
    """
    if not storage.is_remote(output):
        path = Path(str(storage_path(output))) / name
        return RunFolder(path, lease=Lease(path, lease))
    remote = storage_path(output) / name
    cache = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser()
    key = hashlib.sha256(remote.as_posix().encode()).hexdigest()[:16]
    path, right = cache / "slm-ray" / "runs" / key / name, Lease(remote, lease)
    return RunFolder(path, ObjectStoreMirror(remote, right), right)


class ObjectStoreMirror:
    """A run's place in a store; nothing is written there once the lease is lost."""

    def __init__(self, remote: StoragePath, lease: Lease | None = None) -> None:
        self.remote = remote
        self._check = (lease or Lease(remote)).check
        self._checkpoints = RemoteCheckpoints(remote / "checkpoints", self._check)
        self._identity = RemoteIdentity(remote)
        self._asked_s = -STOP_POLL_S  # when the store was last asked for a request to stop

    @property
    def address(self) -> str:
        """Where the run is kept."""
        return self.remote.as_posix()

    def ray_storage(self) -> tuple[str, object]:
        """Path and file system for Ray's own state: every machine has to reach it."""
        import pyarrow.fs

        state = self.remote / RAY_STATE
        return state.path.rstrip("/"), pyarrow.fs.PyFileSystem(pyarrow.fs.FSSpecHandler(state.fs))  # type: ignore[union-attr]

    def upload(self, folder: Path, newest: Path, checkpoints: list[Path], dropped: list[str]) -> None:
        """Copy `newest` and what the store refused before, then the links; then drop those named in `dropped`.

        Raises:
            OSError: the store refused it, or a checkpoint is gone from this machine.
            LeaseLostError: another driver has the run now.
        """
        with _store_errors(self.address):
            self._check()
            self._identity.share(folder)
            there = set(self._checkpoints.names())
            for path in checkpoints:
                if path.name not in there or path == newest:
                    self._checkpoints.upload(path)
            self._check()  # copying takes minutes
            self._push_links(folder)
            for name in there.intersection(dropped):
                self._checkpoints.discard(name)

    def push_record(self, folder: Path) -> None:
        """Copy the record, the summary and the plot, as they are now. Raises: as `upload`."""
        with _store_errors(self.address):
            self._check()
            for name in RECORD:
                if (folder / name).is_file():
                    (self.remote / name).write_bytes((folder / name).read_bytes())

    def val_losses(self) -> dict[int, float]:
        """By its step, the loss of each checkpoint in the store; of those that cannot be read now, nothing."""
        losses: dict[int, float] = {}
        with contextlib.suppress(Exception):  # what is not known is not dropped
            for state in filter(None, map(self._checkpoints.state, self._checkpoints.names())):
                losses[state.step] = state.metrics.val_loss if state.metrics else math.inf
        return losses

    def newest_state(self, folder: Path) -> TrainState | None:
        """State of the newest checkpoint in the store, or here where the store has not got it yet; leaves no trace.

        Raises:
            UnreadableCheckpointError: the store does not answer, which says nothing about what is there.
            CorruptCheckpointError: there are checkpoints, and none that can be read.
        """
        with _reading(self.address):
            names = self._checkpoints.names()
            there = next(filter(None, map(self._checkpoints.state, reversed(names))), None)
            here = RunFolder(folder).latest_state() if self._identity.is_of(folder) else None
        if names and not (there or here):
            raise verification.CorruptCheckpointError(f"{self.address}: no checkpoint of this run can be read")
        return max(filter(None, (there, here)), key=lambda state: state.step, default=None)

    def fetch(self, folder: Path) -> None:
        """Bring the newest and the best valid checkpoint here, and newer ones of here, which the store refused, there.

        Raises:
            UnreadableCheckpointError: the store does not answer, which says nothing about what is there.
        """
        with _reading(self.address):
            if not self._identity.is_of(folder):
                self._identity.put_others_aside(folder)
            names = self._checkpoints.names()
            here = set(filter(lambda name: self._checkpoints.is_here(name, folder), names))
            newest = next((name for name in reversed(names) if self._checkpoints.download(name, folder)), "")
            for name in ("latest", "best"):
                target = storage.read_if_there(self.remote / f"{name}.txt").decode(errors="replace")
                if target in names and self._checkpoints.download(target, folder):
                    link(folder / name, folder / "checkpoints" / target)
            went_on = newest not in here and all(path.name <= newest for path in RunFolder(folder).checkpoints())
            self._fetch_record(folder, is_theirs=went_on)
        self._send_newer(folder, newest)

    def _send_newer(self, folder: Path, newest: str) -> None:
        """Copy complete checkpoints that came after the store's newest; one that is refused again stays here."""
        run = RunFolder(folder)
        unsent = [path for path in run.checkpoints() if path.name > newest and verification.is_valid(path)]
        if not unsent:
            return
        repair_links(run, Checkpoint.open(unsent[-1]))
        try:
            self.upload(folder, unsent[-1], unsent, [])
            self.push_record(folder)
        except OSError as error:
            LOGGER.warning("%s is on this machine only: %s", unsent[-1], one_line(error))

    def _push_links(self, folder: Path) -> None:
        for name in (folder / "latest", folder / "best"):
            if name.exists():
                (self.remote / f"{name.name}.txt").write_text(name.resolve().name)

    def _fetch_record(self, folder: Path, *, is_theirs: bool) -> None:
        """Have the store's record: where another machine went on with the run, also in place of a longer one."""
        for name in RECORD:
            own, content = folder / name, storage.read_if_there(self.remote / name)
            if content and (is_theirs or len(content) > (own.stat().st_size if own.exists() else 0)):  # a record grows
                folder.mkdir(parents=True, exist_ok=True)
                storage.replace_file(own, content)

    def request_stop(self) -> None:
        """Leave a request to stop, which workers on other machines find; a store that does not answer is ignored."""
        with contextlib.suppress(Exception):
            self._check()
            (self.remote / "stop").write_bytes(b"")

    def is_stop_requested(self) -> bool:
        """Whether there is one; the store is asked every few seconds."""
        if time.monotonic() - self._asked_s < STOP_POLL_S:
            return False
        self._asked_s = time.monotonic()
        with contextlib.suppress(Exception):  # a store that does not answer now is no reason to stop
            return bool((self.remote / "stop").exists())
        return False

    def remove(self, *names: str) -> None:
        """Remove files and folders of the run in the store. Raises: as `upload`."""
        with _store_errors(self.address):
            self._check()
            for name in names:
                storage.remove(self.remote / name)


@contextlib.contextmanager
def _reading(address: str) -> Iterator[None]:
    """A store that cannot be read is one line for the user."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # each store has errors of its own
        raise verification.UnreadableCheckpointError(f"cannot read {address}: {one_line(error)}") from error


@contextlib.contextmanager
def _store_errors(address: str) -> Iterator[None]:
    """What a store refuses is an `OSError`, as on a disk."""
    try:
        yield
    except (OSError, UserError):
        raise
    except Exception as error:  # each store has errors of its own
        raise OSError(f"{address}: {one_line(error)}") from error
