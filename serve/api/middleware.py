"""ASGI middlewares: limits, API keys, rates, headers, metrics. `routes.py` stacks them.

In: connections. Out: the same, or an error in the form of the route (`error_responses.py`).
"""

import asyncio
import base64
import collections
import contextlib
import hashlib
import hmac
import math
import re
import time
from collections.abc import Iterator

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from serve.api.error_responses import RETRY_AFTER_S, error_response
from serve.api.metrics import Metrics
from serve.clients import client_of

MAX_BODY_BYTES = 64 * 1024
BODY_S = 10.0
"""Longest time for a body to arrive."""
LATE_S = 1.0
"""From when on a body is late. One that comes with its head never is, however many come at once."""
MAX_ARRIVING, ARRIVING_FOR_FEW = 640, 128
"""Bodies that may be waited for at a time, before they are late; the last places are for addresses with few of them."""
MAX_BODIES, MAX_BODIES_OF_ONE = 256, 32
"""Late bodies that may be under way at a time, of all clients and of one address."""
PROXY_HEALTH = "/-/healthz"
"""What Ray Serve's proxy answers by itself, for load balancers; without one the application does."""
PUBLIC_ROUTES = frozenset({"/health", "/ready", "/", PROXY_HEALTH})
"""They need no key: whether the server lives is no secret, and the page has the field for the key."""
SAFE_METHODS = frozenset({"GET", "HEAD"})
MAX_CALLERS = 10_000
"""Callers whose rate is remembered; those that have been silent for longest are forgotten first."""


class ApiKeyMiddleware:
    """Requires `Authorization: Bearer KEY`, else answers 401."""

    def __init__(self, app: ASGIApp, digests: tuple[bytes, ...]) -> None:
        self._app = app
        self._digests = digests

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one connection."""
        if scope["type"] != "http" or _is_public(scope) or self._is_known(scope):
            return await self._app(scope, receive, send)
        detail = "an API key is needed: send the header `Authorization: Bearer KEY`"
        answer = error_response(scope["path"], 401, detail, {"WWW-Authenticate": "Bearer"})
        return await answer(scope, receive, send)

    def _is_known(self, scope: Scope) -> bool:
        own = hashlib.sha256(_bearer(scope)).digest()
        found = [hmac.compare_digest(own, digest) for digest in self._digests]  # all of them, every time
        return any(found)


def _is_public(scope: Scope) -> bool:
    return scope["path"] in PUBLIC_ROUTES and scope["method"] in SAFE_METHODS


def _bearer(scope: Scope) -> bytes:
    """The key that a request sends, empty without one."""
    header: bytes = next((value for name, value in scope["headers"] if name == b"authorization"), b"")
    scheme, _, key = header.partition(b" ")
    return key.strip() if scheme.lower() == b"bearer" else b""


class RateLimitMiddleware:
    """A token bucket for every caller, of a minute's requests: answers 429 with Retry-After when it is empty.

    Callers are distinguished by their keys where these are checked before, and by their addresses where anybody could
    make up a key.
    """

    def __init__(self, app: ASGIApp, per_minute: int, *, by_key: bool) -> None:
        self._app = app
        self._size = per_minute
        self._caller = _key if by_key else _client
        self._buckets: collections.OrderedDict[bytes, tuple[float, float]] = collections.OrderedDict()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one connection."""
        if scope["type"] != "http" or _is_public(scope):
            return await self._app(scope, receive, send)
        wait_s = self._take(self._caller(scope), time.monotonic())
        if not wait_s:
            return await self._app(scope, receive, send)
        detail = f"more than {self._size} requests in a minute: try again in {wait_s} s"
        return await error_response(scope["path"], 429, detail, {"Retry-After": str(wait_s)})(scope, receive, send)

    def _take(self, caller: bytes, now: float) -> int:
        """Take one request out of the caller's bucket; the seconds to wait when there is none."""
        left, since = self._buckets.pop(caller, (float(self._size), now))
        left = min(float(self._size), left + (now - since) * self._size / 60)
        is_allowed = left >= 1
        self._buckets[caller] = (left - is_allowed, now)
        if len(self._buckets) > MAX_CALLERS:
            self._buckets.popitem(last=False)
        return 0 if is_allowed else math.ceil((1 - left) * 60 / self._size)


def _key(scope: Scope) -> bytes:
    return hashlib.sha256(_bearer(scope)).digest()


def _client(scope: Scope) -> bytes:
    client = scope.get("client")
    return client_of(str(client[0] if client else "")).encode()


@contextlib.contextmanager
def _counted(counts: collections.Counter[bytes], caller: bytes) -> Iterator[None]:
    """Within the block there is one more of the caller's."""
    counts[caller] += 1
    try:
        yield
    finally:
        counts[caller] -= 1
        if not counts[caller]:
            del counts[caller]


class BodyLimitMiddleware:
    """Reads a body whole before the application sees any of it: answers 413 to a long one, 408 to a slow one.

    The body of a GET is not waited for. Few late ones may be under way at a time, of one address fewer still: beyond
    that the answer is 429, so that who sends slowly takes nobody's place. A hundred readers behind one proxy, who all
    begin at once, are not late. Of those that are not late yet, there are places that no address fills by itself.
    """

    def __init__(self, app: ASGIApp, limit_bytes: int, limit_s: float = BODY_S) -> None:
        self._app = app
        self._limit_bytes = limit_bytes
        self._limit_s = limit_s
        self._arriving: collections.Counter[bytes] = collections.Counter()
        self._late: collections.Counter[bytes] = collections.Counter()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one connection."""
        if scope["type"] != "http" or scope["method"] in SAFE_METHODS:
            return await self._app(scope, receive, send)
        reading = asyncio.create_task(self._read(receive))
        try:
            status, detail = await self._wait(reading, _client(scope))
            messages = reading.result() if status == 200 else None
        finally:
            reading.cancel()
        if status == 200 and messages is None:
            status, detail = 413, f"the body is larger than {self._limit_bytes} bytes"
        if messages is None:
            headers = {"Retry-After": str(RETRY_AFTER_S)} if status == 429 else None
            return await error_response(scope["path"], status, detail, headers)(scope, receive, send)

        async def replay() -> Message:
            return messages.pop(0) if messages else await receive()

        return await self._app(scope, replay, send)

    async def _wait(self, reading: "asyncio.Task[list[Message] | None]", caller: bytes) -> tuple[int, str]:
        """Wait for a body: 200, or the status of the refusal and its words."""
        too_many = 429, "too many bodies are under way: try again later"
        on_time_s = min(LATE_S, self._limit_s)
        free, own = MAX_ARRIVING - self._arriving.total(), self._arriving[caller]
        if free <= (0 if own < MAX_BODIES_OF_ONE else ARRIVING_FOR_FEW):
            return too_many
        with _counted(self._arriving, caller):
            await asyncio.wait({reading}, timeout=on_time_s)
        if reading.done():
            return 200, ""
        if self._late.total() >= MAX_BODIES or self._late[caller] >= MAX_BODIES_OF_ONE:
            return too_many
        with _counted(self._late, caller):
            await asyncio.wait({reading}, timeout=self._limit_s - on_time_s)
        return (200, "") if reading.done() else (408, f"the body did not arrive within {self._limit_s:g} s")

    async def _read(self, receive: Receive) -> list[Message] | None:
        """The body as one message, and that of a client that left before its end; None when it is too long.

        Not message by message as it came: those of a body that comes byte by byte take a hundred times its size.
        """
        body, last = bytearray(), await receive()
        while last["type"] == "http.request":
            body += last.get("body", b"")
            if len(body) > self._limit_bytes:
                return None
            if not last.get("more_body", False):
                return [{"type": "http.request", "body": bytes(body), "more_body": False}]
            last = await receive()
        return [{"type": "http.request", "body": bytes(body), "more_body": True}, last]


def content_security_policy(page: str) -> str:
    """A policy that allows the page's own style and script, by their digests, and nothing else."""

    def digest(tag: str) -> str:
        found = re.search(f"<{tag}>(.*?)</{tag}>", page, re.DOTALL)
        assert found is not None
        return f"'sha256-{base64.b64encode(hashlib.sha256(found[1].encode()).digest()).decode()}'"

    return (
        f"default-src 'none'; script-src {digest('script')}; style-src {digest('style')}; connect-src 'self'; "
        "img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )


class SecurityHeadersMiddleware:
    """Adds headers by which browsers do not guess content types and send no referrer."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one connection."""
        if scope["type"] != "http":
            return await self._app(scope, receive, send)

        async def with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                added = [(b"x-content-type-options", b"nosniff"), (b"referrer-policy", b"no-referrer")]
                message["headers"] = [*message.get("headers", []), *added]
            await send(message)

        return await self._app(scope, receive, with_headers)


class RequestMetricsMiddleware:
    """Counts every answer by its route, one of `routes`, and its status."""

    def __init__(self, app: ASGIApp, metrics: Metrics, routes: frozenset[str]) -> None:
        self._app = app
        self._metrics = metrics
        self._routes = routes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one connection."""
        if scope["type"] != "http":
            return await self._app(scope, receive, send)
        route = scope["path"] if scope["path"] in self._routes else "other"

        is_counted = False

        async def count(message: Message) -> None:
            nonlocal is_counted
            if message["type"] == "http.response.start":
                self._metrics.count_answer(route, message["status"])
                is_counted = True
            await send(message)

        try:
            await self._app(scope, receive, count)
        except Exception:  # it is answered outside of all middlewares
            if not is_counted:
                self._metrics.count_answer(route, 500)
            raise
        return None
