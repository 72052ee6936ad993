"""CSV and TSV: a header, then rows whose quoted fields may hold separators, quotes and line ends.

In: chunks of bytes. Out: the rows. Found by `formats`. A file is always read from its beginning: inside a quoted field
nothing tells where the next row begins.
"""

import csv
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Self

from slm_ray.errors import UserError
from slm_ray.sources.rows import Row, RowCount, RowFormat, column_hint, lines

LONGEST_FIELD_CHARS = 1 << 26
"""A longer field is a quote that nobody closed, and must not fill the memory with the rest of the file."""


@dataclass(frozen=True)
class Delimited(RowFormat):
    """CSV or TSV files, whose column `text_column` is the story."""

    text_column: str
    name: str
    delimiter: str

    @property
    def advice(self) -> str:
        return f"is it {self.name}?"

    def count(self, address: str, chunks: Iterable[bytes], step: int) -> tuple[Self, RowCount]:
        """See `RowFormat`. Raises UserError as `rows`."""
        count, n_bytes = RowCount(step, can_enter=False), 0
        for text, _ in self.rows(address, chunks, at_start=True):
            count.add((n_bytes,))
            n_bytes += len(text or b"")
        return self, count

    def rows(self, address: str, chunks: Iterable[bytes], *, at_start: bool) -> Iterator[Row]:  # noqa: ARG002
        """The rows after the header. Blank lines are no rows; one with more or fewer fields than the header is
        `bad_csv`.

        Raises:
            UserError: there is no such column, or a quote is wrong, so that rows could not be told apart.
        """
        csv.field_size_limit(LONGEST_FIELD_CHARS)
        # Undecodable bytes go through unchanged, and are found when the story is cleaned.
        text_lines = (line.decode("utf-8", "surrogateescape") for line in lines(chunks))
        reader = csv.reader(_without_bom(text_lines), delimiter=self.delimiter, strict=True)
        try:
            names = next(reader, [])
            column = self._column(address, names)
            for fields in reader:
                if self.name == "TSV" and any("\n" in field or "\r" in field for field in fields):
                    raise UserError(
                        f"{address} has a field over several lines that ends in line {reader.line_num}, and TSV has "
                        "none: a quote before it begins a field and is not closed, or the file should be CSV or JSONL"
                    )
                if len(fields) == len(names):
                    yield _bytes(fields[column]), None
                elif fields:
                    yield _bytes(self.delimiter.join(fields)), "bad_csv"
        except csv.Error as error:
            raise UserError(
                f"{address} is not {self.name} as it should be, near line {reader.line_num}: {error} "
                '(a field that begins with a quote ends with one, and quotes inside it are doubled: ""; or write JSONL)'
            ) from error

    def _column(self, address: str, names: list[str]) -> int:
        if self.text_column not in names:
            raise UserError(f"{address} has no column {self.text_column!r}; {column_hint(names)}")
        n_columns = names.count(self.text_column)
        if n_columns > 1:
            raise UserError(f"{address} has {n_columns} columns {self.text_column!r}: rename all but one")
        return names.index(self.text_column)


def _bytes(field: str) -> bytes:
    return field.encode("utf-8", "surrogateescape")


def _without_bom(text_lines: Iterator[str]) -> Iterator[str]:
    yield next(text_lines, "").removeprefix("\ufeff")
    yield from text_lines
