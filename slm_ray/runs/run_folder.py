"""The folder of one run: its checkpoints, and the links `latest` and `best` to two of them.

    runs/NAME/checkpoints/step-00000250/   a checkpoint each (see `checkpoint.py`)
    runs/NAME/latest, runs/NAME/best       links, moved by one atomic rename

In: checkpoints from the loop, rank 0 alone. Out: the newest whole one to resume from, the best one to register.
"""

import contextlib
import json
import logging
import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from slm_ray import storage
from slm_ray.errors import UserError
from slm_ray.runs import checkpoint

RAY_STATE = ".ray"
LOGGER = logging.getLogger(__name__)


@dataclass(frozen=True)
class RunFolder:
    """A run's place on a disk that all its workers see."""

    path: Path

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
        return int(self.best.resolve().name.removeprefix("step-")) if self.best.exists() else None

    def checkpoint_path(self, step: int) -> Path:
        """Folder of the checkpoint after `step` steps."""
        return self.path / "checkpoints" / f"step-{step:08d}"

    def checkpoints(self) -> list[Path]:
        """All checkpoints, oldest first."""
        return sorted(path for path in self.path.glob("checkpoints/step-*") if not path.suffix)

    def publish(self, step: int, *, is_best: bool, keep: int, keep_best: int) -> None:
        """Point `latest` (and `best`) to the checkpoint of `step`; drop what neither a link nor the counts hold.

        Kept are the newest `keep` and the `keep_best` of the lowest validation loss.
        """
        target = self.checkpoint_path(step)
        link(self.latest, target)
        if is_best:
            link(self.best, target)
        ranked = sorted((path for path in self.checkpoints() if math.isfinite(_val_loss(path))), key=_val_loss)
        kept = (*self.checkpoints()[-keep:], *ranked[:keep_best], self.best, self.latest)
        names = {path.resolve() for path in kept}
        for path in self.checkpoints():
            if path.resolve() not in names:
                checkpoint.remove(path)

    def relink(self, latest_step: int, best: dict[str, float]) -> dict[str, float]:
        """Point `latest` to a step and `best` to the best one, or to the best of those left; gives its metrics.

        Where no checkpoint left was validated there is no best one: then the result is empty.
        """
        link(self.latest, self.checkpoint_path(latest_step))
        if not self._is_whole(self.checkpoint_path(int(best.get("step", -1)))):
            whole = [path for path in self.checkpoints() if self._is_whole(path)]
            states = [state for path in whole if (state := checkpoint.load_state(path)).step <= latest_step]
            validated = [state for state in states if "val_loss" in state.metrics]
            if not validated:
                self.best.unlink(missing_ok=True)
                return {}
            state = min(validated, key=lambda state: state.metrics["val_loss"])
            best = {"step": state.step, **state.metrics}
        link(self.best, self.checkpoint_path(int(best["step"])))
        return best

    def _is_whole(self, path: Path) -> bool:
        try:
            checkpoint.verify(path)
        except UserError:
            return False
        return True

    def sweep_leftovers(self, step: int) -> None:
        """Remove what a killed writer left half done, and what came after `step`, at which the run goes on.

        Checkpoints after the newest whole one are damaged; the run writes them again.
        """
        for path in [*self.path.glob(f"**/*{checkpoint.PARTIAL}"), *self.path.glob("*.link")]:
            storage.remove(path)
        for path in self.checkpoints():
            if path.name > self.checkpoint_path(step).name:
                LOGGER.warning("removing %s: it is damaged, and the run goes on at step %d", path, step)
                checkpoint.remove(path)

    def latest_valid(self) -> Path | None:
        """The newest checkpoint whose every digest is right; damaged ones are passed over with a warning."""
        for path in reversed(self.checkpoints()):
            try:
                checkpoint.verify(path)
            except UserError as error:
                LOGGER.warning("passing over a damaged checkpoint: %s", error)
            else:
                return path
        return None

    def locked(self) -> contextlib.AbstractContextManager[None]:
        """Make the folder, and keep other drivers of this machine out of it for the length of a block.

        Raises (on entering):
            UserError: there is one already, or the folder cannot be made.
        """
        refusal = f"another train.py is writing to {self.path}: wait for its end, or take another --name"
        return storage.locked(self.path, refusal)

    @property
    def is_watched(self) -> bool:
        """Whether the driver sees what the workers write while they write it."""
        return True

    def request_stop(self) -> None:
        """Ask the run's workers to save and leave; rank 0 looks for the file after each step."""
        (self.path / "stop").touch()

    def is_stop_requested(self) -> bool:
        """Whether they were asked."""
        return (self.path / "stop").exists()

    def clear_requests(self) -> None:
        """Forget a request to stop, and what Ray keeps while a driver lives; a killed one leaves both behind."""
        for name in ("stop", RAY_STATE):
            storage.remove(self.path / name)

    def clear_outcome(self) -> None:
        """Before a start: forget how it ended the last time."""
        for name in ("summary.json", "error.txt"):
            storage.remove(self.path / name)

    @property
    def address(self) -> str:
        """Where the run is kept."""
        return str(self.path)

    def ray_storage(self) -> tuple[str, object | None]:
        """Path, and file system where it is not the disk's, for Ray's own state."""
        return str(self.path / RAY_STATE), None

    def fetch(self) -> None:
        """Bring here what is kept elsewhere: nothing, where the folder itself is the place."""

    def push_record(self) -> None:
        """Copy the record, the summary and the plot to where the run is kept: here, nothing is to do."""

    def has_summary(self) -> bool:
        """Whether the run came to an end, good or bad."""
        return (self.path / "summary.json").is_file()

    def read_summary(self) -> dict[str, Any]:
        """What `write_summary` left.

        Raises:
            UserError: there is none on this machine; the workers wrote to a disk that is not shared.
        """
        try:
            summary: dict[str, Any] = json.loads((self.path / "summary.json").read_text(encoding="utf-8"))
        except FileNotFoundError as error:
            raise UserError(
                f"the workers left nothing in {self.path} that this machine sees: give an --output that all nodes share"
            ) from error
        return summary

    def write_summary(self, summary: dict[str, Any]) -> None:
        """Leave the run's result beside its checkpoints, as `summary.json`."""
        partial = self.path / "summary.json.partial"
        partial.write_text(json.dumps(summary, indent=2, sort_keys=True) + "\n", encoding="utf-8")
        partial.replace(self.path / "summary.json")


def newest_run(output: Path) -> RunFolder:
    """The run under `output` that was written to last.

    Raises:
        UserError: there is none.
    """
    runs = [path.parent for path in output.glob("*/checkpoints") if RunFolder(path.parent).checkpoints()]
    if not runs:
        raise UserError(f"nothing to resume: no run with a checkpoint under {output}")
    return RunFolder(max(runs, key=lambda run: (run / "checkpoints").stat().st_mtime))


def _val_loss(path: Path) -> float:
    """Validation loss of a checkpoint, infinite where it has none that can be read."""
    try:
        return checkpoint.load_state(path).metrics.get("val_loss", math.inf)
    except UserError:
        return math.inf


def link(link: Path, target: Path) -> None:
    """Let `link` point to `target`, by one atomic rename."""
    fresh = link.with_name(f"{link.name}.{os.getpid()}.link")
    fresh.unlink(missing_ok=True)
    fresh.symlink_to(os.path.relpath(target, link.parent))
    fresh.replace(link)
