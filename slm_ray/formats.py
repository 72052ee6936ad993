"""File formats of stories: how many rows a file has, where they begin, and the rows of one range.

In: a Parquet, JSONL or plain text file. Out: `Scan` (digest, rows, byte borders) while planning, and raw
rows while reading. Called by `sources` alone. A fault of the whole file is a `UserError`; a fault of one row
is that row's `problem`, with its bytes kept as evidence.
"""

import hashlib
import json
import mmap
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from slm_ray.errors import UserError
from slm_ray.tokenizer import END_OF_TEXT

KINDS = {
    ".parquet": "parquet",
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".txt": "text",
    ".text": "text",
}
"""What a file is, by the end of its name."""

_END_MARK = re.compile(re.escape(END_OF_TEXT).encode())
_BLANK_LINES = re.compile(rb"\r?\n[ \t]*\r?\n\s*")
_NOT_JSON = (ValueError, RecursionError)  # the second where brackets are nested thousands deep
_SEPARATORS = {"end_mark": _END_MARK, "blank_lines": _BLANK_LINES}

Row = tuple[bytes | None, str | None]
"""The bytes of a story and its problem: a reason of `text.REASONS` where there is no text to clean."""


@dataclass(frozen=True, kw_only=True)
class Scan:
    """What one pass over a file found."""

    sha256: str  # of the content
    n_rows: int
    borders: tuple[int, ...] = ()  # byte where every `step`-th row begins, then the end; none for Parquet
    separator: str = ""  # text files: what ends a story, a key of `_SEPARATORS`


def scan(path: Path, text_column: str, step: int) -> Scan:
    """Read a file once: digest, number of rows, and the byte where each `step`-th row begins.

    Raises:
        UserError: the file cannot be read, is empty, is not what its name says, or has no such column.
    """
    try:
        if path.stat().st_size == 0:
            raise UserError(f"{path} is empty (0 bytes)")
        if KINDS[path.suffix.lower()] == "parquet":
            return _scan_parquet(path, text_column)
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
            if KINDS[path.suffix.lower()] == "jsonl":
                return _scan_jsonl(path, content, text_column, step)
            return _scan_text(content, step)
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}") from error


def read_parquet(path: str, text_column: str, first_row: int, n_rows: int) -> pa.Array:
    """The texts of some rows, as bytes; null where there is none.

    Decodes from the beginning of the row group that holds the first row.

    Raises:
        UserError: a page cannot be read.
    """
    try:
        with pq.ParquetFile(path, page_checksum_verification=True) as file:
            parts = list(_parquet_parts(file, text_column, first_row, n_rows))
    except (pa.ArrowException, OSError) as error:
        raise UserError(f"{path} is damaged and cannot be read as Parquet: {_one_line(error)}") from error
    nothing = pa.array([], pa.large_binary())
    return pa.concat_arrays([nothing, *(part.cast(pa.large_binary()) for part in parts)])


def read_jsonl(path: str, text_column: str, start_byte: int, end_byte: int) -> list[Row]:
    """The texts of the lines between two bytes; blank lines are no rows."""
    lines = (line for line in _read_bytes(path, start_byte, end_byte).split(b"\n") if line.strip())
    return [_json_row(line, text_column) for line in lines]


def read_text(path: str, separator: str, start_byte: int, end_byte: int, n_rows: int) -> list[Row]:
    """The stories between two bytes, cut at the separator."""
    pieces = _SEPARATORS[separator].split(_read_bytes(path, start_byte, end_byte))
    return [(piece, None) for piece in pieces[:n_rows]]


def _scan_parquet(path: Path, text_column: str) -> Scan:
    try:
        with pq.ParquetFile(path) as file:
            schema, n_rows = file.schema_arrow, file.metadata.num_rows
    except pa.ArrowException as error:
        raise UserError(f"{path} is not Parquet, or not all of it: {_one_line(error)}") from error
    if text_column not in schema.names:
        raise UserError(f"{path} has no column {text_column!r}; {_column_hint(schema.names)}")
    column_type = schema.field(text_column).type
    if column_type not in (pa.string(), pa.large_string(), pa.binary(), pa.large_binary()):
        raise UserError(f"column {text_column!r} of {path} is {column_type}, expected strings")
    with path.open("rb") as content:
        return Scan(sha256=hashlib.file_digest(content, "sha256").hexdigest(), n_rows=n_rows)


def _parquet_parts(file: Any, text_column: str, first_row: int, n_rows: int) -> Iterator[pa.Array]:
    """Slices of the column that together are the rows wanted."""
    groups: list[int] = []
    start, skip = 0, first_row
    for number in range(file.metadata.num_row_groups):
        end = start + file.metadata.row_group(number).num_rows
        if end > first_row and start < first_row + n_rows:
            if not groups:
                skip = first_row - start
            groups.append(number)
        start = end
    missing = n_rows
    for batch in file.iter_batches(batch_size=4096, row_groups=groups, columns=[text_column]):
        part = batch.column(0).slice(skip, missing)
        skip = max(0, skip - batch.num_rows)
        if len(part):
            yield part
        missing -= len(part)
        if not missing:
            return


def _scan_jsonl(path: Path, content: mmap.mmap, text_column: str, step: int) -> Scan:
    borders, n_rows, position = [], 0, 0
    for line in iter(content.readline, b""):
        if line.strip():
            if n_rows == 0:
                _check_first_line(path, line, text_column)
            if n_rows % step == 0:
                borders.append(position)
            n_rows += 1
        position += len(line)
    return Scan(sha256=_digest(content), n_rows=n_rows, borders=(*borders, position))


def _check_first_line(path: Path, line: bytes, text_column: str) -> None:
    """A file whose first line has no text is the wrong file, or the option is wrong; later ones are rows."""
    try:
        fields = json.loads(line)
    except _NOT_JSON as error:
        raise UserError(f"{path} is not JSONL: its first line is not JSON ({error})") from error
    if not isinstance(fields, dict):
        raise UserError(f"{path} is not JSONL of objects: its first line is a {type(fields).__name__}")
    if text_column not in fields:
        raise UserError(f"{path} has no column {text_column!r}; {_column_hint(list(fields))}")


def _json_row(line: bytes, text_column: str) -> Row:
    try:
        fields = json.loads(line)
    except UnicodeDecodeError:
        return line, "invalid_utf8"
    except _NOT_JSON:
        return line, "bad_json"
    text = fields.get(text_column) if isinstance(fields, dict) else None
    if not isinstance(text, str):
        return line, "not_text"
    try:
        return text.encode("utf-8"), None
    except UnicodeEncodeError:  # a lone surrogate, written as \ud800
        return line, "invalid_utf8"


def _scan_text(content: mmap.mmap, step: int) -> Scan:
    """Stories end with the end mark where the file has one, else with blank lines."""
    separator = "end_mark" if _END_MARK.search(content) else "blank_lines"
    borders, n_rows, start = [], 0, 0
    for start, _ in _pieces(content, _SEPARATORS[separator]):
        if n_rows % step == 0:
            borders.append(start)
        n_rows += 1
    return Scan(sha256=_digest(content), n_rows=n_rows, borders=(*borders, len(content)), separator=separator)


def _pieces(content: mmap.mmap, separator: re.Pattern[bytes]) -> Iterator[tuple[int, int]]:
    """Where each story begins and ends; before a leading separator there is none,
    and after the last one only where there is text."""
    start = 0
    for match in separator.finditer(content):
        if match.start() > 0:
            yield start, match.start()
        start = match.end()
    if content[start:].strip():
        yield start, len(content)


def _digest(content: mmap.mmap) -> str:
    return hashlib.sha256(content).hexdigest()


def _read_bytes(path: str, start: int, end: int) -> bytes:
    try:
        with Path(path).open("rb") as file:
            file.seek(start)
            return file.read(end - start)
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from error


def _column_hint(names: list[str]) -> str:
    return f"it has {', '.join(map(repr, names[:8]))}: name the right one with --text-column"


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:200]
