"""One listening socket for all replicas of this machine: the command holds it, and hands it to each that starts.

In: a host and a port. Out: a socket at which any replica takes the next connection. While none is there, as between the
death of one and the start of the next, connections wait in it. It goes from process to process over a socket in a
folder that this user alone may enter and nobody else may move; either side asks the system who the other is.
"""

import contextlib
import os
import socket
import stat
import struct
import sys
import tempfile
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from slm_ray.errors import UserError

BACKLOG = 2048
HAND_OVER_S = 30.0
"""Longest time for a replica to get the socket from a command that is busy."""
MAX_FOLDER_BYTES = 80
"""Longest path of the folder above: a socket's has at most 107 bytes on Linux and 103 on macOS."""
_MARK = b"socket"
_MACOS_SOL_LOCAL, _MACOS_PEERCRED, _MACOS_XUCRED_BYTES = 0, 1, 76


@dataclass(frozen=True, kw_only=True)
class SharedListener:
    """Where a replica finds the socket, and by what it knows it."""

    path: str
    """Of the socket over which it is handed out."""
    address: tuple[Any, ...]
    """At which it listens, as `getsockname` says."""


def can_share() -> bool:
    """Whether this system hands sockets from process to process; Windows does not."""
    return hasattr(socket, "send_fds") and hasattr(socket, "AF_UNIX")


@contextlib.contextmanager
def shared_listener(host: str, port: int) -> Iterator[SharedListener]:
    """Listen at an address; yields what `receive_listener` needs to get the socket.

    Raises:
        UserError: the address cannot be listened on, or other users may write to each folder for temporary files.
    """
    folder = safe_folder([Path(tempfile.gettempdir()), Path("/tmp")])  # noqa: S108
    with _listening(host, port) as listener, tempfile.TemporaryDirectory(prefix="slm-", dir=folder) as own:
        path = str(Path(own) / "http")
        with socket.socket(socket.AF_UNIX) as door:
            door.bind(path)
            door.listen()
            threading.Thread(target=_hand_out, args=[door, listener], name="listener", daemon=True).start()
            try:
                yield SharedListener(path=path, address=listener.getsockname())
            finally:
                with contextlib.suppress(OSError):  # macOS
                    door.shutdown(socket.SHUT_RDWR)  # ends the thread's wait


def receive_listener(shared: SharedListener) -> socket.socket:
    """The socket of the command that started this replica.

    Raises:
        OSError: the command is gone.
        PermissionError: another user answers in its place, or the socket is not the one that was promised.
    """
    with socket.socket(socket.AF_UNIX) as connection:
        connection.settimeout(HAND_OVER_S)
        connection.connect(shared.path)
        if peer_uid(connection) != os.geteuid():
            raise PermissionError("another user hands out the socket at which this replica is to answer")
        _, numbers, _, _ = socket.recv_fds(connection, len(_MARK), 1)
    if not numbers:
        raise ConnectionError("the command that started this replica has ended")
    listener = socket.socket(fileno=numbers[0])
    if listener.getsockname() != shared.address:
        listener.close()
        raise PermissionError("the socket that was handed over listens at another address")
    listener.setblocking(False)
    return listener


def peer_uid(connection: socket.socket) -> int:
    """User at the other end of a local socket, as the system says.

    Raises:
        OSError: the system does not say.
    """
    if sys.platform == "darwin":
        said = connection.getsockopt(_MACOS_SOL_LOCAL, _MACOS_PEERCRED, _MACOS_XUCRED_BYTES)
        return int(struct.unpack_from("=II", said)[1])  # xucred: version, user, groups
    said = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("=iII"))
    return int(struct.unpack("=iII", said)[1])  # process, user, group


def safe_folder(folders: Sequence[Path]) -> Path:
    """The first of these in which no other user can put one thing in place of another.

    Raises:
        UserError: there is none.
    """
    for folder in folders:
        with contextlib.suppress(OSError):
            real = folder.resolve(strict=True)
            is_short = len(os.fsencode(real)) <= MAX_FOLDER_BYTES
            if is_short and os.access(real, os.W_OK | os.X_OK) and all(map(_is_kept, [real, *real.parents])):
                return real
    raise UserError(
        "ingress (direct) finds no folder whose content other users cannot move: set TMPDIR to one of your own, "
        f"whose path has at most {MAX_FOLDER_BYTES} bytes"
    )


def _is_kept(folder: Path) -> bool:
    """Whether root and this user alone may rename what they have there."""
    found = folder.stat()
    is_open = found.st_mode & (stat.S_IWGRP | stat.S_IWOTH) and not found.st_mode & stat.S_ISVTX
    return found.st_uid in (0, os.geteuid()) and not is_open


def _listening(host: str, port: int) -> socket.socket:
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
        # Of a name that has both, the older kind, as Ray Serve's proxy does.
        family, _, _, _, address = min(found, key=lambda one: one[0] != socket.AF_INET)
        is_dual = family == socket.AF_INET6 and address[0] == "::" and socket.has_dualstack_ipv6()
        return socket.create_server(address, family=family, backlog=BACKLOG, dualstack_ipv6=is_dual)
    except OSError as error:
        raise UserError(f"cannot listen on {host} port {port} ({error.strerror or error})") from error


def _hand_out(door: socket.socket, listener: socket.socket) -> None:
    while True:
        try:
            connection, _ = door.accept()
        except OSError:
            return
        with connection, contextlib.suppress(OSError):  # a replica that died meanwhile
            if peer_uid(connection) == os.geteuid():
                socket.send_fds(connection, [_MARK], [listener.fileno()])
