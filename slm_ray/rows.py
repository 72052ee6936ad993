"""What the row formats share: what a row is, the lines of a stream, and where rows begin.

In: chunks of bytes. Out: lines; counts and byte borders. Called by the format modules.
"""

from collections.abc import Iterable, Iterator

Row = tuple[bytes | None, str | None]
"""The bytes of a story and its problem: a reason of `text.REASONS` where there is no text to clean."""


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
    r"""The lines of a stream, each with its `\n`, but perhaps the last. A long line is joined once, at its end."""
    begun: list[bytes] = []
    for chunk in chunks:
        *ended, rest = chunk.split(b"\n")
        for line in ended:
            if begun:
                line = b"".join((*begun, line))
                begun = []
            yield line + b"\n"
        if rest:
            begun.append(rest)
    if begun:
        yield b"".join(begun)


def column_hint(names: list[str]) -> str:
    """What there is instead of the column that was named."""
    more = ", ..." if len(names) > 8 else ""
    return f"it has {', '.join(map(repr, names[:8]))}{more}: name the right one with --text-column"
