"""One HTTP endpoint, asked one request at a time: bounded in time and size, by the standard library alone.

In: an address and perhaps an API key. Out: status, type and body of an answer, or the reason why there is none.
`check_endpoint.py` judges what came.
"""

import contextlib
import dataclasses
import http.client
import json
import socket
import threading
import time
import urllib.parse
from collections.abc import Iterator
from typing import Any

from slm_ray.errors import UserError, one_line

MAX_ANSWER_BYTES = 2**22
_PIECE_BYTES = 2**16
_KINDS = {"http": http.client.HTTPConnection, "https": http.client.HTTPSConnection}


class NoAnswerError(Exception):
    """There is no whole answer: it broke off, it is too large, or what came is not HTTP."""


class LateError(NoAnswerError):
    """The answer was not there in time."""


class UnreachableError(NoAnswerError):
    """Nothing listens there, or the name leads nowhere: nothing is known about the endpoint."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Answer:
    """What came back."""

    status: int
    content_type: str
    body: bytes
    first_s: float  # seconds from the request to the first bytes of the body

    def json(self) -> Any:
        """The body, read as JSON. Raises ValueError where it is none."""
        return json.loads(self.body)

    def events(self) -> list[str]:
        """The data of each server-sent event. Raises ValueError where the body is no UTF-8."""
        lines = self.body.decode("utf-8").splitlines()
        return [line.removeprefix("data:").strip() for line in lines if line.startswith("data:")]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Endpoint:
    """Where to ask, and as whom."""

    scheme: str
    host: str
    port: int
    prefix: str = ""  # of all paths, where a proxy has one
    key: str = ""
    timeout_s: float = 60.0  # for a whole answer

    def ask(self, method: str, path: str, content: object = None) -> Answer:
        """Send one request, with `content` as JSON, and read the whole answer. Redirections are not followed.

        Raises:
            UnreachableError: no connection.
            LateError: no whole answer within `timeout_s`.
            NoAnswerError: it broke off, or is larger than 4 MiB.
        """
        headers = {"Accept": "application/json, text/event-stream", "Connection": "close"}
        if self.key:
            headers["Authorization"] = f"Bearer {self.key}"
        body = None
        if content is not None:
            body = json.dumps(content).encode()
            headers["Content-Type"] = "application/json"
        connection = _KINDS[self.scheme](self.host, self.port, timeout=self.timeout_s)
        with contextlib.closing(connection), _until(connection, self.timeout_s) as is_late:
            try:
                began = time.monotonic()
                connection.request(method, f"{self.prefix}{path}", body, headers)
                answer = _read(connection.getresponse(), began)
            except (OSError, http.client.HTTPException, NoAnswerError) as error:
                if is_late.is_set() or isinstance(error, TimeoutError):
                    raise LateError(f"no whole answer within {self.timeout_s:g} s") from error
                if isinstance(error, NoAnswerError):
                    raise
                raise NoAnswerError(f"the answer broke off, or is no HTTP: {_reason(error)}") from error
            if is_late.is_set():  # the end of a body without a length looks like this too
                raise LateError(f"no whole answer within {self.timeout_s:g} s")
            return answer


@contextlib.contextmanager
def _until(connection: http.client.HTTPConnection, timeout_s: float) -> Iterator[threading.Event]:
    """Connect, and cut the connection off once the time is over: a limit for each read would never end a trickle."""
    is_late = threading.Event()
    try:
        connection.connect()
    except OSError as error:
        raise UnreachableError(_reason(error)) from error
    line = connection.sock

    def cut() -> None:
        is_late.set()
        with contextlib.suppress(OSError):
            line.shutdown(socket.SHUT_RDWR)

    timer = threading.Timer(timeout_s, cut)
    timer.daemon = True
    timer.start()
    try:
        yield is_late
    finally:
        timer.cancel()


def _read(response: http.client.HTTPResponse, began: float) -> Answer:
    length = response.getheader("Content-Length", "")
    expected = int(length) if length.isascii() and length.isdigit() and not response.chunked else None
    pieces, size, first_s = list[bytes](), 0, 0.0
    while size != expected and (piece := response.read1(_PIECE_BYTES)):
        first_s = first_s or time.monotonic() - began
        pieces.append(piece)
        size += len(piece)
        if size > MAX_ANSWER_BYTES:
            raise NoAnswerError(f"the answer is larger than {MAX_ANSWER_BYTES // 2**20} MiB")
    if expected is not None and size < expected:
        raise NoAnswerError(f"the answer broke off after {size} of {expected} bytes")
    kind = response.getheader("Content-Type", "").partition(";")[0].strip().lower()
    return Answer(status=response.status, content_type=kind, body=b"".join(pieces), first_s=first_s)


def _reason(error: Exception) -> str:
    return (error.strerror if isinstance(error, OSError) else None) or f"{type(error).__name__}: {one_line(error)}"


def endpoint(url: str, *, key: str = "", timeout_s: float = 60.0) -> Endpoint:
    """Read an address; `127.0.0.1:8000` means http.

    Raises:
        UserError: it is none, or holds what does not belong there.
    """
    parts = urllib.parse.urlsplit(url if "://" in url else f"http://{url}")
    try:
        port = parts.port
    except ValueError as error:
        raise UserError(f"{url}: {error}") from error
    if parts.scheme not in _KINDS or not parts.hostname:
        raise UserError(f"{url} is no address of an endpoint: expected http://HOST:PORT")
    if parts.username is not None or parts.query or parts.fragment:
        raise UserError(f"{url}: give the address alone, and a key by --key-file")
    if not parts.path.isascii() or not parts.path.isprintable() or " " in parts.path:
        raise UserError(f"{url}: its path has characters that no address has")
    return Endpoint(
        scheme=parts.scheme,
        host=parts.hostname,
        port=port or {"http": 80, "https": 443}[parts.scheme],
        prefix=parts.path.rstrip("/"),
        key=key,
        timeout_s=timeout_s,
    )
