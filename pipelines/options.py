"""The options of `prepare.py`: Beam pipeline options, checked, and turned into what the pipeline needs.

In: the words of the command line. Out: `PrepareOptions` for Beam, `Settings` for everything else.
"""

import argparse
import difflib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from apache_beam.options.pipeline_options import PipelineOptions, _BeamArgumentParser

from slm_ray import inputs, sources
from slm_ray.errors import UserError
from slm_ray.text import CleaningRules
from slm_ray.tokenizer import Tokenizer

TOKENIZER_STORIES = 20_000
"""About how many training stories a tokenizer is learned from: more no longer changes one of 4,096 entries."""

DEFAULT_FRACTION = 0.02

DESCRIPTION = "Prepare a data set: read stories, clean, split, tokenize, and write checked Parquet shards."
EPILOG = """Beam's own options pass through: --runner, --direct_num_workers 2 --direct_running_mode
multi_processing, and those of other runners; see https://beam.apache.org/documentation/runners/."""


class PrepareOptions(PipelineOptions):
    """What can be said on the command line besides Beam's own options."""

    @classmethod
    def _add_argparse_args(cls, parser: argparse.ArgumentParser) -> None:
        rules = CleaningRules()
        _add(
            parser,
            "--source",
            default="auto",
            help="auto (the first 20,000 TinyStories of the hub, or the sample corpus without a network), "
            "sample, hub:NAME, or a file, folder or glob of .parquet, .jsonl, .txt (default: auto)",
        )
        _add(parser, "--validation-source", help="a source that becomes the whole validation split")
        _add(parser, "--output", default="data/tinystories", help="data-set folder (default: %(default)s)")
        _add(
            parser,
            "--max-stories",
            type=int,
            help=f"take the first N stories (default: all; auto {inputs.AUTO_STORIES}, sample {inputs.SAMPLE_STORIES})",
        )
        _add(
            parser,
            "--vocab-size",
            type=int,
            default=4096,
            help="entries of the tokenizer that is trained (default: %(default)s)",
        )
        _add(parser, "--tokenizer", metavar="FILE", help="use this tokenizer.json instead of training one")
        for split in ("validation", "test"):
            _add(
                parser,
                f"--{split}-fraction",
                type=float,
                help=f"share of stories for {split}, 0 to 1 (default: {DEFAULT_FRACTION}; "
                "0 where the source has a validation split of its own)",
            )
        _add(parser, "--keep-paragraphs", action="store_true", help="keep line breaks, one between paragraphs")
        _add(
            parser,
            "--min-chars",
            type=int,
            default=rules.min_chars,
            help="reject shorter stories, characters (default: %(default)s)",
        )
        _add(
            parser,
            "--max-chars",
            type=int,
            default=rules.max_chars,
            help="reject longer stories, characters (default: %(default)s)",
        )
        _add(parser, "--text-column", default="text", help="column of the text (default: %(default)s)")
        _add(parser, "--seed", type=int, default=0, help="of the sample corpus (default: %(default)s)")
        _add(parser, "--force", action="store_true", help="replace another data set in the output folder")
        _add(
            parser,
            "--explain",
            metavar="STORY_ID",
            help="prepare nothing: print where a story of the data set in --output comes from and what became of it",
        )


@dataclass(frozen=True, kw_only=True)
class Settings:
    """One job, checked; paths are absolute, so that workers elsewhere on this machine find them."""

    source: str
    validation_source: str | None
    output: Path
    max_stories: int | None  # None: the source's default
    rules: CleaningRules
    validation_fraction: float | None  # None: DEFAULT_FRACTION, or 0 where the source has a validation split
    test_fraction: float | None
    vocab_size: int  # of a trained tokenizer
    tokenizer: Tokenizer | None  # None: train one
    text_column: str
    seed: int
    force: bool
    explain: str | None  # a story id: only say what became of it

    def __post_init__(self) -> None:
        if self.explain is not None and self.force:
            raise UserError("--explain prepares nothing: leave out --force")
        _check_fractions(self.validation_fraction or 0.0, self.test_fraction or 0.0)
        if not 0 <= self.rules.min_chars <= self.rules.max_chars:
            raise UserError(f"min_chars ({self.rules.min_chars}) must be from 0 to max_chars ({self.rules.max_chars})")

    def fractions(self, has_own_validation: bool) -> tuple[float, float]:
        """Shares of validation and test, given whether the source brings a validation split."""
        if has_own_validation and self.validation_fraction:
            raise UserError("the source has a validation split of its own: leave out --validation-fraction")
        default = 0.0 if has_own_validation else DEFAULT_FRACTION
        validation = default if self.validation_fraction is None else self.validation_fraction
        test = default if self.test_fraction is None else self.test_fraction
        return validation, test

    def parameters(self, has_own_validation: bool) -> dict[str, Any]:
        """Everything besides the source that decides about the bytes of the data set."""
        validation, test = self.fractions(has_own_validation)
        trained = {"stories": TOKENIZER_STORIES, "vocab_size": self.vocab_size}
        return {
            "keep_paragraphs": self.rules.keep_paragraphs,
            "min_chars": self.rules.min_chars,
            "max_chars": self.rules.max_chars,
            "text_column": self.text_column,
            "validation_fraction": validation,
            "test_fraction": test,
            "rows_per_range": sources.ROWS_PER_RANGE,
            "tokenizer": {"sha256": self.tokenizer.sha256} if self.tokenizer else {"trained": trained},
        }


def parse(argv: Sequence[str] | None) -> tuple[PipelineOptions, Settings]:
    """Read the command line.

    Raises:
        UserError: an unknown option, or a value that does not fit.
    """
    parser = _Parser(prog="prepare.py", description=DESCRIPTION, epilog=EPILOG, allow_abbrev=False)
    PrepareOptions._add_argparse_args(parser)
    own, others = parser.parse_known_args(argv)
    _check_beam_options(others, parser)
    return PipelineOptions(others, **vars(own)), _settings(own)


def _settings(own: argparse.Namespace) -> Settings:
    return Settings(
        source=own.source,
        validation_source=own.validation_source,
        output=Path(own.output).expanduser().resolve(),
        max_stories=own.max_stories,
        rules=CleaningRules(keep_paragraphs=own.keep_paragraphs, min_chars=own.min_chars, max_chars=own.max_chars),
        validation_fraction=own.validation_fraction,
        test_fraction=own.test_fraction,
        vocab_size=own.vocab_size,
        tokenizer=Tokenizer.load(own.tokenizer, must_keep_text=True) if own.tokenizer else None,
        text_column=own.text_column,
        seed=own.seed,
        force=own.force,
        explain=own.explain,
    )


def _add(parser: argparse.ArgumentParser, name: str, **settings: Any) -> None:
    """Both spellings, `--max-stories` and Beam's `--max_stories`; the help shows the first."""
    if "-" in name.removeprefix("--"):
        hidden = {**settings, "help": argparse.SUPPRESS, "default": argparse.SUPPRESS}
        parser.add_argument("--" + name.removeprefix("--").replace("-", "_"), **hidden)
    parser.add_argument(name, **settings)


class _Parser(argparse.ArgumentParser):
    """Mistakes end in one line, like all mistakes of the user."""

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message} (see --help)")


class _BeamParser(_Parser, _BeamArgumentParser):
    """The same, with what Beam's options ask of a parser."""


def _check_beam_options(words: Sequence[str], own: argparse.ArgumentParser) -> None:
    """Refuse what neither we nor Beam know: Beam by itself only logs it, and a typo would do nothing."""
    beam = _BeamParser(allow_abbrev=False, add_help=False)
    for options in (PipelineOptions, *PipelineOptions.__subclasses__()):
        if options is not PrepareOptions and "_add_argparse_args" in vars(options):
            options._add_argparse_args(beam)
    _, unknown = beam.parse_known_args(list(words))
    if unknown:
        known = [*own._option_string_actions, *beam._option_string_actions]
        near = difflib.get_close_matches(unknown[0].split("=")[0], known, n=1)
        hint = f": did you mean {near[0]}?" if near else ", see --help"
        raise UserError(f"unknown option {unknown[0]}{hint}")


def _check_fractions(validation: float, test: float) -> None:
    if min(validation, test) < 0 or validation + test >= 1:
        raise UserError(
            f"validation_fraction ({validation}) and test_fraction ({test}) must be 0 or more, "
            "and leave a share for train"
        )
