"""Connections answered in the replica's own process, without Ray Serve's proxy: it costs more than the rest of HTTP.

In: the application, a listening socket that several replicas may share. Out: answers, by uvicorn, with the bounds of
`proxy_limits.py`. A replica whose slots are all in use leaves new connections to the others for a moment, and after an
answer ends the connection, so that the next request finds one that has time.
"""

import asyncio
import os
import socket
import threading
from typing import Any

import uvicorn
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from serve.proxy_limits import BoundedProtocol

LEAVE_S = 0.02
"""How long a full replica leaves new connections to the others; then all are full, and it takes what is left."""
PAUSE_S = 1.0
"""After a connection could not be taken, as where no file is left."""
KEEP_ALIVE_S = 90
"""Longest silence between two requests of a connection, as behind Ray Serve's proxy."""


class DirectHttp:
    """A thread with an event loop of its own that answers connections, as long as the process lives.

    slots: requests under way from which on new ones are left to other replicas; 0 where there is no other.
    """

    def __init__(self, app: ASGIApp, listener: socket.socket, slots: int = 0) -> None:
        config = uvicorn.Config(
            self._unless_full,
            interface="asgi3",
            http=BoundedProtocol,
            ws="none",
            lifespan="off",  # Ray Serve runs it
            log_config=None,
            access_log=False,
            server_header=False,
            timeout_keep_alive=KEEP_ALIVE_S,
            # uvicorn believes X-Forwarded-For of every client on this machine, and the rate limit with it.
            forwarded_allow_ips=os.environ.get("FORWARDED_ALLOW_IPS", ""),
        )
        config.load()
        self._app, self._listener, self._slots = app, listener, slots
        self._server = uvicorn.Server(config)
        self._coming: dict[BoundedProtocol, asyncio.Task[Any]] = {}  # connections that are being made
        self._thread = threading.Thread(target=self._run, name="http", daemon=True)
        self._thread.start()

    @property
    def is_alive(self) -> bool:
        """Whether connections are taken."""
        return self._thread.is_alive()

    def close(self) -> None:
        """Take no more connections, and wait until those that there are have ended."""
        self._server.should_exit = True
        self._thread.join()

    def _run(self) -> None:
        with asyncio.Runner(loop_factory=self._server.config.get_loop_factory()) as runner:
            runner.run(self._serve())

    async def _serve(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._loop.add_reader(self._listener, self._knock)
        await self._server.serve(sockets=[])  # connections are taken here: it would take all that wait at once
        self._loop.remove_reader(self._listener)
        self._listener.close()

    @property
    def _spare(self) -> int:
        """Slots that are not in use; a new connection counts as one, since its request is about to come."""
        connections: set[Any] = {*self._server.server_state.connections, *self._coming}
        return self._slots - sum(one.cycle is None or not one.cycle.response_complete for one in connections)

    async def _unless_full(self, scope: Scope, receive: Receive, send: Send) -> None:
        """The application; where there are more requests than slots, a connection ends behind its answer."""

        async def with_end(message: Message) -> None:
            if message["type"] == "http.response.start" and self._spare < 0:
                message["headers"] = [*message.get("headers", []), (b"connection", b"close")]
            await send(message)

        await self._app(scope, receive, with_end if self._slots else send)

    def _knock(self) -> None:
        if self._slots and self._spare <= 0:
            self._pause(LEAVE_S)
        else:
            self._take()

    def _pause(self, seconds: float) -> None:
        self._loop.remove_reader(self._listener)
        self._loop.call_later(seconds, self._go_on)

    def _go_on(self) -> None:
        if self._listener.fileno() < 0:
            return
        self._loop.add_reader(self._listener, self._knock)
        while self._take():
            pass

    def _take(self) -> bool:
        """Take a connection; whether there was one. One at a time, so that replicas share what comes at once."""
        try:
            connection, _ = self._listener.accept()
        except (BlockingIOError, ConnectionAbortedError):  # another replica was faster, or the client is gone
            return False
        except OSError:
            self._pause(PAUSE_S)
            return False
        connection.setblocking(False)
        state = self._server.server_state
        protocol = BoundedProtocol(config=self._server.config, server_state=state, app_state={}, _loop=self._loop)
        task = self._loop.create_task(self._loop.connect_accepted_socket(lambda: protocol, connection))
        self._coming[protocol] = task
        task.add_done_callback(lambda _: self._coming.pop(protocol))
        return True
