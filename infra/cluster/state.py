"""What is kept of a cluster between `up` and `down`: one folder, for this user alone.

In: the layout and its parts as they start. Out: `state.json`, made before the first of them, so that what a failed `up`
has started can be ended; `token`, which Ray asks for; `environment`, for the user's shell.
"""

import dataclasses
import json
import os
import secrets
import shutil
import tempfile
from pathlib import Path

from infra.cluster.parts import Layout
from infra.cluster.processes import Part
from slm_ray.errors import UserError
from slm_ray.storage import replace_file

STATE, TOKEN, ENVIRONMENT, LOGS = "state.json", "token", "environment", "logs"
TOKEN_BYTES = 32
FORMAT = 1


@dataclasses.dataclass(frozen=True)
class State:
    """A cluster, as far as it was started."""

    layout: Layout
    parts: tuple[Part, ...] = ()


def begin(folder: Path, *, workers: int, cpus: int, base_port: int) -> State:
    """Make the folder of a new cluster.

    Raises:
        UserError: it holds a cluster already, or what is not a cluster's, or cannot be made.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        if others := sorted({path.name for path in folder.iterdir()} - {LOGS, STATE}):  # `end` would remove them
            raise UserError(f"{folder} holds {others[0]} already: a cluster needs a folder of its own, see --folder")
        try:
            _write_private(folder / STATE, "")  # of two at once, one is the first
        except FileExistsError as error:
            raise UserError(
                f"there is a cluster in {folder} already: look at `status`, or end it with `down`"
            ) from error
        return _begun(folder, workers=workers, cpus=cpus, base_port=base_port)
    except OSError as error:
        raise UserError(f"{folder} cannot be used: {error.strerror or error}") from error


def _begun(folder: Path, **options: int) -> State:
    try:
        ray_folder = Path(tempfile.mkdtemp(prefix="slm-", dir="/tmp"))  # short; for this user alone
        state = State(Layout(folder=folder, ray_folder=ray_folder, mark=secrets.token_hex(8), **options))
        for name in (LOGS, "mlflow"):
            (folder / name).mkdir(exist_ok=True)
        for name, content in ((TOKEN, secrets.token_hex(TOKEN_BYTES)), (ENVIRONMENT, state.layout.shell_lines())):
            (folder / name).unlink(missing_ok=True)
            _write_private(folder / name, content)
        write(state)
    except OSError:
        (folder / STATE).unlink(missing_ok=True)
        raise
    return state


def write(state: State) -> None:
    """Keep it. Raises: OSError."""
    layout = {name: str(value) for name, value in dataclasses.asdict(state.layout).items()}
    content = {"format": FORMAT, "layout": layout, "parts": [dataclasses.asdict(part) for part in state.parts]}
    path = state.layout.folder / STATE
    replace_file(path, json.dumps(content, indent=1).encode())
    path.chmod(0o600)


def read(folder: Path) -> State | None:
    """The cluster of a folder; None where there is none. A folder that was moved is taken for what it was.

    Raises:
        UserError: the file is not one of ours, or the copy of one.
    """
    state = _read(folder / STATE)
    if state is None or state.layout.folder.resolve() == folder.resolve():
        return state
    if _mark(state.layout.folder) == state.layout.mark:
        raise UserError(
            f"{folder / STATE} is a copy: the cluster is that of --folder {state.layout.folder}; remove the copy"
        )
    return dataclasses.replace(state, layout=dataclasses.replace(state.layout, folder=folder))


def _mark(folder: Path) -> str | None:
    """Of the cluster that a folder holds, as far as that can be seen."""
    try:
        state = _read(folder / STATE)
    except UserError:
        return None
    return state.layout.mark if state else None


def _read(path: Path) -> State | None:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if content["format"] != FORMAT:
            raise ValueError(f"format {content['format']}")
        kinds = {"workers": int, "cpus": int, "base_port": int, "mark": str}
        layout = {name: kinds.get(name, Path)(value) for name, value in content["layout"].items()}
        return State(Layout(**layout), tuple(Part(**part) for part in content["parts"]))
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path} is no state of a cluster, or one that was broken off ({error}): remove it") from error


def end(state: State) -> None:
    """Remove what a cluster leaves but its logs. Raises: OSError."""
    layout = state.layout
    for folder in (layout.ray_folder, layout.folder / "mlflow"):
        shutil.rmtree(folder, ignore_errors=True)
    for name in (TOKEN, ENVIRONMENT, STATE):  # the last word: before, `down` can be called again
        (layout.folder / name).unlink(missing_ok=True)


def _write_private(path: Path, content: str) -> None:
    """A new file that its owner alone may read, from its first byte on. Raises: FileExistsError."""
    with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w", encoding="utf-8") as file:
        file.write(content)
