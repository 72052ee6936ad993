"""What one preparation is to do: the options of `prepare.py`, checked.

In: values. Out: `PrepareConfig`, and the parameters by which a manifest records them. Read from a command line by
`options`. Beam workers never import it: it needs tyro.
"""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Annotated, Any

from tyro.conf import UseAppendAction, arg
from tyro.extras import literal_type_from_choices

from slm_ray import storage
from slm_ray.corpus.instructions import FIXED_WORDS, INSTRUCTION_FORMAT, STORY_MARK
from slm_ray.errors import UserError
from slm_ray.preparation.cleaning import CleaningRules
from slm_ray.preparation.near_duplicates import band_shape
from slm_ray.preparation.rejections import MAX_REJECTED
from slm_ray.sources import discovery, formats, plain_text, plan
from slm_ray.storage import StoragePath
from slm_ray.tokenization.loading import open_tokenizer
from slm_ray.tokenization.tokenizer import MIN_VOCAB_SIZE, Tokenizer
from slm_ray.tokenization.training import TOKENIZER_MODELS

TOKENIZER_STORIES = 20_000
"""About how many training stories a tokenizer is learned from: more no longer changes one of 4,096 entries."""

DEFAULT_VOCAB_SIZE = 4096
DEFAULT_FRACTION = 0.02

_SPLIT_DEFAULT = f"{DEFAULT_FRACTION}; 0 where the source has a validation split of its own"


def _option(default: str, metavar: str | None = None, about: str | None = None, choices: Sequence[str] = ()) -> object:
    """Say in `--help` what a default means that is no plain value, and what is too long for one line."""
    constructor = literal_type_from_choices(choices) if choices else None
    return arg(help_behavior_hint=f"(default: {default})", metavar=metavar, help=about, constructor=constructor)


@dataclass(frozen=True, kw_only=True)
class PrepareConfig:
    """Prepare a data set: read stories, clean, split, tokenize, and write checked Parquet shards.

    Raises:
        UserError: a value is out of its range, or two do not fit together.
    """

    source: Annotated[
        UseAppendAction[tuple[str, ...]],
        _option(
            "auto",
            "SOURCE [SOURCE ...]",
            "auto (the first 20,000 TinyStories of the hub, or the sample corpus without a network), sample, "
            "hub:NAME[@REVISION][:SPLIT], or files, folders and globs, here or at any address of fsspec (s3://, "
            f"gs://), of {formats.KNOWN_ENDS}.",
        ),
    ] = ()
    validation_source: Annotated[UseAppendAction[tuple[str, ...]], _option("none", "SOURCE [SOURCE ...]")] = ()
    """Sources that become the whole validation split."""
    cut_text: Annotated[
        str,
        _option(
            "end-of-text tokens if there is one, else headings if there are two, else blank lines",
            about="Where a story of a text file ends: at each end-of-text token, at blank lines, at each line's end, "
            "before each heading ` = Title = `, or after about --piece-chars characters.",
            choices=plain_text.CUTS,
        ),
    ] = "auto"
    piece_chars: int = plain_text.PIECE_CHARS
    """Usual length of the pieces of --cut-text pieces, characters."""
    output: str = "data/tinystories"
    """Data-set folder."""
    max_stories: Annotated[
        int | None, _option(f"all; auto {discovery.AUTO_STORIES}, sample {discovery.SAMPLE_STORIES}")
    ] = None
    """Take the first N stories."""
    vocab_size: Annotated[int | None, _option(str(DEFAULT_VOCAB_SIZE))] = None
    """Entries of the tokenizer that is trained, 257 or more."""
    tokenizer_model: Annotated[str | None, _option(TOKENIZER_MODELS[0], choices=TOKENIZER_MODELS)] = None
    """What is trained: byte-level BPE, or byte-level Unigram."""
    tokenizer_only: bool = False
    """Write no data set, only the tokenizer that is learned from it."""
    tokenizer: Annotated[
        str | None,
        _option(
            "train one",
            "WHICH",
            "Use this one instead of training: a tokenizer.json, a folder that holds one, a SentencePiece .model, "
            "gpt2 or hub:NAME[@REVISION] (both from the hub).",
        ),
    ] = None
    validation_fraction: Annotated[float | None, _option(_SPLIT_DEFAULT)] = None
    """Share of stories for validation, 0 to 1."""
    test_fraction: Annotated[float | None, _option(_SPLIT_DEFAULT)] = None
    """Share of stories for test, 0 to 1."""
    rules: Annotated[CleaningRules, arg(name="")] = field(default_factory=CleaningRules)
    """How stories are cleaned, and which are rejected."""
    near_duplicates: Annotated[float | None, _option("keep", "SIMILARITY")] = None
    """Leave out stories that have so much of their word 5-grams in common with one that stays, such as 0.8."""
    instructions: bool = False
    """Write an instruction that the story fulfils before each story, after TinyStories-Instruct: words, features,
    sentences of it. It is part of the text, and learned like it."""
    max_rejected: Annotated[float, arg(metavar="SHARE")] = MAX_REJECTED
    """Fail if a larger share of the stories is rejected, 0 to 1; ten or fewer fail as more than half, or for 0."""
    text_column: str = "text"
    """Column of the text."""
    seed: int = 0
    """Seed of the sample corpus."""
    force: bool = False
    """Replace another data set in the output folder."""
    explain: Annotated[str | None, _option("none", "STORY_ID")] = None
    """Prepare nothing: print where a story of the data set in --output comes from and what became of it."""

    def __post_init__(self) -> None:
        _check_together(self)
        _check_ranges(self)
        if self.near_duplicates is not None:
            band_shape(self.near_duplicates)
        if self.explain is None:
            for word in (*self.sources, *self.validation_source):
                _check_apart(word, self.output)

    @property
    def sources(self) -> tuple[str, ...]:
        """What `--source` names, `auto` when nothing."""
        return self.source or ("auto",)

    @property
    def trained_vocab_size(self) -> int:
        """Entries of a tokenizer that is trained."""
        return DEFAULT_VOCAB_SIZE if self.vocab_size is None else self.vocab_size

    @property
    def trained_model(self) -> str:
        """Kind of a tokenizer that is trained."""
        return self.tokenizer_model or TOKENIZER_MODELS[0]

    @cached_property
    def folder(self) -> StoragePath:
        """The data-set folder, absolute, so that workers elsewhere on this machine find it."""
        return storage.storage_path(self.output)

    @cached_property
    def given_tokenizer(self) -> Tokenizer | None:
        """What `--tokenizer` names, read when first asked for; None: one is trained.

        Raises:
            UserError: it cannot be read, or loses line breaks or letters that another option writes.
        """
        tokenizer = None if self.tokenizer is None else open_tokenizer(self.tokenizer)
        if tokenizer is not None:
            _check_written(self, tokenizer)
        return tokenizer

    def fractions(self, has_own_validation: bool, has_own_test: bool = False) -> tuple[float, float]:
        """Shares of validation and test, given whether the source brings such splits."""
        for split, is_own in (("validation", has_own_validation), ("test", has_own_test)):
            if is_own and getattr(self, f"{split}_fraction"):
                raise UserError(f"the source has a {split} split of its own: leave out --{split}-fraction")
        default = 0.0 if has_own_validation else DEFAULT_FRACTION
        validation = default if self.validation_fraction is None else self.validation_fraction
        test = (0.0 if has_own_test else default) if self.test_fraction is None else self.test_fraction
        return validation, test

    def parameters(self, has_own_validation: bool, has_own_test: bool = False) -> dict[str, Any]:
        """Everything besides the source that decides about the bytes of the data set."""
        validation, test = self.fractions(has_own_validation, has_own_test)
        given = self.given_tokenizer
        trained = {"stories": TOKENIZER_STORIES, "vocab_size": self.trained_vocab_size, "model": self.trained_model}
        return {
            **dataclasses.asdict(self.rules),
            "near_duplicates": self.near_duplicates,
            "text_column": self.text_column,
            "validation_fraction": validation,
            "test_fraction": test,
            "rows_per_range": plan.ROWS_PER_RANGE,
            "tokenizer": _identity(given) if given else {"trained": trained},
            **({"instructions": INSTRUCTION_FORMAT} if self.instructions else {}),
        }


def _identity(tokenizer: Tokenizer) -> dict[str, Any]:
    """What decides about the bytes, and the cleaning rule that comes with it."""
    rule = tokenizer.normaliser
    return {"sha256": tokenizer.sha256, **({"normalisation": rule.record} if rule else {})}


def _check_written(config: PrepareConfig, tokenizer: Tokenizer) -> None:
    """Refuse options that write what the tokenizer loses: line breaks, and the words of an instruction."""
    options = {"--keep-paragraphs": config.rules.keep_paragraphs, "--instructions": config.instructions}
    given = next((name for name, is_on in options.items() if is_on), None)
    if given is not None and "\n" not in tokenizer.writable("a\nb"):
        raise UserError(
            f"{given} writes line breaks, and the tokenizer {config.tokenizer} makes spaces of them or has no piece "
            "for them: leave one out"
        )
    if config.instructions and (lost := tokenizer.unknown(tokenizer.normalised("".join(FIXED_WORDS)))):
        raise UserError(
            f"--instructions writes words such as {STORY_MARK.strip()!r}, and the tokenizer {config.tokenizer} has no "
            f"piece for {' '.join(lost)}: leave one out"
        )


def _check_together(config: PrepareConfig) -> None:
    """Refuse options that contradict each other."""
    if config.explain is not None:
        given = [name for name in ("force", "instructions", "tokenizer_only") if getattr(config, name)]
        if given:
            raise UserError(f"--explain prepares nothing: leave out --{given[0].replace('_', '-')}")
    if config.tokenizer is not None and config.vocab_size is not None:
        raise UserError("--vocab-size is of a tokenizer that is trained, and --tokenizer names one: leave one out")
    if config.tokenizer is not None and config.tokenizer_model is not None:
        raise UserError("--tokenizer-model says what to train, and --tokenizer names one that is: leave one out")
    if config.tokenizer_only and config.tokenizer is not None:
        raise UserError("--tokenizer-only trains a tokenizer, and --tokenizer names one: leave one out")
    if config.tokenizer_only and config.near_duplicates is not None:
        raise UserError("--near-duplicates chooses stories of a data set, and --tokenizer-only writes none")
    if config.piece_chars != plain_text.PIECE_CHARS and config.cut_text != "pieces":
        raise UserError("--piece-chars is of --cut-text pieces: give both, or leave it out")
    if config.seed and not {"auto", "sample"}.intersection((*config.sources, *config.validation_source)):
        raise UserError("--seed is of the sample corpus, and no source is sample or auto: leave it out")


def _check_ranges(config: PrepareConfig) -> None:
    """Refuse values out of their range."""
    if not all((*config.source, *config.validation_source)):
        raise UserError("a source is an empty word: name auto, sample, hub:NAME, or files, folders and globs")
    if config.trained_vocab_size < MIN_VOCAB_SIZE:
        raise UserError(
            f"vocab_size ({config.vocab_size}) must be at least {MIN_VOCAB_SIZE}: 256 bytes, end-of-text token"
        )
    _check_fractions(config.validation_fraction or 0.0, config.test_fraction or 0.0)
    rules = config.rules
    if not 0 <= rules.min_chars <= rules.max_chars:
        raise UserError(f"min_chars ({rules.min_chars}) must be from 0 to max_chars ({rules.max_chars})")
    _check_share("max_other_characters", rules.max_other_characters)
    _check_share("max_rejected", config.max_rejected)


def _check_apart(word: str, folder: str) -> None:
    """A source folder must not hold the output: the next run would read the shards of this one as stories."""
    if discovery.is_special(word):
        return
    output = storage.storage_path(folder)
    try:
        source = storage.storage_path(word)
    except UserError:  # the search for the inputs names the mistake better
        return
    if (storage.is_local(source) and not source.is_dir()) or not storage.is_below(output, source):
        return
    raise UserError(
        f"the output folder {output} lies in the source folder {word}, and a second run would read what the first "
        "one wrote: choose an --output outside of it"
    )


def _check_fractions(validation: float, test: float) -> None:
    if not (validation >= 0 and test >= 0 and validation + test < 1):  # written this way, NaN fails too
        raise UserError(
            f"validation_fraction ({validation}) and test_fraction ({test}) must be 0 or more, "
            "and leave a share for train"
        )


def _check_share(name: str, share: float) -> None:
    if not 0 <= share <= 1:
        raise UserError(f"{name} ({share}) must be a share from 0 to 1")
