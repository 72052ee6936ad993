"""What SIGTERM and Ctrl-C do to a command.

In: a signal. Out: a request that the workers save and leave, and `StoppedError` once they have, or at once where the
signal comes again; outside of that, the end of the process or `StoppedError`.
"""

import contextlib
import os
import signal
import threading
from collections.abc import Callable, Iterator
from types import FrameType

EXIT_BY_SIGNAL = 128
EXIT_INTERRUPTED = EXIT_BY_SIGNAL + signal.SIGINT


class StoppedError(KeyboardInterrupt):
    """The run was asked to stop by a signal, and has done so. A KeyboardInterrupt, so that generic handlers treat it as
    Ctrl-C."""

    def __init__(self, message: str, signal_number: int) -> None:
        super().__init__(message)
        self.signal_number = signal_number

    @property
    def exit_code(self) -> int:
        """What a shell says of a process that the signal ended: 130 after Ctrl-C, 143 after SIGTERM."""
        return EXIT_BY_SIGNAL + self.signal_number


class Signals:
    """What came in while `catching` was open."""

    def __init__(self, on_first: Callable[[], None]) -> None:
        self.received = 0  # number of the first signal, 0 for none
        self._on_first = on_first

    @contextlib.contextmanager
    def catching(self) -> Iterator["Signals"]:
        """Take SIGINT and SIGTERM; on another thread than the main one, which alone gets signals, this does nothing."""
        if threading.current_thread() is not threading.main_thread():
            yield self
            return
        before = {number: signal.signal(number, self._take) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield self
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _take(self, number: int, _frame: FrameType | None) -> None:
        if self.received:
            raise StoppedError("left at once: steps since the last checkpoint are lost", number)
        self.received = number
        try:
            self._on_first()
        except OSError as error:
            reason = f"the workers cannot be asked to save ({error.strerror or error})"
            raise StoppedError(f"{reason}: steps since the last checkpoint are lost", number) from error
        os.write(2, b"\nstopping after this step, with a checkpoint (once more: at once)\n")


@contextlib.contextmanager
def ending_on_sigterm() -> Iterator[None]:
    """Within the block SIGTERM raises `StoppedError`, where nothing else takes it; on the main thread only.

    Where Ray waits, a plain KeyboardInterrupt comes in place of what a handler raises: it counts as SIGTERM too.
    """
    outside = "stopped outside of the training itself, which loses nothing"
    came: list[int] = []

    def end(number: int, _frame: FrameType | None) -> None:
        came.append(number)
        raise StoppedError(outside, number)

    with _handled(signal.SIGTERM, end):
        try:
            yield
        except KeyboardInterrupt as stop:
            if not came:
                raise
            raise StoppedError(str(stop) or outside, came[0]) from None


def end_now(*_: object) -> None:
    """End this process at once, with one line and exit code 130."""
    os.write(2, b"interrupted\n")
    os._exit(EXIT_INTERRUPTED)


def end_on_interrupt() -> None:
    """Let Ctrl-C end the process plainly while a script still imports; `command` takes over when `main` begins."""
    signal.signal(signal.SIGINT, end_now)


@contextlib.contextmanager
def ending_on_interrupt(first: Callable[[], object] = lambda: None) -> Iterator[None]:
    """Within the block Ctrl-C ends this process at once, for work that may be broken off anywhere and continued.

    `first` is called before: nothing that stands behind the block will be.
    """

    def end(*_: object) -> None:
        try:
            first()
        finally:
            end_now()

    with _handled(signal.SIGINT, end):
        yield


@contextlib.contextmanager
def _handled(number: int, handler: Callable[[int, FrameType | None], object]) -> Iterator[None]:
    """Take a signal within the block; on another thread than the main one, which alone gets signals, do nothing."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(number, handler)
    try:
        yield
    finally:
        signal.signal(number, before)
