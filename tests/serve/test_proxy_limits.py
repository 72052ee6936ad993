"""What a connection may cost: uvicorn as Ray Serve's proxy starts it, on a real socket, with the bounds."""

import contextlib
import socket
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest
import uvicorn
import uvicorn.config

from serve import proxy_limits
from serve.ray_connection import LOCAL_SETTINGS

Address = tuple[str, int]
LARGE = 8_000_000
GET = b"GET / HTTP/1.1\r\nHost: localhost\r\n"


BEGUN: list[str] = []
"""Requests whose body is read or was: their heads have arrived."""


def wait_for(count: int) -> None:
    deadline = time.monotonic() + 30
    while len(BEGUN) < count:
        assert time.monotonic() < deadline
        time.sleep(0.01)


async def application(scope: Any, receive: Any, send: Any) -> None:
    """Reads the body where it is asked to, and answers with its size, or with much more than a client reads."""
    size, more = 0, scope["path"] == "/read"
    BEGUN.extend([scope["path"]] if more else [])
    while more:
        message = await receive()
        size, more = size + len(message.get("body", b"")), message.get("more_body", False)
    names = b" ".join(name for name, _ in scope["headers"])
    headers = [(b"x-size", str(size).encode()), (b"x-names", names)]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    if scope["path"] == "/much":
        for _ in range(1000):
            await send({"type": "http.response.body", "body": b"x" * 100_000, "more_body": True})
    await send({"type": "http.response.body", "body": b"y" * LARGE if scope["path"] == "/large" else b""})


@pytest.fixture
def address(monkeypatch: pytest.MonkeyPatch) -> Iterator[Address]:
    monkeypatch.setitem(uvicorn.config.HTTP_PROTOCOLS, "auto", "")
    assert proxy_limits.bound_proxy() == []
    with socket.create_server(("127.0.0.1", 0)) as listener:
        server = uvicorn.Server(uvicorn.Config(application, log_level="critical", timeout_graceful_shutdown=1))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        try:
            yield listener.getsockname()[:2]
        finally:
            server.should_exit = True
            thread.join()


def answer(connection: socket.socket, *parts: bytes) -> bytes:
    """All that comes, until the server closes or has answered; nothing where it only closed."""
    connection.settimeout(20)
    received = b""
    with contextlib.suppress(ConnectionError):
        for part in parts:
            connection.sendall(part)
    with contextlib.suppress(ConnectionError):
        while not received.endswith(b"0\r\n\r\n") and (piece := connection.recv(65536)):
            received += piece
    return received


def status(address: Address, *parts: bytes) -> int:
    with socket.create_connection(address) as connection:
        received = answer(connection, *parts)
    return int(received.split()[1]) if received else 0


@pytest.mark.parametrize(
    "head",
    [
        GET + b"X: " + b"x" * 63_000 + b"\r\n\r\n",
        GET + b"X: y\r\n" * 90 + b"\r\n",
        b"GET /" + b"p" * 60_000 + b" HTTP/1.1\r\n\r\n",
    ],
)
def test_a_large_head_is_read(address: Address, head: bytes) -> None:
    assert status(address, head) == 200


@pytest.mark.parametrize(
    "parts",
    [
        [GET, *[b"X: " + b"x" * 60_000 + b"\r\n"] * 2],
        [GET + b"X: ", *[b"x" * 100_000] * 20],
        [GET + b"X: y\r\n" * 101 + b"\r\n"],
        [b"GET /" + b"p" * 70_000],
        [b"\r\n" * 40_000],
        [b"POST /read HTTP/1.1\r\nContent-Length: 1\r\n\r\nx" + GET + b"X: ", *[b"x" * 300_000] * 3],
    ],
    ids=["many", "one without end", "a hundred and one", "address", "empty lines", "the second of a connection"],
)
def test_a_larger_one_is_refused_before_it_is_there(address: Address, parts: list[bytes]) -> None:
    with socket.create_connection(address) as connection:
        assert b"431" in answer(connection, *parts) or closed(connection)


def closed(connection: socket.socket) -> bool:
    connection.settimeout(20)
    try:
        while connection.recv(65536):  # the answer to what came before, and perhaps a refusal
            pass
    except TimeoutError:
        return False
    except ConnectionError:
        pass
    return True


def chunked(*parts: bytes) -> list[bytes]:
    return [b"POST /read HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n", *parts]


def test_a_body_in_chunks_of_one_byte_is_read_whole(address: Address) -> None:
    with socket.create_connection(address) as connection:
        assert b"x-size: 65536" in answer(connection, *chunked(b"1\r\nx\r\n" * 65536, b"0\r\n\r\n"))


def test_a_large_body_is_no_large_head(address: Address) -> None:
    with socket.create_connection(address) as connection:
        size = 5_000_000
        head = b"POST /read HTTP/1.1\r\nContent-Length: %d\r\n\r\n" % size
        assert b"x-size: %d" % size in answer(connection, head, b"x" * size)


@pytest.mark.parametrize(
    "parts", [[b"0\r\nX: ", b"x" * 3_000_000], [b"1;" + b"x" * 3_000_000]], ids=["trailer", "extension"]
)
def test_what_stands_around_a_body_is_bounded(address: Address, parts: list[bytes]) -> None:
    with socket.create_connection(address) as connection:
        answer(connection, *chunked(*parts))
        assert closed(connection)


def test_no_stranger_tells_ray_what_to_do(address: Address) -> None:
    asked = b"X-Request-Timeout-Seconds: 0\r\nx-request-disconnect-disabled: ?1\r\nX-Other: 1\r\n\r\n"
    with socket.create_connection(address) as connection:
        assert b"x-names: host x-other\r\n" in answer(connection, GET + asked)


def test_a_websocket_is_not_opened(address: Address) -> None:
    asked = b"Connection: Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Version: 13\r\nSec-WebSocket-Key: AAAA\r\n\r\n"
    assert status(address, GET + asked) == 200


@pytest.mark.parametrize("sent", [b"", GET, b"\r\n"])
def test_who_does_not_ask_is_not_waited_for(address: Address, sent: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(proxy_limits, "HEAD_S", 0.2)
    with socket.create_connection(address) as connection:
        assert answer(connection, *[sent] if sent else []).startswith(b"HTTP/1.1 408" if sent else b"")
        assert closed(connection)


def test_a_second_request_is_not_waited_for_longer(address: Address, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(proxy_limits, "HEAD_S", 0.2)
    with socket.create_connection(address) as connection:
        assert b"200" in answer(connection, GET + b"\r\n")
        time.sleep(0.5)  # as long as it says nothing, it is kept
        assert b"200" in answer(connection, GET + b"\r\n")
        assert b"408" in answer(connection, GET)
        assert closed(connection)


def test_who_does_not_read_is_not_waited_for(address: Address, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(proxy_limits, "STALL_S", 0.3)
    with socket.create_connection(address) as connection:
        connection.sendall(b"GET /much HTTP/1.1\r\n\r\n")
        time.sleep(1.5)
        connection.settimeout(20)
        received = 0
        with contextlib.suppress(ConnectionError):
            while piece := connection.recv(1 << 20):
                received += len(piece)
        assert received < 100_000_000


def test_a_silent_connection_gives_way_and_one_that_is_answered_does_not(
    address: Address, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(proxy_limits, "most_connections", lambda: 8)  # of one address, 4
    with contextlib.ExitStack() as stack:
        silent = [stack.enter_context(socket.create_connection(address)) for _ in range(4)]
        assert status(address, GET + b"\r\n") == 200
        assert closed(silent[0])
        busy = []
        for _ in range(4):
            before = len(BEGUN)
            one = stack.enter_context(socket.create_connection(address))
            busy.append(one)
            one.sendall(b"POST /read HTTP/1.1\r\nContent-Length: 9\r\n\r\n")
            wait_for(before + 1)
        assert all(closed(one) for one in silent)
        assert status(address, GET + b"\r\n") == 503
        assert b"x-size: 9" in answer(busy[0], b"123456789")
        assert status(address, GET + b"\r\n") == 200


def test_an_answer_that_is_under_way_is_not_cut_off_for_another_connection(
    address: Address, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(proxy_limits, "most_connections", lambda: 8)
    with contextlib.ExitStack() as stack:
        reader = stack.enter_context(socket.create_connection(address))
        reader.sendall(b"GET /large HTTP/1.1\r\nHost: x\r\n\r\n")
        time.sleep(0.5)
        silent = [stack.enter_context(socket.create_connection(address)) for _ in range(3)]
        assert status(address, GET + b"\r\n") == 200
        assert closed(silent[0])
        assert answer(reader).count(b"y") == LARGE


def test_a_ray_of_our_own_starts_its_proxy_with_them() -> None:
    module, _, name = LOCAL_SETTINGS[proxy_limits.PROXY_CALLBACK].partition(":")
    assert (module, name) == (proxy_limits.__name__, proxy_limits.bound_proxy.__name__)


def test_a_uvicorn_that_would_not_take_them_is_not_started(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(uvicorn.config.HTTP_PROTOCOLS, "auto")
    with pytest.raises(RuntimeError, match="would have no bounds"):
        proxy_limits.bound_proxy()


H2C = b"Connection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\nHTTP2-Settings: AAEAAEAAAAIAAAAB\r\n"


@pytest.mark.parametrize("cut", [0, 20, 150, 300])
@pytest.mark.parametrize("wish", [H2C, H2C.lower(), b"Upgrade: websocket\r\nConnection: keep-alive, upgrade\r\n"])
def test_who_asks_for_another_protocol_is_answered_in_this_one(address: Address, wish: bytes, cut: int) -> None:
    """Java's HttpClient asks so in each request; the body belongs to it, and the connection is used again."""
    story = b"POST /read HTTP/1.1\r\nHost: x\r\n" + wish + b"Content-Length: 9\r\n\r\na story. "
    pieces = b"POST /read HTTP/1.1\r\n" + wish + b"Transfer-Encoding: chunked\r\n\r\n4\r\nabcd\r\n0\r\n\r\n"
    whole = story + pieces + GET + b"\r\n"
    with socket.create_connection(address) as connection:
        connection.sendall(whole[:cut])
        time.sleep(0.1)
        connection.sendall(whole[cut:])
        received = b""
        connection.settimeout(20)
        while received.count(b"0\r\n\r\n") < 3 and (piece := connection.recv(65536)):
            received += piece
    sizes = [line for line in received.split(b"\r\n") if line.startswith(b"x-size")]
    assert sizes == [b"x-size: 9", b"x-size: 4", b"x-size: 0"]
    assert b"http2-settings" not in received


def test_many_wishes_in_one_go_are_read_one_after_another(address: Address) -> None:
    with socket.create_connection(address) as connection:
        received = b""
        connection.sendall((b"GET / HTTP/1.1\r\n" + H2C + b"\r\n") * 500)
        connection.settimeout(20)
        while received.count(b"0\r\n\r\n") < 500 and (piece := connection.recv(65536)):
            received += piece
    assert received.count(b"HTTP/1.1 200") == 500


@pytest.mark.parametrize(
    "name",
    [b"serve_multiplexed_model_id", b"Serve-Multiplexed-Model-ID", b"X_Session-Id", b"x-request_timeout-seconds"],
)
def test_no_stranger_s_header_steers_ray(address: Address, name: bytes) -> None:
    """Ray takes a hyphen for an underscore."""
    with socket.create_connection(address) as connection:
        received = answer(connection, GET + name + b": 1\r\n\r\n")
    assert b"x-names: host\r\n" in received
