"""Replicas that answer by themselves: two servers at one socket."""

import asyncio
import contextlib
import http.client
import socket
import threading
import time
from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest

from serve import direct_http
from serve.api.connection import MAX_ID_BYTES, RequestIdMiddleware
from serve.direct_http import DirectHttp
from serve.listener import SharedListener, receive_listener, shared_listener
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
def port() -> Iterator[tuple[int, SharedListener]]:
    number = free_port()
    with shared_listener("127.0.0.1", number) as shared:
        yield number, shared


@contextlib.contextmanager
def answering(shared: SharedListener, *apps: Any, slots: int = 0, max_waiting: int = 0) -> Iterator[list[DirectHttp]]:
    servers = [DirectHttp(app, receive_listener(shared), slots, max_waiting) for app in apps]
    try:
        yield servers
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


def test_connections_wait_until_a_replica_is_there(port: tuple[int, SharedListener]) -> None:
    with asked(port[0]) as early, answering(port[1], Application("a")):
        assert early.getresponse().read() == b"a"


def test_a_full_replica_leaves_connections_to_the_other_and_takes_them_when_all_are_full(
    port: tuple[int, SharedListener],
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


def test_a_replica_with_time_keeps_its_connections(port: tuple[int, SharedListener]) -> None:
    with answering(port[1], Application("a"), slots=1), asked(port[0]) as connection:
        for _ in range(3):
            answer = connection.getresponse()
            assert answer.read() == b"a" and "connection" not in answer.headers
            connection.request("GET", "/")


def test_heads_are_bounded(port: tuple[int, SharedListener]) -> None:
    with (
        answering(port[1], Application("a")),
        socket.create_connection(("127.0.0.1", port[0]), timeout=WITHIN_S) as connection,
    ):
        connection.sendall(b"GET / HTTP/1.1\r\nHost: localhost\r\nX: " + b"x" * 100_000)
        assert connection.recv(1000).startswith(b"HTTP/1.1 431 ")


def test_an_answer_has_the_id_that_the_request_names_or_a_new_one(port: tuple[int, SharedListener]) -> None:
    with answering(port[1], RequestIdMiddleware(Application("a"))):
        assert headers_of_answer(port[0], x_request_id="mine").get_all("x-request-id") == ["mine"]
        assert len(headers_of_answer(port[0], x_request_id="x" * 999)["x-request-id"]) == MAX_ID_BYTES
        assert len({headers_of_answer(port[0])["x-request-id"] for _ in range(3)}) == 3


def wait_for(condition: Any) -> None:
    deadline = time.monotonic() + WITHIN_S
    while not condition():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.005)


class Waiting:
    """Answers with its name what all are asked for, when it may; counts what it has."""

    def __init__(self, name: str, may_answer: threading.Event) -> None:
        self.name, self.count, self._may_answer = name.encode(), 0, may_answer

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        self.count += 1
        while not self._may_answer.is_set():
            await asyncio.sleep(0.005)
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"1")]})
        await send({"type": "http.response.body", "body": self.name})


def test_full_replicas_share_what_waits(port: tuple[int, SharedListener], monkeypatch: pytest.MonkeyPatch) -> None:
    """Who took all that waits would refuse some of it, with the other half idle."""
    monkeypatch.setattr(direct_http, "LEAVE_FULL_S", 3600)
    may_answer, slots, max_waiting = threading.Event(), 2, 6
    apps = [Waiting("a", may_answer), Waiting("b", may_answer)]
    with contextlib.ExitStack() as stack:
        all_asked = [stack.enter_context(asked(port[0])) for _ in range(2 * (slots + max_waiting))]  # in line already
        stack.enter_context(answering(port[1], *apps, slots=slots, max_waiting=max_waiting))
        try:
            wait_for(lambda: sum(app.count for app in apps) == len(all_asked))
            assert [app.count for app in apps] == [slots + max_waiting] * 2
        finally:
            may_answer.set()
        found = Counter(one.getresponse().read() for one in all_asked)
    assert set(found) == {b"a", b"b"}


def test_a_full_line_leaves_more_time_to_others_than_a_spare_place(
    port: tuple[int, SharedListener], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(direct_http, "LEAVE_FULL_S", 3600)
    may_answer, slots, max_waiting = threading.Event(), 1, 2
    apps = [Waiting("a", may_answer), Waiting("b", may_answer)]
    with contextlib.ExitStack() as stack:
        all_asked = [stack.enter_context(asked(port[0])) for _ in range(8)]
        stack.enter_context(answering(port[1], *apps, slots=slots, max_waiting=max_waiting))
        try:
            wait_for(lambda: sum(app.count for app in apps) == 6)
            time.sleep(0.2)  # neither takes what it has no place for
            assert [app.count for app in apps] == [3, 3]
        finally:
            may_answer.set()
        assert len([one.getresponse().read() for one in all_asked]) == 8  # taken when there are places


def test_silent_connections_hold_no_slot(port: tuple[int, SharedListener]) -> None:
    """They cost nothing: a balancer's probe, a browser's spare connection."""
    with answering(port[1], Application("a"), slots=2) as (server,), contextlib.ExitStack() as stack:
        for _ in range(8):
            stack.enter_context(socket.create_connection(("127.0.0.1", port[0]), timeout=WITHIN_S))
        wait_for(lambda: len(server._server.server_state.connections) == 8)
        time.sleep(2 * direct_http.NEW_S)
        assert "connection" not in headers_of_answer(port[0])


def test_one_that_leaves_takes_no_more_and_answers_what_it_has(port: tuple[int, SharedListener]) -> None:
    app, other = Application("a"), Application("b")
    with answering(port[1], app) as (leaving,), asked(port[0]) as silent, asked(port[0], "/wait") as waiting:
        assert silent.getresponse().read() == b"a" and app.has_asked.wait(WITHIN_S)
        leaving.leave()
        wait_for(lambda: leaving._listener.fileno() < 0)
        with answering(port[1], other):
            assert {asked_name(port[0]) for _ in range(10)} == {b"b"}
        assert silent.sock is not None and silent.sock.recv(1) == b""
        assert leaving.is_alive
        app.may_answer.set()
        answer = waiting.getresponse()
        assert (answer.read(), answer.headers["connection"]) == (b"a", "close")
        leaving.join(WITHIN_S)
        assert not leaving.is_alive


def asked_name(port: int) -> bytes:
    with asked(port) as connection:
        return connection.getresponse().read()
