"""Whether an address can be listened on, asked before slow work that would end there.

In: a host and a port. Out: nothing, or the error of the operating system.
"""

import errno
import socket


def check_port(host: str, port: int) -> None:
    """Bind the address and free it again; one that is merely in TIME_WAIT is free.

    Raises:
        OSError: it is in use, not of this machine, not allowed, or no port.
    """
    if not 0 < port < 65536:  # the system would take 70000 for 4464
        raise OSError(errno.EINVAL, "a port is 1 to 65535")
    family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    with socket.socket(family, kind, protocol) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        probe.bind(address)
