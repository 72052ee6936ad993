"""An address is free, or the operating system says why not."""

import socket

import pytest

from slm_ray.cli.ports import check_port
from tests.support.ports import free_port


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost"])
def test_a_port_is_free_until_something_listens(host: str) -> None:
    port = free_port()
    check_port(host, port)
    check_port(host, port)  # it was freed again
    with socket.create_server(("127.0.0.1", port)), pytest.raises(OSError, match="in use"):
        check_port("127.0.0.1", port)


def test_an_address_of_another_machine_is_rejected() -> None:
    with pytest.raises(OSError, match="assign requested address"):
        check_port("192.0.2.1", 8000)


@pytest.mark.parametrize("port", [0, -1, 65536, 70000])
def test_what_is_no_port_is_refused(port: int) -> None:
    with pytest.raises(OSError, match="1 to 65535"):
        check_port("127.0.0.1", port)
