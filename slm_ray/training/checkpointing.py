"""One piece of work at a time beside the training step: writing a checkpoint.

In: a function that writes, from rank 0. Out: nothing, or the error it met, when somebody waits for it.
"""

import threading
from collections.abc import Callable


class Saver:
    """Runs one function in a thread of its own. Not a daemon: the process does not end in the middle of a write."""

    def __init__(self) -> None:
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None

    @property
    def is_busy(self) -> bool:
        """Whether something was started and not yet waited for."""
        return self._thread is not None

    def start(self, write: Callable[[], None]) -> None:
        """Begin; what was started before has to be waited for first."""
        assert self._thread is None, "one write at a time"
        self._thread = threading.Thread(target=self._run, args=(write,), name="checkpoint")
        self._thread.start()

    def wait(self) -> OSError | None:
        """Wait until the work is done, if there is any. Returns what the disk refused; any other error is raised."""
        if self._thread is None:
            return None
        self._thread.join()
        error, self._thread, self._error = self._error, None, None
        if error is not None and not isinstance(error, OSError):
            raise error
        return error

    def _run(self, write: Callable[[], None]) -> None:
        try:
            write()
        except BaseException as error:  # handed to whoever waits
            self._error = error
