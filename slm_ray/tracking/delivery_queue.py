"""Deliveries that must not hold up the work: calls made in order, by a thread of their own.

In: calls that send something somewhere. Out: the calls made, one after another. A call that fails, or one too many
waiting, is dropped and costs a warning: the work goes on. `mlflow_runs` sends metrics through it, so that a training
neither waits for a store nor ends with it.
"""

import contextlib
import threading
from collections import deque
from collections.abc import Callable

from slm_ray.errors import one_line

CAPACITY = 10_000
FLUSH_S = 30.0
SILENT_S = 2.0
"""After so long without a call the thread ends, and the next call begins another: a process that trains run after run
would keep those of all of them."""


class DeliveryQueue:
    """A queue of calls, and the thread that makes them. `warn` hears that some fail, and how many.

    is_kept: what a call that failed should have sent lies in a record of the owner's, from which a later call sends it.
    """

    def __init__(self, receiver: str, warn: Callable[[str], None], *, is_kept: bool = False) -> None:
        self._receiver, self._warn, self._is_kept = receiver, warn, is_kept
        self._calls: deque[Callable[[], object]] = deque()
        self._changed = threading.Condition()
        self._thread: threading.Thread | None = None
        self._n_lost = 0

    def put(self, call: Callable[[], object]) -> None:
        """Make a call soon; returns at once."""
        with self._changed:
            if len(self._calls) >= CAPACITY:
                self._lose(f"{CAPACITY:,} records are waiting")
                return
            if self._thread is None and not self._begin():
                return
            self._calls.append(call)
            self._changed.notify_all()

    def flush(self, timeout_s: float = FLUSH_S) -> bool:
        """Wait until all calls have been made; gives up with a warning after `timeout_s`. Returns whether all were."""
        with self._changed:
            is_empty = self._changed.wait_for(lambda: not self._calls, timeout_s)
            n_left = len(self._calls)
            n_lost = self._n_lost
            self._n_lost = 0
        if n_lost:
            fate = ": --resume sends what is kept" if self._is_kept else ""
            self._say(f"{self._receiver} did not take {n_lost:,} record{'s' if n_lost > 1 else ''}{fate}")
        if not is_empty:
            self._say(f"{self._receiver} did not take the last {n_left:,} records within {timeout_s:g} s")
        return is_empty

    def _begin(self) -> bool:
        """Begin a thread. Returns whether there is one: not where the machine has none left, or the process ends."""
        thread = threading.Thread(target=self._deliver, daemon=True, name=f"delivery to {self._receiver}")
        try:
            thread.start()
        except RuntimeError as error:
            self._lose(one_line(error))
            return False
        self._thread = thread
        return True

    def _deliver(self) -> None:
        while True:
            with self._changed:
                if not self._changed.wait_for(lambda: bool(self._calls), SILENT_S):
                    self._thread = None
                    return
                call = self._calls[0]  # stays in the queue until it is done: `flush` waits for it
            try:
                call()
            except Exception as error:  # whatever a store's client raises, the work goes on
                self._lose(one_line(error))
            else:
                self._recover()
            with self._changed:
                self._calls.popleft()
                self._changed.notify_all()

    def _lose(self, reason: str) -> None:
        self._n_lost += 1
        if self._n_lost == 1:
            fate = "they are kept with the run" if self._is_kept else "the run goes on without"
            self._say(f"{self._receiver} does not take the records, {fate}: {reason}")

    def _recover(self) -> None:
        if self._n_lost:
            fate = "what it missed is sent" if self._is_kept else f"{self._n_lost:,} were lost"
            self._say(f"{self._receiver} takes records again; {fate}")
        self._n_lost = 0

    def _say(self, text: str) -> None:
        with contextlib.suppress(OSError):  # a full disk, where the warning is written to a file
            self._warn(text)
