"""A run in an object store: written to a work folder of this machine, and every whole checkpoint copied to the store.

    s3://BUCKET/RUNS/NAME/checkpoints/step-00000250/   a checkpoint each, its marker written last
    s3://BUCKET/RUNS/NAME/latest.txt, best.txt         the name of one of them
    s3://BUCKET/RUNS/NAME/metrics.jsonl, summary.json  as on a disk, as of the newest checkpoint

In: what `RunFolder` is asked for. Out: the same, and the store holds it. The store is the truth: a run continues from
the newest whole checkpoint there, so that workers on any machine agree on it.
"""

import contextlib
import hashlib
import os
import time
import uuid
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from slm_ray import storage
from slm_ray.errors import UserError
from slm_ray.runs import checkpoint
from slm_ray.runs.run_folder import RAY_STATE, RunFolder, link
from slm_ray.storage import StoragePath

STOP_POLL_S = 5.0
RECORD = ("metrics.jsonl", "summary.json", "loss.png")


def open_run(output: str, name: str) -> RunFolder:
    """The folder of a run under `output`, which is a folder or the address of an object store.

    Raises:
        UserError: nothing reaches such an address.
    """
    if "://" not in output or output.startswith("file://"):
        return RunFolder(Path(str(storage.storage_path(output))) / name)
    remote = storage.storage_path(output) / name
    cache = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser()
    key = hashlib.sha256(remote.as_posix().encode()).hexdigest()[:16]
    return MirroredRun(cache / "slm-ray" / "runs" / key / name, remote)


@dataclass(frozen=True)
class MirroredRun(RunFolder):
    """A run's work folder, and its place in a store."""

    remote: StoragePath
    _asked: dict[str, float] = field(default_factory=dict, compare=False, repr=False)

    @property
    def address(self) -> str:
        """Where the run is kept."""
        return self.remote.as_posix()

    @property
    def is_watched(self) -> bool:
        """The workers may be on other machines, and their record comes here at the end."""
        return False

    def ray_storage(self) -> tuple[str, object | None]:
        """Path and file system for Ray's own state: every machine has to reach it."""
        import pyarrow.fs

        state = self.remote / RAY_STATE
        return state.path.rstrip("/"), pyarrow.fs.PyFileSystem(pyarrow.fs.FSSpecHandler(state.fs))  # type: ignore[union-attr]

    def publish(self, step: int, *, is_best: bool, keep: int, keep_best: int) -> None:
        """On the disk, then in the store.

        Raises:
            OSError: one of them refused it.
        """
        super().publish(step, is_best=is_best, keep=keep, keep_best=keep_best)
        with self._said():
            there, here = set(self._remote_checkpoints()), self.checkpoints()
            for path in here:
                if path.name not in there or path == self.checkpoint_path(step):  # or what the store refused before
                    self._upload(path)
            for name in (self.latest, self.best):
                if name.exists():
                    (self.remote / f"{name.name}.txt").write_text(name.resolve().name)
            for stale in there - {path.name for path in here}:
                self._discard(stale)
        self.push_record()

    def push_record(self) -> None:
        """Copy the record, the summary and the plot, as they are now."""
        with self._said():
            for name in RECORD:
                if (self.path / name).is_file():
                    (self.remote / name).write_bytes((self.path / name).read_bytes())

    def write_summary(self, summary: dict[str, object]) -> None:
        """Leave the run's result beside its checkpoints, here and in the store."""
        super().write_summary(summary)
        self.push_record()

    def fetch(self) -> None:
        """Bring the newest and the best whole checkpoint here, and drop newer ones that never came to the store.

        Raises:
            UserError: the store does not answer.
        """
        try:
            names = sorted(self._remote_checkpoints())
            newest = next((name for name in reversed(names) if self._download(name)), "")
            for path in self.checkpoints():
                if path.name > newest:
                    _remove(path)
            for name in ("latest", "best"):
                pointed = self.remote / f"{name}.txt"
                target = pointed.read_text() if pointed.exists() else ""
                if target in names and self._download(target):
                    link(self.path / name, self.path / "checkpoints" / target)
            self._fetch_record()
        except UserError:
            raise
        except Exception as error:  # each store has errors of its own
            raise UserError(f"cannot read {self.address}: {error}") from error

    def _fetch_record(self) -> None:
        for name in RECORD:
            own, kept = self.path / name, self.remote / name
            content = kept.read_bytes() if kept.exists() else b""
            if len(content) > (own.stat().st_size if own.exists() else 0):  # a record grows
                self.path.mkdir(parents=True, exist_ok=True)
                storage.replace_file(own, content)

    def request_stop(self) -> None:
        """Ask the run's workers to save and leave; those on another machine hear of it where the store answers."""
        super().request_stop()
        with contextlib.suppress(Exception):
            (self.remote / "stop").write_bytes(b"")

    def is_stop_requested(self) -> bool:
        """Whether they were asked; the store is looked at every few seconds."""
        if super().is_stop_requested():
            return True
        if time.monotonic() - self._asked.get("at", -STOP_POLL_S) < STOP_POLL_S:
            return False
        self._asked["at"] = time.monotonic()
        with contextlib.suppress(Exception):  # a store that does not answer now is no reason to stop
            return bool((self.remote / "stop").exists())
        return False

    def clear_requests(self) -> None:
        """Forget a request to stop, and what Ray keeps while a driver lives."""
        super().clear_requests()
        for name in ("stop", RAY_STATE):
            storage.remove(self.remote / name)

    def clear_outcome(self) -> None:
        """Before a start: forget how it ended the last time."""
        super().clear_outcome()
        storage.remove(self.remote / "summary.json")

    def _remote_checkpoints(self) -> list[str]:
        """Names of those in the store that have their marker."""
        return [path.parent.name for path in self.remote.glob(f"checkpoints/step-*/{checkpoint.MARKER}")]

    def _upload(self, path: Path) -> None:
        target = self.remote / "checkpoints" / path.name
        storage.remove(target / checkpoint.MARKER)
        files = sorted(file.relative_to(path).as_posix() for file in path.rglob("*") if file.is_file())
        for name in sorted(files, key=lambda name: name == checkpoint.MARKER):  # the marker last
            (target / name).write_bytes((path / name).read_bytes())

    def _discard(self, name: str) -> None:
        storage.remove(self.remote / "checkpoints" / name / checkpoint.MARKER)
        storage.remove(self.remote / "checkpoints" / name)

    def _download(self, name: str) -> bool:
        """Have a checkpoint here; gives whether it is whole, for what lies in the store may be damaged too."""
        target = self.path / "checkpoints" / name
        if self._is_whole(target):
            return True
        source = self.remote / "checkpoints" / name
        partial = target.with_name(f"{name}.{uuid.uuid4().hex[:8]}{checkpoint.PARTIAL}")
        for file in storage.files_below(source):
            own = partial / file.as_posix().removeprefix(source.as_posix()).lstrip("/")
            own.parent.mkdir(parents=True, exist_ok=True)
            own.write_bytes(file.read_bytes())
        if self._is_whole(partial):
            _remove(target)
            with contextlib.suppress(OSError):  # another worker of this machine was faster
                partial.rename(target)
        storage.remove(partial)
        return self._is_whole(target)

    @contextlib.contextmanager
    def _said(self) -> Iterator[None]:
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
