"""Something called every few seconds, from a thread of its own, for the length of a block."""

import contextlib
import threading
from collections.abc import Callable, Iterator


@contextlib.contextmanager
def every(
    interval_s: float, call: Callable[[], object], *, at_start: Callable[[], object] | None = None, at_end: bool = True
) -> Iterator[None]:
    """Call `call` every `interval_s` seconds within the block.

    `at_start` is called first, in the same thread. With `at_end`, `call` is called once more when the block ends, and
    the block waits for it; without, nothing is waited for.
    """
    is_over = threading.Event()

    def run() -> None:
        if at_start is not None:
            at_start()
        while not is_over.wait(interval_s):
            call()
        if at_end:
            call()

    thread = threading.Thread(target=run, name=f"every {interval_s:g} s", daemon=True)
    thread.start()
    try:
        yield
    finally:
        is_over.set()
        if at_end:
            thread.join()
