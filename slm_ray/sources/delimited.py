"""CSV and TSV: a header, then rows whose quoted fields may hold separators, quotes and line ends.

In: chunks of bytes. Out: the rows. Called by `formats`, which always reads a file from its beginning: inside a quoted
field nothing tells where the next row begins.
"""

import csv
from collections.abc import Iterable, Iterator

from slm_ray.errors import UserError
from slm_ray.sources.rows import Row, column_hint, lines

LONGEST_FIELD_CHARS = 1 << 26
"""A longer field is a quote that nobody closed, and must not fill the memory with the rest of the file."""


def read(address: str, chunks: Iterable[bytes], text_column: str, delimiter: str) -> Iterator[Row]:
    """The rows after the header; blank lines are no rows. One with more or fewer fields than the header is `bad_csv`.

    Raises:
        UserError: there is no such column, or a quote is wrong, so that rows could not be told apart.
    """
    csv.field_size_limit(LONGEST_FIELD_CHARS)
    # Undecodable bytes go through unchanged, and are found when the story is cleaned.
    text_lines = (line.decode("utf-8", "surrogateescape") for line in lines(chunks))
    reader = csv.reader(_without_bom(text_lines), delimiter=delimiter, strict=True)
    try:
        names = next(reader, [])
        if text_column not in names:
            raise UserError(f"{address} has no column {text_column!r}; {column_hint(names)}")
        if names.count(text_column) > 1:
            raise UserError(f"{address} has {names.count(text_column)} columns {text_column!r}: rename all but one")
        column = names.index(text_column)
        for fields in reader:
            if delimiter == "\t" and any("\n" in field or "\r" in field for field in fields):
                raise UserError(
                    f"{address} has a field over several lines that ends in line {reader.line_num}, and TSV has none: "
                    "a quote before it begins a field and is not closed, or the file should be CSV or JSONL"
                )
            if len(fields) == len(names):
                yield _bytes(fields[column]), None
            elif fields:
                yield _bytes(delimiter.join(fields)), "bad_csv"
    except csv.Error as error:
        kind = "TSV" if delimiter == "\t" else "CSV"
        raise UserError(
            f"{address} is not {kind} as it should be, near line {reader.line_num}: {error} "
            '(a field that begins with a quote ends with one, and quotes inside it are doubled: ""; or write JSONL)'
        ) from error


def _bytes(field: str) -> bytes:
    return field.encode("utf-8", "surrogateescape")


def _without_bom(text_lines: Iterator[str]) -> Iterator[str]:
    yield next(text_lines, "").removeprefix("\ufeff")
    yield from text_lines
