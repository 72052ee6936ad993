"""How the server's process ends while Ray is being stopped, which may hang.

In: a time. Out: a block that ends within it, or the process does, as what ended the block would have ended it.
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

SPARE_S = 20
"""What ending takes beyond the stories: so long after them the process ends all the same."""


@contextlib.contextmanager
def ending_within(seconds: float) -> Iterator[None]:
    """Within the block a second signal ends the process at once, and so does the time when it is up.

    Ray may wait for ever for a cluster that was interrupted while it started. One of our own ends with this process.
    """
    reason = sys.exception()
    before = [(number, signal.signal(number, end_now)) for number in (signal.SIGINT, signal.SIGTERM)]
    watch = threading.Timer(seconds, _end_for, [reason])
    watch.daemon = True
    watch.start()
    try:
        yield
    finally:
        watch.cancel()
        for number, handler in before:
            signal.signal(number, handler or signal.SIG_DFL)


def _end_for(reason: BaseException | None) -> None:
    """End at once as this exception would have ended the process, which must not hide why it ends."""
    if isinstance(reason, SystemExit):
        os._exit(int(reason.code or 0))
    if isinstance(reason, Exception):
        os.write(2, f"error: {one_line(reason)}\n".encode())
        os._exit(EXIT_USER_ERROR if isinstance(reason, UserError) else 1)
    end_now()
