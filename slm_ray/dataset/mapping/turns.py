"""One process at a time does something long, and the others wait for it as long as it goes on.

In: the path of a lock file. Out: a block that one process is in. Who is in it touches the file as it goes on; who waits
says so, and gives up where the file was not touched for a stated time: a process may be stopped, and hold its lock.
"""

import contextlib
import fcntl
import logging
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

LOGGER = logging.getLogger(__name__)
SAID_AFTER_S, GIVEN_UP_AFTER_S, ASKED_EVERY_S = 10.0, 300.0, 0.1


@dataclass(frozen=True)
class Turn:
    """That it is this process's turn."""

    is_alone: bool
    """Whether the system keeps others out; without locks on that disk, or where nothing can be written, it does not."""
    go_on: Callable[[], None]
    """Call it again and again: those who wait see that something is done."""


@contextlib.contextmanager
def turn(path: Path) -> Iterator[Turn]:
    """Wait until nobody else is in the block.

    Raises:
        TimeoutError: who is in it has done nothing for GIVEN_UP_AFTER_S.
    """
    try:
        file = path.open("ab")
    except OSError:  # nothing can be written there, so nobody does
        yield Turn(False, lambda: None)
        return
    with file:

        def go_on() -> None:
            with contextlib.suppress(OSError):
                os.utime(path)

        is_alone = _waited(file.fileno(), path)
        go_on()
        yield Turn(is_alone, go_on)


def _waited(descriptor: int, path: Path) -> bool:
    """Whether it was locked at last. Raises: TimeoutError."""
    began = touched_at = time.monotonic()
    touched, is_said = os.fstat(descriptor).st_mtime_ns, False
    while True:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            now, found = time.monotonic(), os.fstat(descriptor).st_mtime_ns
            if found != touched:
                touched, touched_at = found, now
        except OSError:
            return False
        else:
            return True
        if now - touched_at >= GIVEN_UP_AFTER_S:
            raise TimeoutError(f"another process holds {path} and has done nothing for {GIVEN_UP_AFTER_S:g} s")
        if not is_said and now - began >= SAID_AFTER_S:
            is_said = True
            LOGGER.warning("waiting for another process that holds %s (at most %g s after it stops working)",
                           path, GIVEN_UP_AFTER_S)  # fmt: skip
        time.sleep(ASKED_EVERY_S)
