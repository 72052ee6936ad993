"""The options of `prepare.py`: Beam pipeline options, checked, and turned into what the pipeline needs.

In: the words of the command line. Out: `PrepareOptions` for Beam, `Settings` for everything else.
"""

import argparse
import difflib
from collections.abc import Sequence
from typing import Any, NoReturn

from apache_beam.options.pipeline_options import PipelineOptions, _BeamArgumentParser

from pipelines.settings import DEFAULT_FRACTION, Settings
from slm_ray import storage
from slm_ray.errors import UserError
from slm_ray.preparation.cleaning import CleaningRules
from slm_ray.preparation.rejections import MAX_REJECTED
from slm_ray.sources import discovery, formats, plain_text
from slm_ray.tokenization.loading import open_tokenizer
from slm_ray.tokenization.training import TOKENIZER_MODELS

DESCRIPTION = "Prepare a data set: read stories, clean, split, tokenize, and write checked Parquet shards."
DEFAULT_VOCAB_SIZE = 4096
EPILOG = """Beam's own options pass through: --runner, --direct_num_workers 2 --direct_running_mode
multi_processing, and those of other runners; see https://beam.apache.org/documentation/runners/."""


class PrepareOptions(PipelineOptions):
    """What can be said on the command line besides Beam's own options."""

    @classmethod
    def _add_argparse_args(cls, parser: argparse.ArgumentParser) -> None:
        _add(
            parser,
            "--source",
            nargs="+",
            action="extend",
            help="auto (the first 20,000 TinyStories of the hub, or the sample corpus without a network), sample, "
            "hub:NAME[@REVISION][:SPLIT], or files, folders and globs, here or at any address of fsspec (s3://, "
            f"gs://), of {formats.KNOWN_ENDS} (default: auto)",
        )
        _add(
            parser,
            "--validation-source",
            nargs="+",
            action="extend",
            help="a source that becomes the whole validation split",
        )
        _add(
            parser,
            "--cut-text",
            choices=plain_text.CUTS,
            default="auto",
            help="where a story of a text file ends: at each end-of-text token, at blank lines, before each heading "
            "` = Title = `, or after about --piece-chars characters (default: end-of-text tokens if there is one, else "
            "headings if there are two, else blank lines)",
        )
        _add(
            parser,
            "--piece-chars",
            type=int,
            default=plain_text.PIECE_CHARS,
            help="usual length of the pieces of --cut-text pieces, characters (default: %(default)s)",
        )
        _add(parser, "--output", default="data/tinystories", help="data-set folder (default: %(default)s)")
        _add(
            parser,
            "--max-stories",
            type=int,
            help="take the first N stories "
            f"(default: all; auto {discovery.AUTO_STORIES}, sample {discovery.SAMPLE_STORIES})",
        )
        _add(
            parser,
            "--vocab-size",
            type=int,
            help=f"entries of the tokenizer that is trained, 257 or more (default: {DEFAULT_VOCAB_SIZE})",
        )
        _add(
            parser,
            "--tokenizer-model",
            choices=TOKENIZER_MODELS,
            default=TOKENIZER_MODELS[0],
            help="what is trained: byte-level BPE, or byte-level Unigram (default: %(default)s)",
        )
        _add(
            parser,
            "--tokenizer",
            metavar="WHICH",
            help="use this one instead of training: a tokenizer.json, a folder that holds one, a SentencePiece "
            ".model, gpt2 or hub:NAME[@REVISION] (both from the hub)",
        )
        for split in ("validation", "test"):
            _add(
                parser,
                f"--{split}-fraction",
                type=float,
                help=f"share of stories for {split}, 0 to 1 (default: {DEFAULT_FRACTION}; "
                "0 where the source has a validation split of its own)",
            )
        _add_cleaning_options(parser)
        _add(parser, "--text-column", default="text", help="column of the text (default: %(default)s)")
        _add(parser, "--seed", type=int, default=0, help="of the sample corpus (default: %(default)s)")
        _add(parser, "--force", action="store_true", help="replace another data set in the output folder")
        _add(
            parser,
            "--explain",
            metavar="STORY_ID",
            help="prepare nothing: print where a story of the data set in --output comes from and what became of it",
        )


def _add_cleaning_options(parser: argparse.ArgumentParser) -> None:
    """How stories are cleaned, and which are left out."""
    rules = CleaningRules()
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
    _add(
        parser,
        "--min-words",
        type=int,
        default=rules.min_words,
        help="reject stories of fewer words (default: %(default)s)",
    )
    _add(
        parser,
        "--max-other-characters",
        type=float,
        metavar="SHARE",
        default=rules.max_other_characters,
        help="reject stories with a larger share of characters that are neither ASCII nor common punctuation, "
        "0 to 1 (default: %(default)s, none)",
    )
    _add(
        parser,
        "--no-repair-encoding",
        action="store_true",
        help="leave UTF-8 that was once read as another encoding as it is",
    )
    _add(
        parser,
        "--normalise-quotes",
        action="store_true",
        help="write curly quotes, dashes and ellipses as ASCII",
    )
    _add(
        parser,
        "--near-duplicates",
        type=float,
        metavar="SIMILARITY",
        help="leave out stories that have so much of their word 5-grams in common with one that stays, "
        "such as 0.8 (default: keep)",
    )
    _add(
        parser,
        "--max-rejected",
        type=float,
        metavar="SHARE",
        default=MAX_REJECTED,
        help="fail if a larger share of the stories is rejected, 0 to 1; ten or fewer fail as more than half, or for 0 "
        "(default: %(default)s)",
    )


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
    if own.tokenizer and own.vocab_size is not None:
        raise UserError("--vocab-size is of a tokenizer that is trained, and --tokenizer names one: leave one out")
    return Settings(
        source=tuple(own.source or ["auto"]),
        validation_source=tuple(own.validation_source) if own.validation_source else None,
        output=storage.storage_path(own.output),
        max_stories=own.max_stories,
        rules=CleaningRules(
            keep_paragraphs=own.keep_paragraphs,
            repair_encoding=not own.no_repair_encoding,
            normalise_quotes=own.normalise_quotes,
            min_chars=own.min_chars,
            max_chars=own.max_chars,
            min_words=own.min_words,
            max_other_characters=own.max_other_characters,
        ),
        near_duplicates=own.near_duplicates,
        max_rejected=own.max_rejected,
        validation_fraction=own.validation_fraction,
        test_fraction=own.test_fraction,
        vocab_size=DEFAULT_VOCAB_SIZE if own.vocab_size is None else own.vocab_size,
        tokenizer_model=own.tokenizer_model,
        tokenizer=None if own.tokenizer is None else open_tokenizer(own.tokenizer),
        text_column=own.text_column,
        cut_text=own.cut_text,
        piece_chars=own.piece_chars,
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
    if unknown and not unknown[0].startswith("-"):
        raise UserError(
            f"{unknown[0]} belongs to no option: --option=VALUE takes one word; name several as "
            "--source ONE TWO, and quote a path that holds spaces"
        )
    if unknown:
        known = [*own._option_string_actions, *beam._option_string_actions]
        near = difflib.get_close_matches(unknown[0].split("=")[0], known, n=1)
        hint = f": did you mean {near[0]}?" if near else ", see --help"
        raise UserError(f"unknown option {unknown[0]}{hint}")
