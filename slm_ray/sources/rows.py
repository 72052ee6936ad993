"""What the row formats share: what a row is, the lines of a stream, and where rows begin.

In: chunks of bytes. Out: lines; counts and byte borders. Called by the format modules.
"""

from collections.abc import Iterable, Iterator

LONGEST_BYTES = 1 << 28
"""More than this without an end is no story but a file of another kind, and must not fill the memory."""

Row = tuple[bytes | None, str | None]
"""The bytes of a story and its problem: a reason of `text.REASONS` where there is no text to clean."""


class TooLongError(Exception):
    """A line, or a story, of more than `LONGEST_BYTES`."""

    def __init__(self, what: str) -> None:
        super().__init__(f"{what} is longer than {LONGEST_BYTES >> 20} MiB")


class RowCount:
    """Counts rows, and remembers where each `step`-th begins."""

    def __init__(self, step: int) -> None:
        self.n_rows = 0
        self.borders: list[int] = []
        self._step = step

    def add(self, starts: Iterable[int]) -> None:
        """Count rows that begin at these bytes."""
        for start in starts:
            if self.n_rows % self._step == 0:
                self.borders.append(start)
            self.n_rows += 1


def lines(chunks: Iterable[bytes]) -> Iterator[bytes]:
    r"""The lines of a stream, each with its `\n`, but perhaps the last. Raises TooLongError."""
    begun: list[bytes] = []  # of a line; joined once, at its end
    n_begun = 0
    for chunk in chunks:
        *ended, rest = chunk.split(b"\n")
        for line in ended:
            if begun:
                line = b"".join((*begun, line))
                begun, n_begun = [], 0
            yield line + b"\n"
        if rest:
            begun.append(rest)
            n_begun += len(rest)
            if n_begun > LONGEST_BYTES:
                raise TooLongError("a line")
    if begun:
        yield b"".join(begun)


def column_hint(names: list[str]) -> str:
    """What there is instead of the column that was named."""
    more = ", ..." if len(names) > 8 else ""
    return f"it has {', '.join(map(repr, names[:8]))}{more}: name the right one with --text-column"
