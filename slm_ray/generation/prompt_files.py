"""A file of prompts.

In: a text file with one prompt a line, or JSON lines with `{"prompt": ...}`. Out: the prompts, each with the number of
its line, made one after another: of a million only their bytes are in memory.
"""

import json
from collections.abc import Iterable, Iterator, Sized
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from slm_ray.errors import UserError, reason

FIELD = "prompt"
MAX_BYTES = 128 * 2**20
"""Of a file, which is kept: it may be a pipe, and every line of it is checked before the first story is written."""

_PART_BYTES = 2**20


@dataclass(frozen=True)
class Prompt:
    """The beginning of a story."""

    text: str
    line: int = 0
    """In its file, from 1; 0 where it is from none."""


class Prompts(Sized, Iterable[Prompt], Protocol):
    """Several, which may be asked for more than once."""


class PromptFile:
    """The prompts of a file in order, as often as they are asked for; empty lines are none, but `{"prompt": ""}` is.

    A file is JSON lines where its name ends in `.jsonl`, or its first line is an object that has a prompt.
    """

    def __init__(self, file: str) -> None:
        """Read it and check every line.

        Raises:
            UserError: it cannot be read, is too large or not UTF-8, has no prompts, or a line of JSON is none that is
                expected.
        """
        self._file, self._content = file, _content(file)
        first = next(self._lines(), None)
        if first is None:
            raise UserError(f"{file} is empty: expected one prompt a line, or JSON lines with a {FIELD}")
        self._is_json = file.endswith(".jsonl") or _has_prompt(first[1])
        self._count = sum(1 for _ in self)

    def __len__(self) -> int:
        return self._count

    def __iter__(self) -> Iterator[Prompt]:
        for number, line in self._lines():
            text = _prompt_of(line, f"{self._file}, line {number}") if self._is_json else line
            yield Prompt(text, number)

    def _lines(self) -> Iterator[tuple[int, str]]:
        """Those that are not blank, with their numbers. Raises: UserError at one that is not UTF-8."""
        number, start = 0, 0
        while start <= len(self._content):
            end = self._content.find(b"\n", start)  # not at other breaks
            end = len(self._content) if end < 0 else end
            number += 1
            try:
                line = self._content[start:end].decode("utf-8-sig" if number == 1 else "utf-8").rstrip("\r")
            except UnicodeDecodeError as error:
                raise UserError(f"{self._file}, line {number}: it is not UTF-8 text ({error.reason})") from error
            if line.strip():
                yield number, line
            start = end + 1


def _content(file: str) -> bytearray:
    try:
        with Path(file).open("rb") as opened:
            content = bytearray()  # `read` with a bound would take the memory of the bound
            while len(content) <= MAX_BYTES and (part := opened.read(_PART_BYTES)):
                content += part
    except (OSError, ValueError) as error:  # a zero byte in its name
        raise UserError(f"cannot read the prompts in {file}: {reason(error)}") from error
    if len(content) > MAX_BYTES:
        raise UserError(f"{file} has more than {MAX_BYTES // 2**20} MiB of prompts: split it")
    return content


def _has_prompt(line: str) -> bool:
    try:
        content = json.loads(line)
    except (ValueError, RecursionError):
        return False
    return isinstance(content, dict) and FIELD in content


def _prompt_of(line: str, where: str) -> str:
    try:
        content = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise UserError(f'{where}: it is not JSON; expected {{"{FIELD}": "Once upon a time"}}') from error
    if not isinstance(content, dict) or not isinstance(content.get(FIELD), str):
        raise UserError(f'{where}: expected an object with a text, {{"{FIELD}": "Once upon a time"}}')
    if unknown := sorted(content.keys() - {FIELD}):
        raise UserError(f"{where}: unknown field {unknown[0][:50]!r}: expected {FIELD} alone")
    return str(content[FIELD])
