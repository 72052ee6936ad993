"""How a command ends: `UserError` and Ctrl-C as one line and an exit code.

In: a `main(argv) -> exit code`. Out: the same, wrapped.
"""

import functools
import io
import signal
import sys
from collections.abc import Callable
from typing import ParamSpec

from slm_ray.cli.signals import EXIT_INTERRUPTED, StoppedError, end_now
from slm_ray.errors import UserError

P = ParamSpec("P")
EXIT_USER_ERROR = 2


def command(main: Callable[P, int]) -> Callable[P, int]:
    """Wrap a `main(argv) -> exit code`: `UserError` becomes one line and 2, Ctrl-C one line and 130.

    A `StoppedError` adds its message; where SIGTERM was its reason, the code is 143.
    """

    @functools.wraps(main)
    def wrapped(*args: P.args, **kwargs: P.kwargs) -> int:
        write_what_is_possible()
        if signal.getsignal(signal.SIGINT) is end_now:
            signal.signal(signal.SIGINT, signal.default_int_handler)
        try:
            return main(*args, **kwargs)
        except UserError as error:
            sys.stderr.write(f"error: {error}\n")
            return EXIT_USER_ERROR
        except KeyboardInterrupt as stop:
            if isinstance(stop, StoppedError):
                sys.stderr.write(f"{stop}\n")
                if stop.signal_number != signal.SIGINT:
                    return stop.exit_code
            sys.stderr.write("interrupted\n")
            return EXIT_INTERRUPTED

    return wrapped


def write_what_is_possible() -> None:
    """Let standard output write out as `\\u732b` what its encoding lacks, as ASCII does in cron, instead of failing."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")
