"""What a Ray of one's own needs of a machine, where the machine does not give it: a folder and a token.

In: TMPDIR and RAY_TMPDIR as a batch system sets them, a home that is not there or not this user's (`docker run --user`,
OpenShift). Out: the folder in which Ray keeps its sessions, and a token in the environment where it cannot lie at home.
"""

import contextlib
import os
import secrets
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from slm_ray.errors import UserError

MAX_BASE_BYTES = 36
"""Longest path of the folder above. A socket's has at most 107 bytes on Linux and 103 on macOS, of which Ray takes
`/ray/session_2026-11-26_03-45-50_070549_4194304/sockets/plasma_store`."""
MAX_TMPDIR_BYTES = 70
"""Longest TMPDIR for the sockets of Python's multiprocessing (`/pymp-01234567/listener-01234567`), which Ray's
dashboard opens."""
MIN_FREE_BYTES = 2**24
USUAL = Path("/tmp")  # noqa: S108  # where Ray goes by itself
TOKEN_VARIABLES = ("RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH")


def session_folder() -> str:
    """The folder for Ray's sessions: below RAY_TMPDIR, or TMPDIR, or where that is of no use, /tmp.

    Raises:
        UserError: RAY_TMPDIR is of no use, or none of the others.
    """
    named = os.environ.get("RAY_TMPDIR")
    if named:
        folder = Path(named).absolute() / "ray"
        if reason := why_not(folder):
            raise UserError(f"RAY_TMPDIR ({named}) {reason}: set it to another folder")
        return str(folder)
    reason = ""
    for folder in (Path(os.environ.get("TMPDIR") or USUAL).absolute() / "ray", USUAL / "ray", _own_folder()):
        reason = why_not(folder)
        if not reason:
            return str(folder)
    raise UserError(
        f"Ray finds no folder for its files: {folder} {reason}; set RAY_TMPDIR to a folder of your own, "
        f"whose path has at most {MAX_BASE_BYTES} bytes"
    )


@contextlib.contextmanager
def short_tmpdir(folder: str) -> Iterator[None]:
    """Let the processes that are started within the block put their files beside Ray's `folder`, where the folder for
    temporary files has too long a path for a socket. What this process writes goes where it went."""
    if len(os.fsencode(tempfile.gettempdir())) <= MAX_TMPDIR_BYTES:
        yield
        return
    before = os.environ.get("TMPDIR")
    os.environ["TMPDIR"] = str(Path(folder).parent)
    try:
        yield
    finally:
        if before is None:
            del os.environ["TMPDIR"]
        else:
            os.environ["TMPDIR"] = before


def why_not(folder: Path) -> str:
    """Why Ray cannot keep its sessions in a folder, which is made where it is absent; an empty word where it can."""
    length = len(os.fsencode(folder.parent))
    if length > MAX_BASE_BYTES:
        return f"has a path of {length} bytes, and the sockets below leave it {MAX_BASE_BYTES}"
    try:
        if not folder.exists():
            folder.mkdir(parents=True)
            folder.chmod(0o700 if folder == _own_folder() else 0o777)  # as Ray makes it: several users share it
        free = shutil.disk_usage(folder).free
    except OSError as error:
        return f"cannot be used ({error.strerror or error})"
    if not (folder.is_dir() and os.access(folder, os.W_OK | os.X_OK)):
        return "is not one that this user may write to"
    if folder == _own_folder() and folder.lstat().st_uid != os.getuid():
        return "belongs to another user"
    return f"has {free / 2**20:.0f} MiB left" if free < MIN_FREE_BYTES else ""


def _own_folder() -> Path:
    """For this user alone, where another made /tmp/ray and keeps it."""
    return USUAL / f"ray-{os.getuid()}" / "ray"


def keep_token() -> None:
    """A local Ray asks for a token, which it keeps at home; where there is no such place, it is in the environment.

    The environment is that of this process and of those it starts, which no other user can read.
    """
    if os.environ.get("RAY_AUTH_MODE", "token") != "token" or any(map(os.environ.get, TOKEN_VARIABLES)):
        return
    if not _has_token_at_home():
        os.environ["RAY_AUTH_TOKEN"] = secrets.token_hex(32)


def _has_token_at_home() -> bool:
    """Whether Ray finds its token in `~/.ray`, or can put one there."""
    try:
        folder = Path.home() / ".ray"
        if (token := folder / "auth_token").exists():
            return bool(token.read_text(encoding="utf-8").strip())
        folder.mkdir(parents=True, exist_ok=True)
        return os.access(folder, os.W_OK | os.X_OK)
    except (OSError, RuntimeError, ValueError):  # RuntimeError: it is not known where home is
        return False
