"""Dataclasses as command lines: every field an option, nested ones by their dotted name.

In: a config dataclass and `argv`. Out: the config. tyro makes the options, their help (from the text under each field)
and the errors; `--max-steps` and `--max_steps` are the same option.
"""

import argparse
import contextlib
import io
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

import tyro

from slm_ray.config.mixtures import joined_data
from slm_ray.errors import UserError

Config = TypeVar("Config")


def option_names(words: Sequence[str]) -> set[str]:
    """The options among words, `--max_steps=3` as `--max-steps`."""
    return {word.partition("=")[0].replace("_", "-") for word in words if word.startswith("--")}


def parse(kind: type[Config], argv: Sequence[str] | None, *, prog: str, about: str, default: Config) -> Config:
    """Parse options over a default config; `--help` prints and exits. The words of a mixture are one value of `--data`.

    Raises:
        UserError: an unknown option, or a value that is refused.
    """
    words = joined_data(sys.argv[1:] if argv is None else argv)
    refuse_foreign_options(words)
    with one_line_errors(lambda message: re.sub(r"^Error parsing [^:]*: ", "", message)):
        return tyro.cli(kind, args=words, prog=prog, description=about, default=default, compact_help=False)


def refuse_foreign_options(words: Sequence[str]) -> None:
    """Refuse the options that tyro adds of its own: they write files, and none of them is in `--help`.

    Raises:
        UserError: there is one.
    """
    for word in words:
        if word.startswith("--tyro-"):
            raise UserError(f"unknown option {word}, see --help")


@contextlib.contextmanager
def one_line_errors(reword: Callable[[str], str]) -> Iterator[None]:
    """Raise what tyro prints about a mistake, in other words, as one `UserError`."""
    errors = io.StringIO()
    try:
        with contextlib.redirect_stderr(errors):
            yield
    except SystemExit as error:
        if not error.code:
            raise
        raise UserError(f"{reword(_one_line(errors.getvalue()))} (see --help)") from error


def _one_line(box: str) -> str:
    """The message out of the box that tyro draws around it, in UTF-8 or ASCII: from its title up to its rule."""
    words: list[str] = []
    for line in box.splitlines()[1:]:
        text = line.strip(" │")
        if text and not text.strip("─-"):
            if words:
                break
        elif text:
            words.append(text)
    return " ".join(words) or "the options are not understood"


def take_option(name: str, default: str, argv: Sequence[str]) -> tuple[str, list[str]]:
    """Take one `--name VALUE` out of the arguments before the others are parsed. Returns its value and the rest.

    `init_from` is `--init-from` as well.
    """
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument(*{f"--{name}", f"--{name.replace('_', '-')}"}, dest="value", default=default)
    known, rest = parser.parse_known_args(list(argv))
    return str(known.value), rest
