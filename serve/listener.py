"""One listening socket for all replicas of this machine: the command holds it, and hands it to each that starts.

In: a host and a port. Out: a socket at which any replica takes the next connection. While none is there, as between the
death of one and the start of the next, connections wait in it. It goes from process to process over a socket in a
folder that this user alone may enter.
"""

import contextlib
import socket
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path

from slm_ray.errors import UserError

BACKLOG = 2048
HAND_OVER_S = 30.0
"""Longest time for a replica to get the socket from a command that is busy."""
_MARK = b"socket"


def can_share() -> bool:
    """Whether this system hands sockets from process to process; Windows does not."""
    return hasattr(socket, "send_fds") and hasattr(socket, "AF_UNIX")


@contextlib.contextmanager
def shared_listener(host: str, port: int, folder: str) -> Iterator[str]:
    """Listen at an address; yields the path at which `receive_listener` finds the socket, below `folder`.

    Raises:
        UserError: the address cannot be listened on.
    """
    with _listening(host, port) as listener, tempfile.TemporaryDirectory(prefix="slm-", dir=folder) as own:
        path = str(Path(own) / "http")
        with socket.socket(socket.AF_UNIX) as door:
            door.bind(path)
            door.listen()
            threading.Thread(target=_hand_out, args=[door, listener], name="listener", daemon=True).start()
            try:
                yield path
            finally:
                with contextlib.suppress(OSError):  # macOS
                    door.shutdown(socket.SHUT_RDWR)  # ends the thread's wait


def receive_listener(path: str) -> socket.socket:
    """The socket of the command that started this replica.

    Raises:
        OSError: the command is gone.
    """
    with socket.socket(socket.AF_UNIX) as connection:
        connection.settimeout(HAND_OVER_S)
        connection.connect(path)
        _, numbers, _, _ = socket.recv_fds(connection, len(_MARK), 1)
    if not numbers:
        raise ConnectionError("the command that started this replica has ended")
    listener = socket.socket(fileno=numbers[0])
    listener.setblocking(False)
    return listener


def _listening(host: str, port: int) -> socket.socket:
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        return socket.create_server(address[:2], family=family, backlog=BACKLOG)
    except OSError as error:
        raise UserError(f"cannot listen on {host} port {port} ({error.strerror or error})") from error


def _hand_out(door: socket.socket, listener: socket.socket) -> None:
    while True:
        try:
            connection, _ = door.accept()
        except OSError:
            return
        with connection, contextlib.suppress(OSError):  # a replica that died meanwhile
            socket.send_fds(connection, [_MARK], [listener.fileno()])
