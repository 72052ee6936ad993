"""The fair measure's windows: each story with its own beginning, a longer one in parts that overlap.

In: the length of a text, context and stride. Out: the windows in which a model sees it, each target counted once.
Validation (`training.evaluation`) and `evaluate.py` both take them from here.
"""

from collections.abc import Iterator
from dataclasses import dataclass

PADDING = 16
"""Windows are padded to a multiple of this, and not beyond the context."""


def stride_of(seq_len: int) -> int:
    """Tokens by which the next window of a longer text begins later: half a context."""
    return max(seq_len // 2, 1)


@dataclass(frozen=True, kw_only=True)
class Window:
    """A part of a text that the model sees at once, and which of its targets count."""

    text: int
    """Number of the text among those that are scored together."""
    start: int
    """Place of the first token that the model sees."""
    stop: int
    """Place of the last target; the model sees the tokens from `start` up to the one before it."""
    first: int
    """Place of the first target that counts: those before it were counted by an earlier window."""

    def padded(self, seq_len: int) -> int:
        """Tokens of the row that it stands in."""
        return min(-(-(self.stop - self.start) // PADDING) * PADDING, seq_len)


def windows_of(text: int, n_tokens: int, *, seq_len: int, stride: int) -> Iterator[Window]:
    """Windows over a text of n_tokens tokens, of which all but the first are targets, each counted once.

    The first window begins with the text; each following one begins `stride` tokens later, as far as it takes.
    seq_len 4, stride 2, 8 tokens -> targets 1 to 4 after token 0, 5 and 6 after token 2, 7 after token 4.
    """
    first = 1
    for start in range(0, n_tokens, stride):
        stop = min(start + seq_len, n_tokens - 1)
        if first <= stop:
            yield Window(text=text, start=start, stop=stop, first=first)
        first = stop + 1
        if first >= n_tokens:
            return


def alike(windows: list[Window], *, seq_len: int, most_tokens: int) -> Iterator[list[Window]]:
    """Windows of one padded length together, the longest first, as many as `most_tokens` allows and at least one."""
    by_length: dict[int, list[Window]] = {}
    for window in windows:
        by_length.setdefault(window.padded(seq_len), []).append(window)
    for length in sorted(by_length, reverse=True):
        rows = max(1, most_tokens // length)
        for first in range(0, len(by_length[length]), rows):
            yield by_length[length][first : first + rows]
