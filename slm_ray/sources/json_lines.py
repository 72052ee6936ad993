"""JSONL: one JSON object a line, one of its fields the story; or one array of such objects, as a `.json` file may be.

In: chunks of bytes. Out: where rows begin, or the rows. Found by `formats`. Blank lines are no rows. An array is read
from its beginning, some objects at a time.
"""

import codecs
import itertools
import json
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any, Self

from slm_ray.errors import UserError
from slm_ray.sources.rows import LONGEST_BYTES, Row, RowCount, RowFormat, TooLongError, column_hint, lines

_NOT_JSON = (ValueError, RecursionError)  # the second where brackets are nested thousands deep
_NO_WHITE = re.compile(r"[^ \t\n\r]")
_END = object()  # stands for no element
_MANY_DIGITS = 1000
_LOOKED_AT = 20  # lines at the beginning of a file that say whether its field is text


@dataclass(frozen=True)
class JsonLines(RowFormat):
    """JSON files, whose field `text_column` is the story; a scan finds whether one is an array."""

    text_column: str
    may_be_array: bool = False
    advice = "is it JSONL?"

    def count(self, address: str, chunks: Iterable[bytes], step: int) -> tuple[Self, RowCount]:
        """See `RowFormat`.

        Raises:
            UserError: the first line is no JSON object with this field, or the field is no text in all first lines.
        """
        if self.may_be_array:
            first, chunks = _beginning(chunks)
            if first == "[":
                return self, _count_array(address, chunks, self.text_column, step)
            self = replace(self, may_be_array=False)
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
        _check_kinds(address, kinds, self.text_column)
        return self, count

    def rows(self, address: str, chunks: Iterable[bytes], *, at_start: bool) -> Iterator[Row]:  # noqa: ARG002
        """See `RowFormat`."""
        if self.may_be_array:
            return (_object_row(element, self.text_column) for element in _elements(address, chunks))
        return (_row(line.rstrip(b"\n"), self.text_column) for line in lines(chunks) if line.strip())


def _check_first_line(address: str, line: bytes, text_column: str) -> None:
    """A file whose first line has no text is the wrong file, or the option is wrong; later ones are rows."""
    try:
        fields = _parse(line)
    except _NOT_JSON as error:
        raise UserError(f"{address} is not JSONL: its first line is not JSON ({error})") from error
    _check_object(address, fields, text_column, "JSONL of objects: its first line")


def _check_object(address: str, fields: object, text_column: str, what: str) -> None:
    if not isinstance(fields, dict):
        raise UserError(f"{address} is not {what} is a {type(fields).__name__}")
    if text_column not in fields:
        raise UserError(f"{address} has no column {text_column!r}; {column_hint(list(fields))}")


def _check_kinds(address: str, kinds: set[str], text_column: str) -> None:
    if len(kinds) == 1 and not kinds & {"str", "NoneType"}:
        kind = kinds.pop()
        raise UserError(f"column {text_column!r} of {address} is {kind} in its first lines, expected strings")


def _kind(line: bytes, text_column: str) -> str:
    """What stands in the field; "str" where there is none, so that the line is judged as a row."""
    try:
        fields = _parse(line)
    except _NOT_JSON:
        return "str"
    return type(fields.get(text_column)).__name__ if isinstance(fields, dict) else "str"


def _parse(line: bytes) -> object:
    return json.loads(line.decode("utf-8-sig"), parse_int=_number)  # a byte order mark begins some files


def _number(digits: str) -> float:
    """A whole number. Python refuses to read one of thousands of digits; what it is matters to no story beside it."""
    return int(digits) if len(digits) < _MANY_DIGITS else float(digits)


def _row(line: bytes, text_column: str) -> Row:
    try:
        fields = _parse(line)
    except UnicodeDecodeError:
        return line, "invalid_utf8"
    except _NOT_JSON:
        return line, "bad_json"
    return _object_row(fields, text_column, line)


def _object_row(fields: object, text_column: str, line: bytes | None = None) -> Row:
    """The story of an object; `line` is where it stood, the evidence if it has none."""
    text = fields.get(text_column) if isinstance(fields, dict) else None
    if isinstance(text, str):
        try:
            return text.encode("utf-8"), None
        except UnicodeEncodeError:  # a lone surrogate, written as \ud800, or bytes that are not UTF-8
            problem = "invalid_utf8"
    else:
        problem = "not_text"
    return json.dumps(fields).encode() if line is None else line, problem


def _beginning(chunks: Iterable[bytes]) -> tuple[str, Iterator[bytes]]:
    """The first character that is no white space, and the chunks again."""
    chunks = iter(chunks)
    held = []
    for chunk in chunks:
        held.append(chunk)
        if beginning := chunk.removeprefix(codecs.BOM_UTF8).lstrip():
            return chr(beginning[0]), itertools.chain(held, chunks)
    return "", iter(held)


def _count_array(address: str, chunks: Iterable[bytes], text_column: str, step: int) -> RowCount:
    """Raises UserError as `JsonLines.count`, or where it is no array."""
    count, n_bytes = RowCount(step, can_enter=False), 0
    kinds: set[str] = set()
    for fields in _elements(address, chunks):
        count.add((n_bytes,))
        n_bytes += len(_object_row(fields, text_column)[0] or b"")
        if count.n_rows == 1:
            _check_object(address, fields, text_column, "an array of objects: its first element")
        if count.n_rows <= _LOOKED_AT:
            kinds.add(type(fields.get(text_column)).__name__ if isinstance(fields, dict) else "str")
    _check_kinds(address, kinds, text_column)
    return count


def _elements(address: str, chunks: Iterable[bytes]) -> Iterator[object]:
    """The elements of a JSON array, each as soon as it is read. Raises UserError where it is none, or cut short."""
    decoder, parse = (
        codecs.getincrementaldecoder("utf-8-sig")("surrogateescape"),
        json.JSONDecoder(parse_int=_number).raw_decode,
    )
    text, position, needed = "", 0, 0  # characters that are not read yet; so many must be there before another try
    is_first, is_over = True, False
    for chunk in itertools.chain(chunks, [None]):  # None: nothing more comes
        text = text[position:] + (decoder.decode(chunk) if chunk is not None else decoder.decode(b"", final=True))
        position = 0
        if len(text) > LONGEST_BYTES:
            raise TooLongError("an element")
        while not is_over and (len(text) >= needed or chunk is None):
            try:
                element, position = _next_element(text, position, "[" if is_first else ",", parse)
            except _NOT_JSON as error:
                if chunk is None:
                    why = f"{address} is not a JSON array, or is cut short: {error}"
                    raise UserError(why) from error
                needed = 2 * (len(text) - position)  # an element that goes on is not parsed again at each chunk
                break
            is_first, needed, is_over = False, 0, element is _END
            if not is_over:
                yield element
        if is_over and (position := _skip_white(text, position)) < len(text):
            raise UserError(
                f"{address} goes on behind the end of its array, with {text[position : position + 20]!a}: write one "
                "array, or one object a line, without brackets around it (JSONL)"
            )


def _next_element(text: str, position: int, before: str, parse: Any) -> tuple[object, int]:
    """The element behind `[` or a comma, `_END` at the array's end, and the place behind it. Raises ValueError."""
    position = _skip_white(text, position)
    at = text[position : position + 1]
    if at == "]" and before == ",":
        return _END, position + 1
    if at != before:
        raise ValueError(f"expected {before} or ], got {at!r}")
    position = _skip_white(text, position + 1)
    if before == "[" and text[position : position + 1] == "]":
        return _END, position + 1
    element, end = parse(text, position)
    if end >= len(text):  # a number may go on
        raise ValueError("no ] at its end")
    return element, end


def _skip_white(text: str, position: int) -> int:
    found = _NO_WHITE.search(text, position)
    return found.start() if found else len(text)
