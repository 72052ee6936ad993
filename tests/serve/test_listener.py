"""The socket that a command hands to its replicas: to no one else, and no other than it promised."""

import contextlib
import dataclasses
import os
import socket
import stat
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from serve import listener
from serve.listener import SharedListener, peer_uid, receive_listener, safe_folder, shared_listener
from slm_ray.errors import UserError
from tests.support.ports import free_port

WITHIN_S = 20


@pytest.fixture
def shared() -> Iterator[SharedListener]:
    with shared_listener("127.0.0.1", free_port()) as found:
        yield found


def test_the_socket_is_handed_over_in_a_folder_of_this_user_alone(shared: SharedListener) -> None:
    assert stat.S_IMODE(Path(shared.path).parent.stat().st_mode) == 0o700
    with receive_listener(shared) as first, receive_listener(shared) as second:
        assert first.getsockname() == second.getsockname() == shared.address


def test_an_address_in_use_is_said(shared: SharedListener) -> None:
    port = shared.address[1]
    with pytest.raises(UserError, match=f"cannot listen on 127.0.0.1 port {port}"), shared_listener("127.0.0.1", port):
        pytest.fail("two listen at one address")


def test_without_the_command_no_replica_starts() -> None:
    with shared_listener("127.0.0.1", free_port()) as shared:
        pass
    with pytest.raises(OSError, match="No such file"):
        receive_listener(shared)


def test_the_system_says_who_is_at_the_other_end() -> None:
    one, other = socket.socketpair()
    with one, other:
        assert peer_uid(one) == peer_uid(other) == os.geteuid()


def test_a_replica_takes_no_socket_of_another_user(shared: SharedListener, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(listener, "peer_uid", lambda _: os.geteuid() + 1)
    with pytest.raises(PermissionError, match="another user hands out the socket"):
        receive_listener(shared)


def test_another_user_is_given_no_socket(shared: SharedListener, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each side asks for itself: here the one that hands out sees a stranger."""
    replica = threading.current_thread()
    is_known = lambda _: os.geteuid() + (threading.current_thread() is not replica)  # noqa: E731
    monkeypatch.setattr(listener, "peer_uid", is_known)
    with pytest.raises(ConnectionError, match="has ended"):
        receive_listener(shared)


def test_a_socket_at_another_address_is_not_taken(shared: SharedListener) -> None:
    promised = dataclasses.replace(shared, address=("127.0.0.1", shared.address[1] + 1))
    with pytest.raises(PermissionError, match="listens at another address"):
        receive_listener(promised)


def test_the_folder_is_one_whose_content_nobody_else_can_move(tmp_path: Path) -> None:
    """As `/tmp/ray` is: anybody may rename what lies there."""
    shared_by_all, below, sticky = tmp_path / "ray", tmp_path / "ray" / "below", tmp_path / "sticky"
    for folder, mode in ((shared_by_all, 0o777), (below, 0o700), (sticky, 0o1777)):
        folder.mkdir()
        folder.chmod(mode)
    assert safe_folder([tmp_path / "none", shared_by_all, below, sticky]) == sticky.resolve()
    with pytest.raises(UserError, match="set TMPDIR to one of your own"):
        safe_folder([shared_by_all, below])
    long = tmp_path / ("x" * listener.MAX_FOLDER_BYTES)
    long.mkdir()
    assert safe_folder([long, tmp_path]) == tmp_path.resolve()


@pytest.mark.skipif(not socket.has_dualstack_ipv6(), reason="no IPv6 here")
def test_any_address_of_ipv6_answers_ipv4_too_as_rays_proxy_does() -> None:
    port = free_port()
    with shared_listener("::", port) as shared, receive_listener(shared):
        for host in ("127.0.0.1", "::1"):
            socket.create_connection((host, port), timeout=WITHIN_S).close()
    with shared_listener("::1", port), contextlib.suppress(ConnectionRefusedError):
        socket.create_connection(("127.0.0.1", port), timeout=WITHIN_S).close()
        pytest.fail("what is given is an address of this machine alone")


def test_an_address_is_taken_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    """With its zone: fe80::1%eth0."""
    found = [
        (socket.AF_INET6, socket.SOCK_STREAM, 6, "", ("fe80::1", 1, 0, 4)),
        (socket.AF_INET6, socket.SOCK_STREAM, 6, "", ("fe80::2", 1, 0, 4)),
    ]
    asked: list[object] = []

    def create_server(address: object, **_: object) -> socket.socket:
        asked.append(address)
        raise OSError("enough")

    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: found)
    monkeypatch.setattr(socket, "create_server", create_server)
    with pytest.raises(UserError, match="enough"), shared_listener("fe80::1%eth0", 1):
        pass
    found.append((socket.AF_INET, socket.SOCK_STREAM, 6, "", ("127.0.0.1", 1)))  # type: ignore[arg-type]
    with pytest.raises(UserError, match="enough"), shared_listener("localhost", 1):
        pass
    assert asked == [("fe80::1", 1, 0, 4), ("127.0.0.1", 1)]
