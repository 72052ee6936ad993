"""The command line of `prepare.py`: own options into a `PrepareConfig`, all others to Beam.

In: the words of the command line. Out: Beam's `PipelineOptions` and a `PrepareConfig`.
"""

import argparse
import dataclasses
import difflib
import re
import sys
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, NoReturn

import tyro
from tyro.constructors import ConstructorRegistry, PrimitiveConstructorSpec, PrimitiveTypeInfo

from pipelines.config import PrepareConfig
from slm_ray import internals
from slm_ray.config.options import one_line_errors, refuse_foreign_options
from slm_ray.errors import UserError
from slm_ray.preparation.cleaning import CleaningRules

if TYPE_CHECKING:  # of Beam, which `--help` need not wait for
    from apache_beam.options.pipeline_options import PipelineOptions

ABOUT = """Prepare a data set: read stories, clean, split, tokenize, and write checked Parquet shards.

Beam's own options pass through: --runner, --direct_num_workers 2 --direct_running_mode multi_processing, and those of
other runners; see https://beam.apache.org/documentation/runners/."""
_BEAM, _ADD = "apache_beam.options.pipeline_options", "_add_argparse_args"
LISTS = ("--source", "--validation-source")
"""Options that take several words."""
REGISTRY = ConstructorRegistry()
_KINDS: dict[Any, type[int] | type[float] | type[str]] = {
    int: int,
    float: float,
    int | None: int,
    float | None: float,
    str | None: str,
}
_WORDING = {  # tyro's words for a mistake -> those of Beam's options, which argparse reads
    r"Error parsing (--[^:]*):": r"argument \1:",
    r"Missing value for argument '(--[^']*)'. Expected 1 values.": r"argument \1: expected one argument",
    r"argument (--(?:validation-)?source): expected one argument": r"argument \1: expected at least one argument",
    r"invalid choice ('.*') for argument '(--[^']*)'. Expected one of \((.*?),?\)\.": (
        r"argument \2: invalid choice: \1 (choose from \3)"
    ),
}


def parse(argv: Sequence[str] | None) -> "tuple[PipelineOptions, PrepareConfig]":
    """Read the command line, and the tokenizer that it names.

    Raises:
        UserError: an unknown option, or a value that does not fit.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    refuse_foreign_options(words)
    with one_line_errors(_reworded):
        config, others = tyro.cli(
            PrepareConfig,
            args=list(_one_word_each(words)),
            prog="prepare.py",
            description=ABOUT,
            default=PrepareConfig(),
            return_unknown_args=True,
            registry=REGISTRY,
        )
    if "--" in words:
        raise UserError("unknown option --, see --help")
    from apache_beam.options.pipeline_options import PipelineOptions

    _check_beam_options(others)
    _ = config.given_tokenizer  # read before the source is: a mistake is found at once
    return PipelineOptions(others), config


def _one_word_each(argv: Sequence[str]) -> Iterator[str]:
    """Repeat the options of several words: `--source a b` becomes `--source a --source b`."""
    option = previous = ""
    for word in argv:
        if word.startswith("-") and not _is_value(word):
            option = word if word.replace("_", "-") in LISTS else ""
        elif option and previous != option:
            yield option
        yield word
        previous = word


def _is_value(word: str) -> bool:
    """Whether a word that begins with a dash is a value all the same: a dash alone, or a number."""
    return word == "-" or word[1:2].isdigit() or word[1:2] == "."


@REGISTRY.primitive_rule
def _one_value(info: PrimitiveTypeInfo) -> PrimitiveConstructorSpec[int | float | str | None] | None:
    """Read numbers, and options without a default: unlike tyro, in the words of argparse, and without `None`."""
    kind = _KINDS.get(info.type)
    if kind is None:
        return None

    def read(words: list[str]) -> int | float | str:
        try:
            return kind(words[0])
        except ValueError:
            raise ValueError(f"invalid {kind.__name__} value: {words[0]!r}") from None

    return PrimitiveConstructorSpec(
        nargs=1,
        metavar=kind.__name__.upper(),
        instance_from_str=read,
        is_instance=lambda value: value is None or isinstance(value, kind),
        str_from_instance=lambda value: [str(value)],
    )


def _reworded(message: str) -> str:
    for words, new_words in _WORDING.items():
        message = re.sub(words, new_words, message)
    return message


class _Parser(argparse.ArgumentParser):
    """Mistakes end in one line, like all mistakes of the user."""

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message} (see --help)")


def _beam_parser() -> _Parser | None:
    """A parser of all options of Beam; None where this version of Beam cannot be asked for them."""
    from apache_beam.options.pipeline_options import PipelineOptions

    parser, add = internals.find(f"{_BEAM}:_BeamArgumentParser"), internals.find(f"{_BEAM}:PipelineOptions.{_ADD}")
    if parser is None or add is None:
        return None
    beam: _Parser = type("_BeamParser", (_Parser, parser), {})(allow_abbrev=False, add_help=False)
    for options in (PipelineOptions, *PipelineOptions.__subclasses__()):
        if _ADD in vars(options):
            getattr(options, _ADD)(beam)
    return beam


def _check_beam_options(words: Sequence[str]) -> None:
    """Refuse what neither we nor Beam know: Beam by itself only logs it, and a typo would do nothing."""
    beam = _beam_parser()
    if beam is None:
        return
    _, unknown = beam.parse_known_args(list(words))
    if unknown and not unknown[0].startswith("-"):
        raise UserError(
            f"{unknown[0]} belongs to no option: --option=VALUE takes one word; name several as "
            "--source ONE TWO, and quote a path that holds spaces"
        )
    if unknown:
        known = [*_own_options(), *getattr(beam, "_option_string_actions", ())]
        near = difflib.get_close_matches(unknown[0].split("=")[0], known, n=1)
        hint = f": did you mean {near[0]}?" if near else ", see --help"
        raise UserError(f"unknown option {unknown[0]}{hint}")


def _own_options() -> Iterator[str]:
    """Both spellings of every option of `PrepareConfig`."""
    yield "--help"
    for field in (*dataclasses.fields(PrepareConfig), *dataclasses.fields(CleaningRules)):
        if field.type is CleaningRules:  # its fields are the options
            continue
        for name in (field.name, f"no_{field.name}") if field.type is bool else (field.name,):
            yield from (f"--{name.replace('_', '-')}", f"--{name}")
