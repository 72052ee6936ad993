"""What the row formats share: what a row is, the lines of a stream, and files that are rows one after another.

In: chunks of bytes. Out: lines; counts and byte borders; texts as Arrow columns. Called by the format modules.
"""

import abc
import itertools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from typing import Self

import pyarrow as pa

from slm_ray.errors import UserError
from slm_ray.sources import input_files
from slm_ray.sources.compression import ScanWatch, chunks_between, read_chunks
from slm_ray.sources.input_files import InputFile, InputRange, ScanResult, Texts

LONGEST_BYTES = 1 << 28
"""More than this without an end is no story but a file of another kind, and must not fill the memory."""

Row = tuple[bytes | None, str | None]
"""The bytes of a story and its problem: a reason of `rejections.REASONS` where there is no text to clean."""


class TooLongError(Exception):
    """A line, or a story, of more than `LONGEST_BYTES`."""

    def __init__(self, what: str) -> None:
        super().__init__(f"{what} is longer than {LONGEST_BYTES >> 20} MiB")


class RowCount:
    """Counts rows, and remembers where ranges begin: one ends with `step` rows, or with `RANGE_BYTES` of text."""

    def __init__(self, step: int, *, can_enter: bool = True) -> None:
        self.n_rows = 0
        self.first_rows: list[int] = []
        self.borders: list[int] = []
        self.can_enter = can_enter  # whether a file can be read from one of the borders on
        self._step = step

    def add(self, starts: Iterable[int]) -> None:
        """Count rows that begin at these bytes of the text."""
        for start in starts:
            if not self.n_rows or self.n_rows - self.first_rows[-1] >= self._step or self._is_full(start):
                self.first_rows.append(self.n_rows)
                self.borders.append(start)
            self.n_rows += 1

    def _is_full(self, start: int) -> bool:
        return start - self.borders[-1] >= input_files.RANGE_BYTES


class RowFormat(abc.ABC):
    """Files that are rows one after another; a subclass knows what a row is."""

    @property
    def cut(self) -> str:
        """See `Format`."""
        return ""

    @property
    def lookahead_bytes(self) -> int:
        """How much of a file after a row decides where the row ends."""
        return 0

    @property
    @abc.abstractmethod
    def advice(self) -> str:
        """What to do about a row that never ends."""

    @abc.abstractmethod
    def count(self, address: str, chunks: Iterable[bytes], step: int) -> tuple[Self, RowCount]:
        """The format with what the file settled, and its rows counted."""

    @abc.abstractmethod
    def rows(self, address: str, chunks: Iterable[bytes], *, at_start: bool) -> Iterator[Row]:
        """The rows of chunks that begin with the file (`at_start`) or at a later row."""

    def scan(self, file: InputFile, step: int, watch: ScanWatch) -> ScanResult:
        """See `Format`."""
        try:
            settled, found = self.count(file.path, first_chunks(file, watch), step)
        except TooLongError as error:
            raise UserError(f"{file.path}: {error}; {self.advice}") from error
        starts = found.borders if found.can_enter and not file.compression else []
        return ScanResult(
            file=replace(file, format=settled),
            sha256=watch.sha256,
            n_rows=found.n_rows,
            first_rows=tuple(found.first_rows),
            borders=(*starts, watch.n_bytes) if starts else (),
            units=tuple(range(len(starts))),
        )

    def read(self, ranges: Sequence[InputRange]) -> Iterator[Texts]:
        """See `Format`."""
        file = ranges[0].file
        if not ranges[0].end_byte:
            rows = self.rows(file.path, read_chunks(file.path, file.compression), at_start=True)
            yield from _take(rows, [part.rows for part in ranges])
            return
        for part in ranges:
            chunks = chunks_between(file.path, part.start_byte, part.end_byte + self.lookahead_bytes)
            yield from _take(self.rows(file.path, chunks, at_start=False), [range(part.n_rows)])


def _take(rows: Iterator[Row], parts: Iterable[range]) -> Iterator[Texts]:
    """Some row ranges, perhaps with gaps, of rows that are read from the first on."""
    position = 0
    for part in parts:
        for _ in itertools.islice(rows, part.start - position):
            pass
        yield columns(list(itertools.islice(rows, len(part))))
        position = part.stop


def columns(rows: Sequence[Row]) -> Texts:
    """Rows as Arrow columns."""
    return (
        pa.array([text for text, _ in rows], pa.large_binary()),
        pa.array([problem for _, problem in rows], pa.string()),
    )


def first_chunks(file: InputFile, watch: ScanWatch) -> Iterator[bytes]:
    """What is inside a file that is scanned; refused if it is nothing, or begins as UTF-16 or UTF-32 does."""
    chunks = read_chunks(file.path, file.compression, watch)
    first = next(chunks, b"")
    if not first:
        raise UserError(f"{file.path} is empty (0 bytes)")
    encoding = _other_encoding(first[:64])
    if encoding:
        raise UserError(
            f"{file.path} is {encoding}, expected UTF-8: convert it, for example with iconv -f {encoding} -t UTF-8"
        )
    yield first
    yield from chunks


def _other_encoding(beginning: bytes) -> str | None:
    """UTF-16 and UTF-32 by their byte order mark, or by a NUL in every second place of at least four characters, or in
    three of four."""
    if beginning.startswith((b"\xff\xfe\0\0", b"\0\0\xfe\xff")):
        return "UTF-32"
    if beginning.startswith((b"\xff\xfe", b"\xfe\xff")):
        return "UTF-16"
    places = [beginning[first::4] for first in range(4)]  # of each character of UTF-32 the upper byte is NUL, and more
    if len(places[3]) >= 4 and any(
        all(part) and not any(b"".join(rest)) for part, *rest in (places, list(reversed(places)))
    ):
        return "UTF-32"
    even, odd = beginning[0::2], beginning[1::2]
    is_utf16 = len(odd) >= 4 and 0 in beginning and any(not any(a) and all(b) for a, b in ((even, odd), (odd, even)))
    return "UTF-16" if is_utf16 else None


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
