"""Whether a work folder is of the run that is in the store, or of one that had its name before.

In: the run's place in the store, and a work folder. Out: a random word in both, `run.id`, which they have in common
when they are of one run.
"""

import uuid
from pathlib import Path

from slm_ray import storage
from slm_ray.runs import ownership
from slm_ray.runs.remote_checkpoints import put_aside
from slm_ray.storage import StoragePath

IDENTITY = "run.id"
MLFLOW_ID = "mlflow.id"
"""The run's id at MLflow, for checkpoints that were written while the server was away."""
RECORD = ("metrics.jsonl", "summary.json", "loss.png", MLFLOW_ID)
"""Of a run, beside its checkpoints."""


class RemoteIdentity:
    """The word of one run in a store. Any method raises what the store's client raises."""

    def __init__(self, remote: StoragePath) -> None:
        self._place = remote / IDENTITY

    def is_of(self, folder: Path) -> bool:
        """Whether the work folder is of this run; both may be without a word."""
        return _read(folder / IDENTITY) == _read(self._place)

    def put_others_aside(self, folder: Path) -> None:
        """Put aside what the work folder has of another run, and let it be of this one.

        A record as in the store stays: a driver whose workers are on other nodes has sent it before they gave the run
        its word.
        """
        for path in sorted(folder.glob("checkpoints/step-*")):
            if not path.suffix:
                put_aside(path)
        for name in RECORD:
            if _read(folder / name) != _read(self._place.parent / name):
                put_aside(folder / name)
        for name in ("latest", "best"):
            (folder / name).unlink(missing_ok=True)
        ownership.mark(folder)
        storage.replace_file(folder / IDENTITY, _read(self._place).encode())

    def share(self, folder: Path) -> None:
        """Give the run its word, once, there and then here."""
        identity = _read(self._place)
        if not identity:
            identity = uuid.uuid4().hex
            self._place.write_text(identity)
        ownership.mark(folder)
        storage.replace_file(folder / IDENTITY, identity.encode())


def _read(place: StoragePath) -> str:
    return storage.read_if_there(place).decode(errors="replace")
