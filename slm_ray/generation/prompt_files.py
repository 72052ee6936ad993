"""A file of prompts.

In: a text file with one prompt a line, or JSON lines with `{"prompt": ...}`. Out: the prompts, each with the number of
its line.
"""

import json
from dataclasses import dataclass
from pathlib import Path

from slm_ray.errors import UserError

FIELD = "prompt"


@dataclass(frozen=True)
class Prompt:
    """The beginning of a story."""

    text: str
    line: int = 0
    """In its file, from 1; 0 where it is from none."""


def read_prompts(file: str) -> list[Prompt]:
    """The prompts of a file in order; empty lines are no prompts, but `{"prompt": ""}` is one.

    A file is JSON lines where its name ends in `.jsonl`, or its first line is an object that has a prompt.

    Raises:
        UserError: it cannot be read, is not UTF-8, has no prompts, or a line of JSON is none that is expected.
    """
    try:
        content = Path(file).read_bytes()
    except (OSError, ValueError) as error:  # a zero byte in its name
        raise UserError(f"cannot read the prompts in {file}: {getattr(error, 'strerror', None) or error}") from error
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise UserError(f"{file}, line {line}: it is not UTF-8 text ({error.reason})") from error
    lines = [(number, line.rstrip("\r")) for number, line in enumerate(text.split("\n"), 1)]  # not at other breaks
    lines = [(number, line) for number, line in lines if line.strip()]
    if not lines:
        raise UserError(f"{file} is empty: expected one prompt a line, or JSON lines with a {FIELD}")
    is_json = file.endswith(".jsonl") or _has_prompt(lines[0][1])
    return [Prompt(_prompt_of(line, f"{file}, line {number}") if is_json else line, number) for number, line in lines]


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
