"""A port of this machine that nothing listens on."""

import socket


def free_port() -> int:
    """One that the operating system picks on loopback."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        return int(server.getsockname()[1])
