"""glibc's allocation of memory, in a process that runs already: the environment tells it only to those that begin.

In: numbers as `malloc.h` has them. Out: nothing. Another C library does what it does.
"""

import contextlib
import ctypes
from collections.abc import Mapping

TRIM_THRESHOLD, TOP_PAD, MMAP_THRESHOLD, MMAP_MAX, ARENA_MAX = -1, -2, -3, -4, -8


def set_malloc(options: Mapping[int, int]) -> None:
    """Set each of these to its value, a C int."""
    with contextlib.suppress(AttributeError, OSError, TypeError):  # TypeError: Windows has no library of this process
        mallopt = ctypes.CDLL(None).mallopt
        for name, value in options.items():
            mallopt(name, value)
