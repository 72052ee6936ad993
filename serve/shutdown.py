"""Deadline for stopping Ray, which may hang.

In: seconds. Out: a block that ends within them, or else the process exits, with the code it would have had.
"""

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Iterator

from slm_ray.cli.command import EXIT_USER_ERROR
from slm_ray.cli.signals import end_now
from slm_ray.errors import UserError, one_line

GRACE_S = 20
"""Time to stop Ray once the stories are finished; after it the process exits all the same."""


@contextlib.contextmanager
def shutdown_deadline(seconds: float) -> Iterator[None]:
    """Within the block a second signal exits the process at once, and so does the deadline.

    Ray may wait for ever for a cluster that was interrupted while it started. One of our own ends with this process.
    """
    reason = sys.exception()
    previous = [(number, signal.signal(number, end_now)) for number in (signal.SIGINT, signal.SIGTERM)]
    timer = threading.Timer(seconds, _exit_as, [reason])
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
        for number, handler in previous:
            signal.signal(number, handler or signal.SIG_DFL)


def _exit_as(reason: BaseException | None) -> None:
    """Exit at once as this exception would have: with its message and exit code."""
    if isinstance(reason, SystemExit):
        os._exit(int(reason.code or 0))
    if isinstance(reason, Exception):
        os.write(2, f"error: {one_line(reason)}\n".encode())
        os._exit(EXIT_USER_ERROR if isinstance(reason, UserError) else 1)
    end_now()
