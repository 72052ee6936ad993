"""A user whom the machine does not know, as `docker run --user` and OpenShift make one: no name, no home."""

import os
import shutil
import subprocess
from pathlib import Path

from slm_ray.distributed import surroundings
from tests.support.paths import ROOT

UID = 12345
WORDS = ["setpriv", f"--reuid={UID}", f"--regid={UID}", "--clear-groups"]
READS_ALL = ["--inh-caps=+dac_read_search", "--ambient-caps=+dac_read_search"]  # the interpreter may lie at root's home
TMPDIR_BYTES = 130
"""More than a socket's path may have, as batch systems make them."""


def as_nobody() -> list[str]:
    """Words before a command that make it one of a user whom the machine does not know, where that is allowed."""
    words = [*WORDS, *READS_ALL]
    is_allowed = shutil.which("setpriv") and subprocess.run([*words, "true"], capture_output=True).returncode == 0
    return words if is_allowed else []


def folder_of_nobody(folder: Path) -> Path:
    """A working folder that is that user's; it holds `tmp` with a long path."""
    folder.mkdir()
    name = "x" * (TMPDIR_BYTES - len(os.fsencode(folder)) - 1)
    (folder / name).mkdir()
    if as_nobody():
        for path in (folder, folder / name):
            os.chown(path, UID, UID)
    return folder


def environment_of_nobody(folder: Path) -> dict[str, str]:
    """The environment in such a container: no name, no home that can be written to, a TMPDIR that no socket fits in."""
    hidden = {"USER", "LOGNAME", "RAY_TMPDIR", "MLFLOW_TRACKING_URI", *surroundings.TOKEN_VARIABLES}
    kept = {name: value for name, value in os.environ.items() if name not in hidden}
    (long,) = [path for path in folder.iterdir() if path.name.startswith("xx")]
    assert len(os.fsencode(long)) == TMPDIR_BYTES
    return kept | {"PYTHONPATH": str(ROOT), "RAY_ADDRESS": "local", "TMPDIR": str(long), "HOME": "/dev/null"}
