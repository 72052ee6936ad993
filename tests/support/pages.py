"""The pages of the documentation, and the commands that stand in them.

In: Markdown files of the checkout. Out: each command as a reader would copy it, with its page and line: what stands in
fenced blocks of `sh` and in indented ones, and whole blocks of Python.
"""

import dataclasses
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

from tests.support.paths import ROOT

FOLDERS = (
    ".github",
    "infra",
    "infra/docs/guides",
    "infra/k8s",
    "infra/monitoring",
    "pipelines",
    "serve",
    "slm_ray",
    "slm_ray/exports",
    "tests/bench",
    "tune",
)
PAGES = [ROOT / "README.md", *(page for folder in FOLDERS for page in sorted((ROOT / folder).glob("*.md")))]
PROGRAMS = "cmp|curl|docker|git|helm|kind|kubectl|make|mlflow|pip|pre-commit|python3?|ray|tensorboard|uv"
INDENTED = re.compile(rf"    (?:[A-Z_]+=\S+ )*(?:(?:{PROGRAMS}) |\w+=\"\$\()")
"""How a line of an indented block begins that is a command, and no drawing or output."""


@dataclasses.dataclass(frozen=True)
class Command:
    """What a reader is to type, or a program of Python."""

    page: str
    line: int
    text: str
    kind: Literal["sh", "python"] = "sh"

    def __str__(self) -> str:
        return f"{self.page}:{self.line} {self.text.splitlines()[0][:60]}"


def commands(page: Path) -> list[Command]:
    """All commands of a page, in order; what follows one another in Python is one program, as in one session."""
    name = page.relative_to(ROOT).as_posix()
    found = list[Command]()
    for kind, line, text in _blocks(page.read_text(encoding="utf-8").splitlines()):
        if kind == "python" and found and found[-1].kind == "python":
            found[-1] = dataclasses.replace(found[-1], text=f"{found[-1].text}\n{text}")
        elif kind == "python":
            found.append(Command(name, line, text, "python"))
        else:
            found += [Command(name, line + number, words) for number, words in _lines(text)]
    return found


def _blocks(lines: list[str]) -> Iterator[tuple[Literal["sh", "python"], int, str]]:
    """Kind, first line and text of each block that holds commands."""
    number = 0
    while number < len(lines):
        if lines[number].startswith("```"):
            language, start = lines[number].strip("`"), number + 1
            number = next(end for end in range(start, len(lines)) if lines[end].startswith("```"))
            if language in ("sh", "python"):
                yield ("sh" if language == "sh" else "python"), start + 1, "\n".join(lines[start:number])
        elif INDENTED.match(lines[number]):
            start = number
            while lines[number].endswith("\\"):
                number += 1
            yield "sh", start + 1, "\n".join(line.strip() for line in lines[start : number + 1])
        number += 1


def _lines(block: str) -> Iterator[tuple[int, str]]:
    """Each command of a block, joined where it goes on in the next line, without comments; and on which line it is."""
    number = 0
    for text in re.sub(r"\\\n\s*", "\0", block).split("\n"):
        words = re.sub(r"(^|\s\s+)# .*$", "", text.replace("\0", "")).strip()
        if words and not words.startswith("#"):
            yield number, words
        number += 1 + text.count("\0")


def spans(page: Path) -> list[str]:
    """What stands between backticks, outside of blocks."""
    text = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    return [" ".join(span.split()) for span in re.findall(r"`([^`]+)`", text.replace(r"\|", "|"))]
