"""Importing a package without some of the packages that it would use if they were there.

In: their names. Out: a block in which they count as not installed. Beam imports the clients of all clouds that it
finds, half a second of which no local job uses anything.
"""

import sys
from collections.abc import Iterator
from contextlib import contextmanager


class _Absent:
    def __init__(self, names: tuple[str, ...]) -> None:
        self._names = names

    def find_spec(self, name: str, *_: object) -> None:
        if name in self._names:
            raise ModuleNotFoundError(f"{name} is left out here", name=name)
        return


@contextmanager
def without(*names: str) -> Iterator[None]:
    """Let imports of these packages fail in the block, unless they were imported before; after it they succeed."""
    absent = _Absent(names)
    sys.meta_path.insert(0, absent)
    try:
        yield
    finally:
        sys.meta_path.remove(absent)
