"""Ends a worker that hangs.

In: heartbeats, one after every piece of work. Out: one call, when there was none for too long. A worker that waits for
another one that was stopped, for a disk that does not answer or for a deadlock is alive and silent: it is ended, so
that its group starts again from the last checkpoint.
"""

import contextlib
import threading
from collections.abc import Callable, Iterator

POLLS = 20
MAX_POLL_S = 1.0


class Watchdog:
    """Counts the time since the last heartbeat. Only time in which it ran itself counts: sleep is no hang."""

    def __init__(self, timeout_s: float) -> None:
        self._timeout_s = timeout_s
        self._idle_s = 0.0
        self._is_paused = False
        self._is_over = threading.Event()

    def heartbeat(self) -> None:
        """Start counting anew."""
        self._idle_s = 0.0

    @contextlib.contextmanager
    def watching(self, on_hang: Callable[[], None]) -> Iterator[None]:
        """While the body runs, call `on_hang` from a thread once nothing was done for the time; with 0, never."""
        thread = threading.Thread(target=self._watch, args=(on_hang,), name="watchdog", daemon=True)
        if self._timeout_s > 0:
            thread.start()
        try:
            yield
        finally:
            self._is_over.set()

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Within the block nothing counts as a hang: this worker waits for others, which are watched themselves."""
        self._is_paused = True
        try:
            yield
        finally:
            self._is_paused = False
            self.heartbeat()

    def _watch(self, on_hang: Callable[[], None]) -> None:
        poll_s = min(MAX_POLL_S, self._timeout_s / POLLS)
        while not self._is_over.wait(poll_s):
            self._idle_s += 0.0 if self._is_paused else poll_s
            if self._idle_s >= self._timeout_s:
                on_hang()
                return
