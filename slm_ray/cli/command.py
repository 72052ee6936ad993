"""How a command ends: `UserError`, Ctrl-C and an output that takes no more, as one line and an exit code.

In: a `main(argv) -> exit code`. Out: the same, wrapped.
"""

import contextlib
import errno
import functools
import io
import os
import select
import signal
import sys
from collections.abc import Callable
from typing import ParamSpec

from slm_ray.cli.signals import EXIT_BY_SIGNAL, EXIT_INTERRUPTED, StoppedError, end_now
from slm_ray.errors import UserError

P = ParamSpec("P")
EXIT_USER_ERROR = 2
DISK_IS_FULL = (errno.ENOSPC, errno.EDQUOT)
EXIT_NOT_READ = EXIT_BY_SIGNAL + signal.SIGPIPE
"""As of any program in a pipe whose reader has left: `generate.py | head -1`."""


def command(main: Callable[P, int]) -> Callable[P, int]:
    """Wrap a `main(argv) -> exit code`: `UserError` becomes one line and 2, Ctrl-C one line and 130.

    A `StoppedError` adds its message; where SIGTERM was its reason, the code is 143. Where standard output takes no
    more, the code is 2 with a line that says why, or 141 where nobody reads it any longer.
    """

    @functools.wraps(main)
    def wrapped(*args: P.args, **kwargs: P.kwargs) -> int:
        write_what_is_possible()
        if signal.getsignal(signal.SIGINT) is end_now:
            signal.signal(signal.SIGINT, signal.default_int_handler)
        try:
            code = main(*args, **kwargs)
            if sys.stdout is not None:
                sys.stdout.flush()
            return code
        except UserError as error:
            _say(f"error: {error}")
            return EXIT_USER_ERROR
        except KeyboardInterrupt as stop:
            if isinstance(stop, StoppedError):
                _say(str(stop))
                if stop.signal_number != signal.SIGINT:
                    return stop.exit_code
            _say("interrupted")
            return EXIT_INTERRUPTED
        except OSError as error:
            is_read, lost = not _has_lost_its_reader(), _lost_output()
            if not is_read:
                return EXIT_NOT_READ
            if lost is None and error.errno not in DISK_IS_FULL:
                raise
            what = f"{error.filename}" if error.filename else "standard output" if lost else "a file"
            _say(f"error: {what} takes no more: {(lost or error).strerror}")
            return EXIT_USER_ERROR

    return wrapped


def _say(line: str) -> None:
    """To standard error, where it is open and somebody reads it; the exit code counts all the same."""
    with contextlib.suppress(OSError, AttributeError):
        sys.stderr.write(f"{line}\n")


def _has_lost_its_reader() -> bool:
    """Whether standard output is a pipe at whose other end nobody reads."""
    with contextlib.suppress(OSError, ValueError, AttributeError):  # none, or one of a test
        asked = select.poll()
        asked.register(sys.stdout.fileno(), 0)
        return any(event & select.POLLERR for _, event in asked.poll(0))
    return False


def _lost_output() -> OSError | None:
    """Why standard output takes no more, if it kept what it could not write.

    What is left of it goes nowhere: it would be Python's last words.
    """
    lost = None
    try:
        sys.stdout.flush()
    except OSError as error:
        lost = error
    except AttributeError:
        return None
    with contextlib.suppress(OSError, ValueError):
        if lost or _has_lost_its_reader():
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, sys.stdout.fileno())
            os.close(nowhere)
    return lost


def write_what_is_possible() -> None:
    """Let standard output write out as `\\u732b` what its encoding lacks, as ASCII does in cron, instead of failing."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")
