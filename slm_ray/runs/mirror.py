"""The place besides its folder where a run is kept.

`remote_run.ObjectStoreMirror` keeps it in an object store; a run on a shared disk has `NoMirror`.
"""

from pathlib import Path
from typing import Protocol

from slm_ray.runs.train_state import TrainState


class Mirror(Protocol):
    """What `RunFolder` asks of the other place; `folder` is the run's folder on this machine."""

    @property
    def address(self) -> str:
        """Where the run is kept; empty where its folder is the only place."""

    def upload(self, folder: Path, newest: Path, checkpoints: list[Path], dropped: list[str]) -> None:
        """Let the other place hold these checkpoints, `newest` anew, and the links; drop those named in `dropped`.

        Raises: OSError.
        """

    def val_losses(self) -> dict[int, float]:
        """By its step, the validation loss of each checkpoint there, infinite where it was not validated."""

    def newest_state(self, folder: Path) -> TrainState | None:
        """State of the newest checkpoint, read without changing anything. Raises: UserError when nothing answers."""

    def push_record(self, folder: Path) -> None:
        """Copy the record, the summary and the plot there. Raises: OSError."""

    def fetch(self, folder: Path) -> None:
        """Bring here what is kept there. Raises: UserError when the other place does not answer."""

    def request_stop(self) -> None:
        """Leave a request to stop there."""

    def is_stop_requested(self) -> bool:
        """Whether there is one."""

    def remove(self, *names: str) -> None:
        """Remove files and folders of the run there. Raises: OSError."""

    def ray_storage(self) -> tuple[str, object] | None:
        """Path and file system for Ray's own state, where it has to lie there."""


class NoMirror:
    """The run is in its folder only."""

    address = ""

    def upload(self, folder: Path, newest: Path, checkpoints: list[Path], dropped: list[str]) -> None:
        """Nothing."""

    def val_losses(self) -> dict[int, float]:
        """None."""
        return {}

    def newest_state(self, folder: Path) -> None:
        """None."""

    def push_record(self, folder: Path) -> None:
        """Nothing."""

    def fetch(self, folder: Path) -> None:
        """Nothing."""

    def request_stop(self) -> None:
        """Nothing."""

    def is_stop_requested(self) -> bool:
        """No."""
        return False

    def remove(self, *names: str) -> None:
        """Nothing."""

    def ray_storage(self) -> None:
        """None."""
