"""The report page out of its template: no value acts as markup or on a terminal.

In: the values of `page.html`, with text of any kind in them. Out: HTML. Used by `report`. The page loads nothing from
outside, fits a phone, follows the reader's light or dark mode, and prints; `style.css` is its look.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup, escape

from slm_ray.errors import visible

_NUMBER = re.compile(r"[0-9][0-9,.]*%?|-")


class Code(str):
    """Text in a fixed-width font: an id, a digest."""


@dataclass(frozen=True)
class Table:
    """Whole numbers, and text that begins like one, stand to the right; a cell of `Code` in a fixed-width font."""

    head: Sequence[str]
    rows: Sequence[Sequence[object]]

    @property
    def is_number(self) -> list[bool]:
        """By column, whether all its cells are numbers."""
        return [bool(self.rows) and all(_is_number(row[at]) for row in self.rows) for at in range(len(self.head))]


def render(values: Mapping[str, object]) -> str:
    """The whole page; a value that the template names must be there."""
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        finalize=_shown,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters |= {"formatted": format, "with_lines": _with_lines}
    environment.tests["code"] = lambda value: isinstance(value, Code)
    return environment.get_template("page.html").render(values)


def _shown(value: object) -> object:
    """Any value as text, before it is escaped; whole numbers get thousands apart."""
    if isinstance(value, Markup):
        return value
    return visible(f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value))


def _with_lines(text: str) -> Markup:
    """Escaped text of a story; its line breaks are part of it and stay."""
    return Markup("\n").join(escape(visible(line)) for line in text.split("\n"))


def _is_number(value: object) -> bool:
    """Also of numbers that are already text, as `4.04` or `93.2%`, and `-` for none; ids and digests are `Code`."""
    return isinstance(value, int) or (type(value) is str and _NUMBER.fullmatch(value) is not None)
