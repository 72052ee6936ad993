"""ASGI middlewares of every connection: which host it asks for, HEAD, the request's id.

In: connections. Out: the same, or an error in the form of the route. `routes.py` stacks them around `middleware.py`'s.
"""

import ipaddress
import socket
import uuid

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from serve.api.error_responses import error_response
from serve.api.middleware import PUBLIC_ROUTES

ANY = "*"
_MISDIRECTED = 421
_REQUEST_ID = b"x-request-id"
MAX_ID_BYTES = 200
"""Of an id that a request names."""


class HostMiddleware:
    """Answers 421 where the `Host` of a request is a name that this server does not go by.

    A page of any site may let its own name lead to this machine (DNS rebinding), and its script would then speak to
    this server as to its own. It cannot do so with an address or with this machine's name.
    """

    def __init__(self, app: ASGIApp, hosts: tuple[str, ...]) -> None:
        self._app = app
        self._hosts = {host.lower() for host in (*hosts, "localhost", socket.gethostname())}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one connection."""
        if scope["type"] != "http" or scope["path"] in PUBLIC_ROUTES - {"/"} or self._is_known(_host(scope)):
            return await self._app(scope, receive, send)
        detail = f"this server does not go by the name {_host(scope)[:100]!r}: name it with --allowed-hosts"
        return await error_response(scope["path"], _MISDIRECTED, detail)(scope, receive, send)

    def _is_known(self, host: str) -> bool:
        return not host or ANY in self._hosts or host in self._hosts or _is_address(host)


def _host(scope: Scope) -> str:
    """The name or address that a request asks for, without its port; empty without one."""
    value = next((value for name, value in scope["headers"] if name == b"host"), b"").decode("latin-1").lower()
    if value.startswith("["):
        return str(value[1:].partition("]")[0])
    return str(value.partition(":")[0]).rstrip(".")


def _is_address(host: str) -> bool:
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True


class HeadMiddleware:
    """Answers HEAD as GET is answered, without the body."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one connection."""
        if scope["type"] != "http" or scope["method"] != "HEAD":
            return await self._app(scope, receive, send)

        async def without_body(message: Message) -> None:
            await send({**message, "body": b""} if message["type"] == "http.response.body" else message)

        return await self._app({**scope, "method": "GET"}, receive, without_body)


class RequestIdMiddleware:
    """Gives every answer an id, the one that the request names or a new one, as OpenAI's clients show it in errors."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one connection."""
        if scope["type"] != "http":
            return await self._app(scope, receive, send)
        named = next((value for name, value in scope["headers"] if name == _REQUEST_ID), b"")
        number = named[:MAX_ID_BYTES] or uuid.uuid4().hex.encode()

        async def with_id(message: Message) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message.get("headers", []), (_REQUEST_ID, number)]
            await send(message)

        return await self._app(scope, receive, with_id)
