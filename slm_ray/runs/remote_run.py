"""A run in an object store: written to a work folder of this machine, every complete checkpoint copied to the store.

    s3://BUCKET/RUNS/NAME/checkpoints/step-00000250/   a checkpoint each, its marker written last
    s3://BUCKET/RUNS/NAME/latest.txt, best.txt         the name of one of them
    s3://BUCKET/RUNS/NAME/metrics.jsonl, summary.json  as on a disk, as of the newest checkpoint

In: what `RunFolder` asks of its mirror. Out: the store holds the run. The store is the truth: a run continues from the
latest valid checkpoint there, so that workers on any machine agree on it.
"""

import contextlib
import hashlib
import os
import time
import uuid
from collections.abc import Iterator
from pathlib import Path

from slm_ray import storage
from slm_ray.errors import UserError
from slm_ray.runs import checkpoint, verification
from slm_ray.runs.run_folder import RAY_STATE, RunFolder, link
from slm_ray.storage import StoragePath, storage_path

STOP_POLL_S = 5.0
RECORD = ("metrics.jsonl", "summary.json", "loss.png")


def open_run(output: str, name: str) -> RunFolder:
    """The folder of a run under `output`, which is a folder or the address of an object store.

    Raises:
        UserError: nothing reaches such an address.
    """
    if not storage.is_remote(output):
        return RunFolder(Path(str(storage_path(output))) / name)
    remote = storage_path(output) / name
    cache = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser()
    key = hashlib.sha256(remote.as_posix().encode()).hexdigest()[:16]
    return RunFolder(cache / "slm-ray" / "runs" / key / name, ObjectStoreMirror(remote))


class ObjectStoreMirror:
    """A run's place in a store."""

    def __init__(self, remote: StoragePath) -> None:
        self.remote = remote
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

    def upload(self, folder: Path, newest: Path, checkpoints: list[Path]) -> None:
        """Copy `newest` and what the store refused before, then the links; drop what is not among `checkpoints`.

        Raises:
            OSError: the store refused it.
        """
        with self._store_errors():
            there = set(self._checkpoints())
            for path in checkpoints:
                if path.name not in there or path == newest:
                    self._upload(path)
            for name in (folder / "latest", folder / "best"):
                if name.exists():
                    (self.remote / f"{name.name}.txt").write_text(name.resolve().name)
            for stale in there - {path.name for path in checkpoints}:
                self._discard(stale)

    def push_record(self, folder: Path) -> None:
        """Copy the record, the summary and the plot, as they are now. Raises: OSError."""
        with self._store_errors():
            for name in RECORD:
                if (folder / name).is_file():
                    (self.remote / name).write_bytes((folder / name).read_bytes())

    def fetch(self, folder: Path) -> None:
        """Bring the newest and the best valid checkpoint here, and drop newer ones that never came to the store.

        Raises:
            UserError: the store does not answer.
        """
        try:
            names = sorted(self._checkpoints())
            newest = next((name for name in reversed(names) if self._download(name, folder)), "")
            for path in RunFolder(folder).checkpoints():
                if path.name > newest:
                    _remove(path)
            for name in ("latest", "best"):
                pointed = self.remote / f"{name}.txt"
                target = pointed.read_text() if pointed.exists() else ""
                if target in names and self._download(target, folder):
                    link(folder / name, folder / "checkpoints" / target)
            self._fetch_record(folder)
        except UserError:
            raise
        except Exception as error:  # each store has errors of its own
            raise UserError(f"cannot read {self.address}: {error}") from error

    def _fetch_record(self, folder: Path) -> None:
        for name in RECORD:
            own, kept = folder / name, self.remote / name
            content = kept.read_bytes() if kept.exists() else b""
            if len(content) > (own.stat().st_size if own.exists() else 0):  # a record grows
                folder.mkdir(parents=True, exist_ok=True)
                storage.replace_file(own, content)

    def request_stop(self) -> None:
        """Leave a request to stop, which workers on other machines find; a store that does not answer is ignored."""
        with contextlib.suppress(Exception):
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
        """Remove files and folders of the run in the store."""
        for name in names:
            storage.remove(self.remote / name)

    def _checkpoints(self) -> list[str]:
        """Names of those in the store that have their marker."""
        return [path.parent.name for path in self.remote.glob(f"checkpoints/step-*/{verification.MARKER}")]

    def _upload(self, path: Path) -> None:
        target = self.remote / "checkpoints" / path.name
        storage.remove(target / verification.MARKER)
        files = sorted(file.relative_to(path).as_posix() for file in path.rglob("*") if file.is_file())
        for name in sorted(files, key=lambda name: name == verification.MARKER):  # the marker last
            (target / name).write_bytes((path / name).read_bytes())

    def _discard(self, name: str) -> None:
        self.remove(f"checkpoints/{name}/{verification.MARKER}", f"checkpoints/{name}")

    def _download(self, name: str, folder: Path) -> bool:
        """Have a checkpoint here; returns whether it is valid, for what lies in the store may be corrupt too."""
        target = folder / "checkpoints" / name
        if verification.is_valid(target):
            return True
        source = self.remote / "checkpoints" / name
        partial = target.with_name(f"{name}.{uuid.uuid4().hex[:8]}{checkpoint.PARTIAL}")
        for file in storage.files_below(source):
            own = partial / file.as_posix().removeprefix(source.as_posix()).lstrip("/")
            own.parent.mkdir(parents=True, exist_ok=True)
            own.write_bytes(file.read_bytes())
        is_valid = verification.is_valid(partial)
        if is_valid:
            _remove(target)
            with contextlib.suppress(OSError):  # another worker of this machine was faster
                partial.rename(target)
        storage.remove(partial)
        return is_valid and target.is_dir()

    @contextlib.contextmanager
    def _store_errors(self) -> Iterator[None]:
        """What a store refuses is an `OSError`, as on a disk."""
        try:
            yield
        except OSError:
            raise
        except Exception as error:  # each store has errors of its own
            raise OSError(f"{self.address}: {error}") from error


def _remove(path: Path) -> None:
    """Remove a checkpoint, unless another worker of this machine was faster."""
    with contextlib.suppress(FileNotFoundError):
        checkpoint.remove(path)
