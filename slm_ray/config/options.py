"""Dataclasses as command lines: every field an option, nested ones by their dotted name.

In: a config dataclass and `argv`. Out: the config. tyro makes the options, their help (from the text under each field)
and the errors; `--max-steps` and `--max_steps` are the same option.
"""

import argparse
import contextlib
import io
import re
from collections.abc import Sequence
from typing import TypeVar

import tyro

from slm_ray.errors import UserError

Config = TypeVar("Config")


def parse(kind: type[Config], argv: Sequence[str] | None, *, prog: str, about: str, default: Config) -> Config:
    """Parse options over a default config; `--help` prints and exits.

    Raises:
        UserError: an unknown option, or a value that is refused.
    """
    errors = io.StringIO()
    try:
        with contextlib.redirect_stderr(errors):
            return tyro.cli(kind, args=argv, prog=prog, description=about, default=default, compact_help=False)
    except SystemExit as error:
        if not error.code:
            raise
        message = _one_line(errors.getvalue())
        raise UserError(f"{re.sub(r'^Error parsing [^:]*: ', '', message)} (see --help)") from error


def _one_line(box: str) -> str:
    """The message out of the box that tyro draws around it, up to its rule."""
    words: list[str] = []
    for line in box.splitlines():
        text = line.strip().strip("│").strip()
        if words and set(text) == {"─"}:
            break
        if line.strip().startswith("│"):
            words.append(text)
    return " ".join(words) or "the options are not understood"


def take_option(name: str, default: str, argv: Sequence[str]) -> tuple[str, list[str]]:
    """Take one `--name VALUE` out of the arguments before the others are parsed. Returns its value and the rest."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument(f"--{name}", default=default)
    known, rest = parser.parse_known_args(list(argv))
    return str(getattr(known, name)), rest
