"""Choices that are a pure function of integer keys, in every version of Python.

In: keys, such as a seed and a story's number. Out: a stream of choices, by integer hashing; the methods of `random` may
draw differently in another version.
"""

from collections.abc import Sequence
from typing import TypeVar

_MASK = (1 << 64) - 1
_GOLDEN = 0x9E3779B97F4A7C15
_T = TypeVar("_T")


class Dice:
    """A stream of choices fixed by integer keys: SplitMix64 (Steele, Lea, Flood, OOPSLA 2014)."""

    def __init__(self, *keys: int) -> None:
        self._state = 0
        for key in keys:
            self._state = (self._state ^ key) & _MASK
            self._state = self._next()

    def _next(self) -> int:
        self._state = (self._state + _GOLDEN) & _MASK
        z = self._state
        z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
        z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & _MASK
        return z ^ (z >> 31)

    def pick(self, options: Sequence[_T]) -> _T:
        """One of the options; the bias of scaling 64 bits down is below 1e-15."""
        return options[(self._next() * len(options)) >> 64]

    def sample(self, options: Sequence[_T], count: int) -> list[_T]:
        """`count` different positions of `options`, in random order."""
        rest = list(options)
        return [rest.pop((self._next() * len(rest)) >> 64) for _ in range(count)]

    def chance(self, percent: int) -> bool:
        """True in `percent` of 100 throws."""
        return (self._next() * 100) >> 64 < percent
