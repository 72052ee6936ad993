"""Connections answered in the replica's own process, without Ray Serve's proxy: it costs more than the rest of HTTP.

In: the application, a listening socket that several replicas may share. Out: answers, by uvicorn, with the bounds of
`proxy_limits.py`. A replica whose slots are all in use leaves each new connection to the others for a moment, and after
an answer ends the connection, so that the next request finds one that has time.
"""

import asyncio
import contextlib
import itertools
import os
import socket
import threading
from typing import Any

import uvicorn
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from serve.proxy_limits import BoundedProtocol

LEAVE_S = 0.02
"""How long a replica without a spare slot leaves a new connection to the others, before it takes that one."""
LEAVE_FULL_S = 0.1
"""The same of one whose line is full, too: what it takes it will refuse, where another may have a place."""
NEW_S = 0.05
"""A new connection counts as a request for so long: one is about to come. Who says nothing then holds no slot."""
PAUSE_S = 1.0
"""After a connection could not be taken, as where no file is left."""
KEEP_ALIVE_S = 90
"""Longest silence between two requests of a connection, as behind Ray Serve's proxy."""
_NUMBER = "slm_connection"
"""Key in a request's scope of the number of its connection."""


class DirectHttp:
    """A thread with an event loop of its own that answers connections, as long as the process lives.

    slots: requests under way from which on new ones are left to other replicas; 0 where there is no other.
    max_waiting: how many more the application takes.
    """

    def __init__(self, app: ASGIApp, listener: socket.socket, slots: int = 0, max_waiting: int = 0) -> None:
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
        self._app, self._listener, self._slots, self._max_waiting = app, listener, slots, max_waiting
        self._server = uvicorn.Server(config)
        self._coming = set[asyncio.Task[Any]]()  # connections that are being made
        self._numbers = itertools.count()  # of connections
        self._new = set[int]()  # those that are young and have not asked yet
        self._under_way = 0  # requests
        self._pause_end: asyncio.TimerHandle | None = None
        self._began = threading.Event()
        self._thread = threading.Thread(target=self._run, name="http", daemon=True)
        self._thread.start()

    @property
    def is_alive(self) -> bool:
        """Whether connections are taken."""
        return self._thread.is_alive()

    def leave(self) -> None:
        """Take no more connections: silent ones end, the others behind the answer that they wait for."""
        if not self._began.wait(PAUSE_S):
            self._server.should_exit = True
            return
        with contextlib.suppress(RuntimeError):  # the loop has ended
            self._loop.call_soon_threadsafe(self._leave)

    def join(self, timeout_s: float | None = None) -> None:
        """After `leave`: wait until all answers are sent, but not for longer than that."""
        self._thread.join(timeout_s)

    def close(self) -> None:
        """Take no more connections, and wait until those that there are have ended."""
        self.leave()
        self.join()

    def _run(self) -> None:
        with asyncio.Runner(loop_factory=self._server.config.get_loop_factory()) as runner:
            runner.run(self._serve())

    async def _serve(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._loop.add_reader(self._listener, self._knock)
        self._began.set()
        await self._server.serve(sockets=[])  # connections are taken here: it would take all that wait at once
        self._leave()

    def _leave(self) -> None:
        if self._listener.fileno() >= 0:
            self._end_pause()
            self._loop.remove_reader(self._listener)
            self._listener.close()
            self._loop.call_later(NEW_S, self._end_connections)  # whoever has just come asks first

    def _end_connections(self) -> None:
        """uvicorn ends those that are silent, waits for the answers of the others, and with the last one ends."""
        self._server.should_exit = True

    @property
    def _spare(self) -> int:
        """Slots that are not in use; below zero as many as wait for one."""
        return self._slots - self._under_way - len(self._new)

    async def _unless_full(self, scope: Scope, receive: Receive, send: Send) -> None:
        """The application; where there are more requests than slots, a connection ends behind its answer."""

        async def with_end(message: Message) -> None:
            if message["type"] == "http.response.start" and self._spare < 0:
                message["headers"] = [*message.get("headers", []), (b"connection", b"close")]
            await send(message)

        self._new.discard(scope["state"].pop(_NUMBER, -1))
        self._under_way += 1
        try:
            await self._app(scope, receive, with_end if self._slots else send)
        finally:
            self._under_way -= 1
            if self._pause_end is not None and self._spare > 0:
                self._listen()

    def _knock(self) -> None:
        if self._slots and self._spare <= 0:
            self._pause(LEAVE_S if -self._spare < self._max_waiting else LEAVE_FULL_S)
        else:
            self._take()

    def _pause(self, seconds: float) -> None:
        self._loop.remove_reader(self._listener)
        self._pause_end = self._loop.call_later(seconds, self._go_on)

    def _end_pause(self) -> None:
        if self._pause_end is not None:
            self._pause_end.cancel()
            self._pause_end = None

    def _listen(self) -> None:
        self._end_pause()
        if self._listener.fileno() >= 0:
            self._loop.add_reader(self._listener, self._knock)

    def _go_on(self) -> None:
        """Others had time to take it. One connection alone: whether they have time for the next is not known yet."""
        self._listen()
        if self._listener.fileno() >= 0:
            self._take()

    def _take(self) -> None:
        """Take a connection, if there is one. One at a time, so that replicas share what comes at once."""
        try:
            connection, _ = self._listener.accept()
        except (BlockingIOError, ConnectionAbortedError):  # another replica was faster, or the client is gone
            return
        except OSError:
            self._pause(PAUSE_S)
            return
        connection.setblocking(False)
        number = next(self._numbers)
        if self._slots:
            self._new.add(number)
            self._loop.call_later(NEW_S, self._new.discard, number)
        protocol = BoundedProtocol(
            config=self._server.config,
            server_state=self._server.server_state,
            app_state={_NUMBER: number},
            _loop=self._loop,
        )
        task = self._loop.create_task(self._loop.connect_accepted_socket(lambda: protocol, connection))
        self._coming.add(task)
        task.add_done_callback(self._coming.discard)
