"""The folder of one run: its checkpoints, and the links `latest` and `best` to two of them.

    runs/NAME/checkpoints/step-00000250/   a checkpoint each (see `checkpoint.py`)
    runs/NAME/latest, runs/NAME/best       links, moved by one atomic rename

In: checkpoints from the loop, rank 0 alone. Out: the latest valid one to resume from, the best one to register. A
`Mirror` keeps the same in an object store.
"""

import contextlib
import dataclasses
import logging
import math
import os
import re
import uuid
from dataclasses import dataclass
from pathlib import Path

from slm_ray import storage
from slm_ray.errors import UserError
from slm_ray.locks.lease import Lease
from slm_ray.runs import checkpoint
from slm_ray.runs.checkpoint import Checkpoint
from slm_ray.runs.mirror import Mirror, NoMirror
from slm_ray.runs.retention import steps_to_keep
from slm_ray.runs.train_state import Evaluation, TrainState
from slm_ray.runs.verification import CorruptCheckpointError, UnreadableCheckpointError, is_state_complete, is_valid

RAY_STATE = ".ray"
CHECKPOINT_NAME = re.compile(r"step-[0-9]{8,}")
CORRUPT = ".corrupt"
"""Ends the name of a checkpoint that was passed over."""
LOGGER = logging.getLogger(__name__)


@dataclass(frozen=True)
class RunFolder:
    """A run's place on a disk that all its workers see, or on each machine where a mirror holds the run."""

    path: Path
    mirror: Mirror = dataclasses.field(default_factory=NoMirror, compare=False)
    lease: Lease | None = dataclasses.field(default=None, compare=False)
    """The driver's right to write to the run, where several machines may ask for it."""

    @property
    def latest(self) -> Path:
        """Link to the newest checkpoint."""
        return self.path / "latest"

    @property
    def best(self) -> Path:
        """Link to the checkpoint with the lowest validation loss."""
        return self.path / "best"

    def best_step(self) -> int | None:
        """Step of the checkpoint that `best` points to, if there is one."""
        return _step(self.best.resolve()) if self.best.exists() else None

    def checkpoint_path(self, step: int) -> Path:
        """Folder of the checkpoint after `step` steps."""
        return self.path / "checkpoints" / f"step-{step:08d}"

    def checkpoints(self) -> list[Path]:
        """All checkpoints, oldest first. Raises: UnreadableCheckpointError when the folder cannot be listed now."""
        folder = self.path / "checkpoints"
        try:
            names = [path.name for path in folder.iterdir()]  # a glob takes an unreadable folder for an empty one
        except FileNotFoundError:
            return []
        except OSError as error:
            raise UnreadableCheckpointError(f"{folder} cannot be listed: {error.strerror}") from error
        return sorted(folder / name for name in names if CHECKPOINT_NAME.fullmatch(name))

    def latest_valid(self) -> Checkpoint | None:
        """The newest checkpoint whose every digest is right; corrupt ones are passed over with a warning.

        Raises:
            UnreadableCheckpointError: one of them could not be read now, which says nothing about it.
        """
        for path in reversed(self.checkpoints()):
            try:
                return Checkpoint.open(path)
            except CorruptCheckpointError as error:
                LOGGER.warning("passing over a corrupt checkpoint: %s", error)
        return None

    def latest_state(self) -> TrainState | None:
        """State of the newest checkpoint that has its marker and its `state.json`; no other file is read."""
        complete = (path for path in reversed(self.checkpoints()) if is_state_complete(path))
        return next(map(checkpoint.load_state, complete), None)

    def publish(self, step: int, *, is_best: bool, keep: int, keep_best: int) -> None:
        """Point `latest` (and `best`) to the checkpoint of `step`; drop those beyond the counts (see `steps_to_keep`).

        Raises:
            OSError: the disk or the mirror refused it.
            LeaseLostError: another driver has the run now; nothing was published.
        """
        self.check_lease()
        link(self.latest, self.checkpoint_path(step))
        if is_best:
            link(self.best, self.checkpoint_path(step))
        dropped = _dropped(self, step, keep, keep_best)
        for path in self.checkpoints():
            if _step(path) in dropped:
                checkpoint.remove(path)
        names = [self.checkpoint_path(at).name for at in dropped]
        with contextlib.suppress(OSError):  # it is said below; a machine lost between the two would leave a hole in it
            self.push_record()
        self.mirror.upload(self.path, self.checkpoint_path(step), self.checkpoints(), names)
        self.push_record()

    def remove_partial(self, step: int) -> None:
        """Remove what a killed writer left half done; put aside what came after `step`, at which the run continues.

        Checkpoints after the latest valid one are corrupt; the run writes them again. They stay as `step-N.corrupt`.
        """
        partial = [f"checkpoints/step-*{checkpoint.PARTIAL}", f"*.json*{checkpoint.PARTIAL}", ".summary.json.*"]
        links = [f"{name}.[0-9]*.link" for name in ("latest", "best")]
        for path in [path for pattern in (*partial, *links) for path in self.path.glob(pattern)]:
            storage.remove(path)
        for path in self.checkpoints():
            if _step(path) > step:
                aside = path.with_name(f"{path.name}{CORRUPT}")
                if aside.exists():  # an earlier one of that step
                    aside = path.with_name(f"{path.name}.{uuid.uuid4().hex[:8]}{CORRUPT}")
                LOGGER.warning("%s is corrupt, and the run continues at step %d: it is kept as %s", path, step, aside)
                path.rename(aside)

    def check_lease(self) -> None:
        """Pass where the run is this driver's. Raises: LeaseLostError; OSError when that cannot be known now."""
        if self.lease is not None:
            self.lease.check()

    @property
    def address(self) -> str:
        """Where the run is kept."""
        return self.mirror.address or str(self.path)

    @property
    def is_watched(self) -> bool:
        """Whether the driver sees what the workers write while they write it; with a mirror it comes at the end."""
        return not self.mirror.address

    def request_stop(self) -> None:
        """Ask the run's workers to save and leave; rank 0 looks for the file after each step.

        Raises:
            OSError: the disk refused it.
            LeaseLostError: they are another driver's now.
        """
        if self.lease is not None:
            self.lease.raise_if_lost()  # or it would stop another driver's
        (self.path / "stop").touch()
        self.mirror.request_stop()

    def is_stop_requested(self) -> bool:
        """Whether they were asked."""
        return (self.path / "stop").exists() or self.mirror.is_stop_requested()

    def clear_requests(self) -> None:
        """Forget a request to stop, and what Ray keeps while a driver lives; a killed one leaves both behind.

        Raises:
            OSError: the disk or the mirror refused it.
            LeaseLostError: both are another driver's now.
        """
        self.check_lease()
        (self.path / "stop").unlink(missing_ok=True)
        storage.remove(self.path / RAY_STATE)
        self.mirror.remove("stop", RAY_STATE)

    def ray_storage(self) -> tuple[str, object | None]:
        """Path, and file system where it is not the disk's, for Ray's own state."""
        return self.mirror.ray_storage() or (str(self.path / RAY_STATE), None)

    def fetch(self) -> None:
        """Bring here what the mirror holds. Raises: UserError when it does not answer."""
        self.mirror.fetch(self.path)

    def push_record(self) -> None:
        """Copy the record, the summary and the plot to the mirror. Raises: OSError."""
        self.mirror.push_record(self.path)


def repair_links(run: RunFolder, latest: Checkpoint) -> Evaluation | None:
    """Point `latest` to a verified checkpoint, and `best` to the best one it knows of or the best of those left.

    Returns the evaluation of `best`; where no checkpoint left was validated there is no best one.
    """
    link(run.latest, latest.path)

    def is_usable(path: Path) -> bool:
        return path == latest.path or is_valid(path)

    best = latest.state.best
    if best is None or not is_usable(run.checkpoint_path(best.step)):
        states = [checkpoint.load_state(path) for path in run.checkpoints() if is_usable(path)]
        states = [state for state in states if state.step <= latest.state.step]
        found = [state.metrics for state in states if state.metrics]
        best = min((one for one in found if one.is_like(found[-1])), key=lambda m: m.val_loss, default=None)
    if best is None:
        run.best.unlink(missing_ok=True)
    else:
        link(run.best, run.checkpoint_path(best.step))
    return best


def refuse_corrupt(run: RunFolder) -> None:
    """Raises: UserError when there are checkpoints, here or in the mirror, and none that a run could continue from."""
    if run.checkpoints() or run.mirror.newest_state(run.path) is not None:
        where = run.address
        raise UserError(f"{where} holds a run whose checkpoints cannot be read: take another --name, or remove it")


def newest_run(output: Path) -> RunFolder | None:
    """The run with a checkpoint under `output` that was written to last, if there is one.

    Raises:
        UnreadableCheckpointError: that cannot be known now.
    """
    try:
        runs = [RunFolder(path) for path in output.iterdir() if path.is_dir()]
        begun = {run: (run.path / "checkpoints").stat().st_mtime for run in runs if run.checkpoints()}
    except FileNotFoundError:
        return None
    except OSError as error:
        raise UnreadableCheckpointError(f"{output} cannot be listed: {error.strerror}") from error
    return max(begun, key=begun.__getitem__, default=None)


def link(link: Path, target: Path) -> None:
    """Let `link` point to `target`, by one atomic rename."""
    fresh = link.with_name(f"{link.name}.{os.getpid()}.link")
    fresh.unlink(missing_ok=True)
    fresh.symlink_to(os.path.relpath(target, link.parent))
    fresh.replace(link)


def _dropped(run: RunFolder, step: int, keep: int, keep_best: int) -> set[int]:
    """Steps whose checkpoints go when that of `step` is published, here and in the mirror."""
    elsewhere = {at: loss for at, loss in run.mirror.val_losses().items() if at <= step}
    here = {_step(path): _val_loss(path) for path in run.checkpoints()}
    losses = elsewhere | {at: math.inf if loss is None else loss for at, loss in here.items()}
    linked = {_step(name.resolve()) for name in (run.latest, run.best) if name.exists()}
    dropped = losses.keys() - steps_to_keep(losses, keep=keep, keep_best=keep_best) - linked
    return dropped - {at for at, loss in here.items() if loss is None}  # what cannot be judged now is not dropped


def _step(path: Path) -> int:
    return int(path.name.removeprefix("step-"))


def _val_loss(path: Path) -> float | None:
    """Validation loss of a checkpoint, infinite where it has none; None where it cannot be read now."""
    try:
        metrics = checkpoint.load_state(path).metrics
    except UnreadableCheckpointError:
        return None
    except UserError:
        return math.inf
    return metrics.val_loss if metrics else math.inf
