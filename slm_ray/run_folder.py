"""The folder of one run: its checkpoints, and the links `latest` and `best` to two of them.

    runs/NAME/checkpoints/step-00000250/   a checkpoint each (see `checkpoint.py`)
    runs/NAME/latest, runs/NAME/best       links, moved by one atomic rename

In: checkpoints from the loop, rank 0 alone. Out: the newest whole one to resume from, the best one to register.
"""

import json
import logging
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from slm_ray import checkpoint
from slm_ray.errors import UserError

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

    def checkpoint_path(self, step: int) -> Path:
        """Folder of the checkpoint after `step` steps."""
        return self.path / "checkpoints" / f"step-{step:08d}"

    def checkpoints(self) -> list[Path]:
        """All checkpoints, oldest first."""
        return sorted(path for path in self.path.glob("checkpoints/step-*") if not path.suffix)

    def publish(self, step: int, *, is_best: bool, keep: int) -> None:
        """Point `latest` (and `best`) to the checkpoint of `step`; drop what neither link nor `keep` holds."""
        target = self.checkpoint_path(step)
        _link(self.latest, target)
        if is_best:
            _link(self.best, target)
        kept = {path.resolve() for path in (*self.checkpoints()[-keep:], self.best, self.latest)}
        for path in self.checkpoints():
            if path.resolve() not in kept:
                shutil.rmtree(path)

    def relink(self, latest_step: int, best: dict[str, float]) -> dict[str, float]:
        """Point `latest` to a step and `best` to the best one, or to the best of those left; gives its metrics."""
        if not self.checkpoint_path(int(best.get("step", -1))).is_dir():
            states = [checkpoint.load_state(path) for path in self.checkpoints()]
            state = min((s for s in states if s.step <= latest_step), key=lambda s: s.metrics["val_loss"])
            best = {"step": state.step, **state.metrics}
        _link(self.latest, self.checkpoint_path(latest_step))
        _link(self.best, self.checkpoint_path(int(best["step"])))
        return best

    def sweep_leftovers(self) -> None:
        """Remove what a killed writer left half done."""
        for path in [*self.path.glob("checkpoints/*.partial"), *self.path.glob("*.link")]:
            path.unlink() if path.is_symlink() else shutil.rmtree(path)

    def newest_whole(self) -> Path | None:
        """The newest checkpoint whose every digest is right; damaged ones are passed over with a warning."""
        for path in reversed(self.checkpoints()):
            try:
                checkpoint.verify(path)
            except UserError as error:
                LOGGER.warning("passing over a damaged checkpoint: %s", error)
            else:
                return path
        return None

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
    runs = [path.parent for path in output.glob("*/checkpoints") if any(path.iterdir())]
    if not runs:
        raise UserError(f"nothing to resume: no run with a checkpoint under {output}")
    return RunFolder(max(runs, key=lambda run: (run / "checkpoints").stat().st_mtime))


def _link(link: Path, target: Path) -> None:
    fresh = link.with_name(link.name + ".link")
    fresh.unlink(missing_ok=True)
    fresh.symlink_to(os.path.relpath(target, link.parent))
    fresh.replace(link)
