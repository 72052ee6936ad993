"""A user's mistake: raised anywhere as `UserError`, shown by every command as one line with exit code 2."""

import functools
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import ParamSpec

P = ParamSpec("P")

EXIT_USER_ERROR = 2
EXIT_INTERRUPTED = 130


class UserError(Exception):
    """Something the user can mend: a path, an option, a file. The message says expected, got, and what to do."""


def first_line(error: Exception) -> str:
    """The first line of what an error says, or its kind where it says nothing."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def end_now(*_: object) -> None:
    """End this process at once, with one line and exit code 130."""
    os.write(2, b"interrupted\n")
    os._exit(EXIT_INTERRUPTED)


def end_on_interrupt() -> None:
    """Let Ctrl-C end the process plainly while a script still imports; `command` takes over when `main` begins."""
    signal.signal(signal.SIGINT, end_now)


@contextmanager
def ending_on_interrupt() -> Iterator[None]:
    """Within the block Ctrl-C ends this process at once, for work that may be broken off anywhere and continued."""
    if threading.current_thread() is not threading.main_thread():  # only that one may say what a signal does
        yield
        return
    before = signal.signal(signal.SIGINT, end_now)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def command(main: Callable[P, int]) -> Callable[P, int]:
    """Wrap a `main(argv) -> exit code`: `UserError` becomes one line and 2, Ctrl-C one line and 130."""

    @functools.wraps(main)
    def wrapped(*args: P.args, **kwargs: P.kwargs) -> int:
        if signal.getsignal(signal.SIGINT) is end_now:
            signal.signal(signal.SIGINT, signal.default_int_handler)
        try:
            return main(*args, **kwargs)
        except UserError as error:
            sys.stderr.write(f"error: {error}\n")
            return EXIT_USER_ERROR
        except KeyboardInterrupt:
            sys.stderr.write("interrupted\n")
            return EXIT_INTERRUPTED

    return wrapped
