"""Replicas that answer by themselves: two servers at one socket, which a command hands out."""

import asyncio
import contextlib
import http.client
import socket
import stat
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from serve.api.connection import MAX_ID_BYTES, RequestIdMiddleware
from serve.direct_http import DirectHttp
from serve.listener import receive_listener, shared_listener
from slm_ray.errors import UserError
from tests.support.ports import free_port

WITHIN_S = 20


class Application:
    """Answers with its name; what asks for `/wait` is not answered until it may be."""

    def __init__(self, name: str) -> None:
        self.name = name.encode()
        self.has_asked, self.may_answer = threading.Event(), threading.Event()

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["path"] == "/wait":
            self.has_asked.set()
            while not self.may_answer.is_set():
                await asyncio.sleep(0.005)
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"1")]})
        await send({"type": "http.response.body", "body": self.name})


@pytest.fixture
def port(tmp_path: Path) -> Iterator[tuple[int, str]]:
    number = free_port()
    with shared_listener("127.0.0.1", number, str(tmp_path)) as path:
        yield number, path


@contextlib.contextmanager
def answering(path: str, *apps: Any, slots: int = 0) -> Iterator[None]:
    servers = [DirectHttp(app, receive_listener(path), slots) for app in apps]
    try:
        yield
    finally:
        for server in servers:
            server.close()
            assert not server.is_alive


@contextlib.contextmanager
def asked(port: int, path: str = "/", **headers: str) -> Iterator[http.client.HTTPConnection]:
    with contextlib.closing(http.client.HTTPConnection("127.0.0.1", port, timeout=WITHIN_S)) as connection:
        connection.request("GET", path, headers={name.replace("_", "-"): value for name, value in headers.items()})
        yield connection


def headers_of_answer(port: int, **headers: str) -> http.client.HTTPMessage:
    with asked(port, **headers) as connection:
        return connection.getresponse().headers


def test_the_socket_is_handed_over_in_a_folder_of_this_user_alone(port: tuple[int, str]) -> None:
    number, path = port
    assert stat.S_IMODE(Path(path).parent.stat().st_mode) == 0o700
    with receive_listener(path) as first, receive_listener(path) as second:
        assert first.getsockname() == second.getsockname() == ("127.0.0.1", number)


def test_an_address_in_use_is_said(port: tuple[int, str], tmp_path: Path) -> None:
    listening = shared_listener("127.0.0.1", port[0], str(tmp_path))
    with pytest.raises(UserError, match=f"cannot listen on 127.0.0.1 port {port[0]}"), listening:
        pytest.fail("two listen at one address")


def test_without_the_command_no_replica_starts(tmp_path: Path) -> None:
    with shared_listener("127.0.0.1", free_port(), str(tmp_path)) as path:
        pass
    with pytest.raises(OSError, match="No such file"):
        receive_listener(path)


def test_connections_wait_until_a_replica_is_there(port: tuple[int, str]) -> None:
    with asked(port[0]) as early, answering(port[1], Application("a")):
        assert early.getresponse().read() == b"a"


def test_a_full_replica_leaves_connections_to_the_other_and_takes_them_when_all_are_full(
    port: tuple[int, str],
) -> None:
    apps = [Application("a"), Application("b")]
    with answering(port[1], *apps, slots=1), asked(port[0], "/wait") as one, asked(port[0], "/wait") as two:
        try:
            assert all(app.has_asked.wait(WITHIN_S) for app in apps)  # one each, whoever was faster
            # The next request on another connection may find a replica that has time.
            assert headers_of_answer(port[0])["connection"] == "close"
        finally:
            for app in apps:
                app.may_answer.set()
        assert {one.getresponse().read(), two.getresponse().read()} == {b"a", b"b"}


def test_a_replica_with_time_keeps_its_connections(port: tuple[int, str]) -> None:
    with answering(port[1], Application("a"), slots=1), asked(port[0]) as connection:
        for _ in range(3):
            answer = connection.getresponse()
            assert answer.read() == b"a" and "connection" not in answer.headers
            connection.request("GET", "/")


def test_heads_are_bounded(port: tuple[int, str]) -> None:
    with (
        answering(port[1], Application("a")),
        socket.create_connection(("127.0.0.1", port[0]), timeout=WITHIN_S) as connection,
    ):
        connection.sendall(b"GET / HTTP/1.1\r\nHost: localhost\r\nX: " + b"x" * 100_000)
        assert connection.recv(1000).startswith(b"HTTP/1.1 431 ")


def test_an_answer_has_the_id_that_the_request_names_or_a_new_one(port: tuple[int, str]) -> None:
    with answering(port[1], RequestIdMiddleware(Application("a"))):
        assert headers_of_answer(port[0], x_request_id="mine").get_all("x-request-id") == ["mine"]
        assert len(headers_of_answer(port[0], x_request_id="x" * 999)["x-request-id"]) == MAX_ID_BYTES
        assert len({headers_of_answer(port[0])["x-request-id"] for _ in range(3)}) == 3
