"""The place besides its folder where a run is kept.

`remote_run.ObjectStoreMirror` keeps it in an object store; a run on a shared disk has `NoMirror`.
"""

from pathlib import Path
from typing import Protocol


class Mirror(Protocol):
    """What `RunFolder` asks of the other place; `folder` is the run's folder on this machine."""

    @property
    def address(self) -> str:
        """Where the run is kept; empty where its folder is the only place."""

    def upload(self, folder: Path, newest: Path, checkpoints: list[Path]) -> None:
        """Let the other place hold these checkpoints, `newest` anew, no others, and the links. Raises: OSError."""

    def push_record(self, folder: Path) -> None:
        """Copy the record, the summary and the plot there. Raises: OSError."""

    def fetch(self, folder: Path) -> None:
        """Bring here what is kept there. Raises: UserError when the other place does not answer."""

    def request_stop(self) -> None:
        """Leave a request to stop there."""

    def is_stop_requested(self) -> bool:
        """Whether there is one."""

    def remove(self, *names: str) -> None:
        """Remove files and folders of the run there."""

    def ray_storage(self) -> tuple[str, object] | None:
        """Path and file system for Ray's own state, where it has to lie there."""


class NoMirror:
    """The run is in its folder only."""

    address = ""

    def upload(self, folder: Path, newest: Path, checkpoints: list[Path]) -> None:
        """Nothing."""

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
