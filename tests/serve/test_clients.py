"""Whom the limits of one client count."""

from types import SimpleNamespace

import pytest

from serve.clients import client_of
from serve.proxy_limits import client_at


@pytest.mark.parametrize(
    ("first", "second", "is_one"),
    [
        ("2001:db8::1", "2001:db8::ffff:1:2:3", True),
        ("2001:db8::1", "2001:db8:0:1::1", False),
        ("fe80::1%eth0", "fe80::2%eth0", False),
        ("::ffff:10.0.0.1", "10.0.0.1", True),
        ("::ffff:10.0.0.1", "::ffff:10.0.0.2", False),
        ("10.0.0.1", "10.0.0.2", False),
        ("", "/tmp/socket", False),
        ("::1", "::1", True),
    ],
)
def test_a_client_is_an_address_or_a_network_of_version_6(first: str, second: str, is_one: bool) -> None:
    assert (client_of(first) == client_of(second)) is is_one
    connections = [SimpleNamespace(client=(host, 1)) for host in (first, second)]
    assert (client_at(connections[0]) == client_at(connections[1])) is is_one
    assert client_at(SimpleNamespace(client=None)) == ""
