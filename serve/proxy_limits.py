"""Bounds of the connections to Ray Serve's proxy, which has none: the head of a request, silence, how many there are.

In: the proxy's process, before it listens; Ray Serve calls the function that `PROXY_CALLBACK` names there. Out: uvicorn
speaks HTTP by a protocol of ours, with bounds. What comes behind the head is bounded in the replica (`api/`).
"""

import asyncio
import resource
from typing import Any

import uvicorn.config

from serve.clients import client_of
from serve.plain_http import PlainHttpProtocol

PROXY_CALLBACK = "RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH"
"""Environment variable of Ray Serve: a function that its proxy calls when it starts."""
CALLBACK = "serve.proxy_limits:bound_proxy"
MAX_HEAD_BYTES, MAX_HEADERS = 64 * 1024, 100
MAX_FRAME_BYTES = 1024 * 1024
"""What may come around the bytes of a body: lengths of its chunks, trailers. A chunk of one byte takes six."""
HEAD_S = 10.0
"""Longest time for the head of a request to arrive, from the connection or from the first byte on."""
STALL_S = 60.0
"""Longest time for a client to read nothing of an answer that waits for it."""
FOR_RAY = frozenset(
    {b"x-request-timeout-seconds", b"x-request-disconnect-disabled", b"x-session-id", b"serve-multiplexed-model-id"}
)
"""Headers by which a stranger would tell Ray's proxy to wait without end, to write on for a client that left, or which
replica to ask; it takes `_` for `-`."""
_HARD_MOST = 2048
_STATUS = {
    408: b"408 Request Timeout",
    431: b"431 Request Header Fields Too Large",
    503: b"503 Service Unavailable",
}


def bound_proxy() -> list[Any]:
    """Call it before uvicorn is configured. Returns no middlewares, which is what Ray Serve asks for.

    Raises:
        RuntimeError: this version of uvicorn chooses its protocol in another way.
    """
    if "auto" not in uvicorn.config.HTTP_PROTOCOLS:
        raise RuntimeError("uvicorn has no protocol 'auto': the connections of the proxy would have no bounds")
    uvicorn.config.HTTP_PROTOCOLS["auto"] = f"{__name__}:{BoundedProtocol.__name__}"
    return []


def most_connections() -> int:
    """Connections at a time: three quarters of the files that this process may open. One client may have half."""
    return min(_HARD_MOST, resource.getrlimit(resource.RLIMIT_NOFILE)[0] * 3 // 4)


class _HeadTooLargeError(Exception):
    """Raised within the parser, which then stops."""


class BoundedProtocol(PlainHttpProtocol):
    """uvicorn's protocol with bounds. Where there are too many connections, one that asks for nothing gives way."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.began_s = 0.0
        self._timer: asyncio.TimerHandle | None = None
        self._stall: asyncio.TimerHandle | None = None
        self._is_in_head = True
        self._is_too_large = False
        self._head_bytes = 0  # of the names and values of this head
        self._other_bytes = 0  # that came since the last head, or since the connection, and were no body

    @property
    def is_idle(self) -> bool:
        """Whether no request is being answered."""
        return (self.cycle is None or self.cycle.response_complete) and not self.pipeline

    @property
    def is_free(self) -> bool:
        """Whether it loses nothing by its end: all of its last answer is sent, too."""
        return self.is_idle and not self.transport.get_write_buffer_size()

    def connection_made(self, transport: Any) -> None:
        """See `asyncio.Protocol`."""
        super().connection_made(transport)
        self.began_s = self.loop.time()
        self._watch()
        own = [one for one in self.connections if one is not self and client_at(one) == client_at(self)]
        others, most = [one for one in self.connections if one is not self], most_connections()
        for found, limit in ((own, most // 2), (others, most)):
            if len(found) >= limit:
                idle = [one for one in found if isinstance(one, BoundedProtocol) and one.is_free]
                if not idle:
                    return self._refuse(503)
                min(idle, key=lambda one: one.began_s).transport.abort()
                return None
        return None

    def connection_lost(self, exc: Exception | None) -> None:
        """See `asyncio.Protocol`."""
        self._unwatch()
        self._unstall()
        super().connection_lost(exc)

    def pause_writing(self) -> None:
        """See `asyncio.Protocol`: the client reads more slowly than is written."""
        super().pause_writing()
        self._unstall()
        self._stall = self.loop.call_later(STALL_S, self.transport.abort)

    def resume_writing(self) -> None:
        """See `asyncio.Protocol`."""
        self._unstall()
        super().resume_writing()

    def data_received(self, data: bytes) -> None:
        """See `asyncio.Protocol`."""
        self._other_bytes += len(data)
        super().data_received(data)
        if self.transport.is_closing():
            return
        is_waiting = self._is_in_head or self.is_idle
        if self._other_bytes > (MAX_HEAD_BYTES if is_waiting else MAX_FRAME_BYTES):
            self._refuse(431)
        elif is_waiting:
            self._watch()

    def on_message_begin(self) -> None:
        """Called by the parser."""
        self._is_in_head, self._head_bytes = True, 0
        super().on_message_begin()

    def on_url(self, url: bytes) -> None:
        """Called by the parser, part by part."""
        self._count(len(url))
        super().on_url(url)

    def on_header(self, name: bytes, value: bytes) -> None:
        """Called by the parser, also for what stands behind a body."""
        self._count(len(name) + len(value))
        if len(self.headers) >= MAX_HEADERS:
            self._count(MAX_HEAD_BYTES)
        if name.lower().replace(b"_", b"-") not in FOR_RAY:
            super().on_header(name, value)

    def on_headers_complete(self) -> None:
        """Called by the parser."""
        self._is_in_head, self._other_bytes = False, 0
        self._unwatch()
        super().on_headers_complete()

    def on_body(self, body: bytes) -> None:
        """Called by the parser."""
        self._other_bytes = max(self._other_bytes - len(body), 0)
        super().on_body(body)

    def send_400_response(self, msg: str) -> None:
        """Called where the parser failed."""
        return self._refuse(431) if self._is_too_large else super().send_400_response(msg)

    def _should_upgrade_to_ws(self) -> bool:
        return False  # there is nothing to be had by it

    def _count(self, size: int) -> None:
        self._head_bytes += size
        if self._head_bytes > MAX_HEAD_BYTES:
            self._is_too_large = True
            raise _HeadTooLargeError

    def _watch(self) -> None:
        if self._timer is None:
            self._timer = self.loop.call_later(HEAD_S, self._is_late)

    def _unwatch(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _unstall(self) -> None:
        if self._stall is not None:
            self._stall.cancel()
            self._stall = None

    def _is_late(self) -> None:
        self._timer = None
        if not self.is_idle:  # the head of the next request: it is asked for again when this one is answered
            self._watch()
        elif self._other_bytes:
            self._refuse(408)
        else:
            self.transport.close()

    def _refuse(self, status: int) -> None:
        if self.is_idle:
            self.transport.write(
                b"HTTP/1.1 " + _STATUS[status] + b"\r\nconnection: close\r\ncontent-length: 0\r\nretry-after: 2\r\n\r\n"
            )
        self.transport.close()


def client_at(connection: Any) -> str:
    """Whose connection it is, for the bound of one client."""
    return client_of(str(connection.client[0])) if connection.client else ""
