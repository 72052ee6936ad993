"""JSONL: one JSON object a line, one of its fields the story.

In: chunks of bytes. Out: where rows begin, or the rows. Found by `formats`. Blank lines are no rows.
"""

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Self

from slm_ray.errors import UserError
from slm_ray.sources.rows import Row, RowCount, RowFormat, column_hint, lines

_NOT_JSON = (ValueError, RecursionError)  # the second where brackets are nested thousands deep
_LOOKED_AT = 20  # lines at the beginning of a file that say whether its field is text


@dataclass(frozen=True)
class JsonLines(RowFormat):
    """JSONL files, whose field `text_column` is the story."""

    text_column: str
    advice = "is it JSONL?"

    def count(self, address: str, chunks: Iterable[bytes], step: int) -> tuple[Self, RowCount]:
        """See `RowFormat`.

        Raises:
            UserError: the first line is no JSON object with this field, or the field is no text in all first lines.
        """
        count, position = RowCount(step), 0
        kinds: set[str] = set()  # of the first fields
        for line in lines(chunks):
            if line.strip():
                count.add((position,))
                if count.n_rows == 1:
                    _check_first_line(address, line, self.text_column)
                if count.n_rows <= _LOOKED_AT:
                    kinds.add(_kind(line, self.text_column))
            position += len(line)
        if len(kinds) == 1 and not kinds & {"str", "NoneType"}:
            kind = kinds.pop()
            raise UserError(f"column {self.text_column!r} of {address} is {kind} in its first lines, expected strings")
        return self, count

    def rows(self, address: str, chunks: Iterable[bytes], *, at_start: bool) -> Iterator[Row]:  # noqa: ARG002
        """See `RowFormat`."""
        return (_row(line.rstrip(b"\n"), self.text_column) for line in lines(chunks) if line.strip())


def _check_first_line(address: str, line: bytes, text_column: str) -> None:
    """A file whose first line has no text is the wrong file, or the option is wrong; later ones are rows."""
    try:
        fields = _parse(line)
    except _NOT_JSON as error:
        raise UserError(f"{address} is not JSONL: its first line is not JSON ({error})") from error
    if not isinstance(fields, dict):
        raise UserError(f"{address} is not JSONL of objects: its first line is a {type(fields).__name__}")
    if text_column not in fields:
        raise UserError(f"{address} has no column {text_column!r}; {column_hint(list(fields))}")


def _kind(line: bytes, text_column: str) -> str:
    """What stands in the field; "str" where there is none, so that the line is judged as a row."""
    try:
        fields = _parse(line)
    except _NOT_JSON:
        return "str"
    return type(fields.get(text_column)).__name__ if isinstance(fields, dict) else "str"


def _parse(line: bytes) -> object:
    return json.loads(line.decode("utf-8-sig"))  # a byte order mark begins some files


def _row(line: bytes, text_column: str) -> Row:
    try:
        fields = _parse(line)
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
