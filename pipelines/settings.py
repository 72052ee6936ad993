"""What one preparation is to do: the options of `prepare.py`, checked.

In: values. Out: `Settings`, and the parameters by which a manifest records them. Made by `options`.
"""

import dataclasses
from dataclasses import dataclass
from typing import Any

from slm_ray import storage
from slm_ray.errors import UserError
from slm_ray.preparation.cleaning import CleaningRules
from slm_ray.preparation.near_duplicates import band_shape
from slm_ray.sources import discovery, plan
from slm_ray.storage import StoragePath
from slm_ray.tokenization.tokenizer import MIN_VOCAB_SIZE, Tokenizer

TOKENIZER_STORIES = 20_000
"""About how many training stories a tokenizer is learned from: more no longer changes one of 4,096 entries."""

DEFAULT_FRACTION = 0.02


@dataclass(frozen=True, kw_only=True)
class Settings:
    """One job, checked; paths are absolute, so that workers elsewhere on this machine find them."""

    source: tuple[str, ...]
    validation_source: tuple[str, ...] | None
    output: StoragePath
    max_stories: int | None  # None: the source's default
    rules: CleaningRules
    near_duplicates: float | None  # similarity from which on stories are left out; None: keep all
    max_rejected: float  # share of the stories
    validation_fraction: float | None  # None: DEFAULT_FRACTION, or 0 where the source has a validation split
    test_fraction: float | None
    vocab_size: int  # of a trained tokenizer
    tokenizer_model: str  # one of TOKENIZER_MODELS, of a trained tokenizer
    tokenizer: Tokenizer | None  # None: train one
    text_column: str
    cut_text: str  # one of prose.CUTS
    piece_chars: int
    seed: int
    force: bool
    explain: str | None  # a story id: only say what became of it

    def __post_init__(self) -> None:
        if self.explain is not None and self.force:
            raise UserError("--explain prepares nothing: leave out --force")
        if not all((*self.source, *(self.validation_source or ("-",)))):
            raise UserError("a source is an empty word: name auto, sample, hub:NAME, or files, folders and globs")
        if self.tokenizer is None and self.vocab_size < MIN_VOCAB_SIZE:
            raise UserError(
                f"vocab_size ({self.vocab_size}) must be at least {MIN_VOCAB_SIZE}: 256 bytes, end-of-text token"
            )
        _check_fractions(self.validation_fraction or 0.0, self.test_fraction or 0.0)
        if not 0 <= self.rules.min_chars <= self.rules.max_chars:
            raise UserError(f"min_chars ({self.rules.min_chars}) must be from 0 to max_chars ({self.rules.max_chars})")
        _check_share("max_other_characters", self.rules.max_other_characters)
        _check_share("max_rejected", self.max_rejected)
        if self.near_duplicates is not None:
            band_shape(self.near_duplicates)
        if self.explain is None:
            for word in (*self.source, *(self.validation_source or ())):
                _check_apart(word, self.output)

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
        trained = {"stories": TOKENIZER_STORIES, "vocab_size": self.vocab_size, "model": self.tokenizer_model}
        return {
            **dataclasses.asdict(self.rules),
            "near_duplicates": self.near_duplicates,
            "text_column": self.text_column,
            "validation_fraction": validation,
            "test_fraction": test,
            "rows_per_range": plan.ROWS_PER_RANGE,
            "tokenizer": {"sha256": self.tokenizer.sha256} if self.tokenizer else {"trained": trained},
        }


def _check_apart(word: str, output: StoragePath) -> None:
    """A source folder must not hold the output: the next run would read the shards of this one as stories."""
    if discovery.is_special(word):
        return
    try:
        source = storage.storage_path(word)
    except UserError:  # the search for the inputs says it better
        return
    if (storage.is_local(source) and not source.is_dir()) or not storage.is_below(output, source):
        return
    raise UserError(
        f"the output folder {output} lies in the source folder {word}, and a second run would read what the first "
        "one wrote: choose an --output outside of it"
    )


def _check_fractions(validation: float, test: float) -> None:
    if not (validation >= 0 and test >= 0 and validation + test < 1):  # so put, NaN fails too
        raise UserError(
            f"validation_fraction ({validation}) and test_fraction ({test}) must be 0 or more, "
            "and leave a share for train"
        )


def _check_share(name: str, share: float) -> None:
    if not 0 <= share <= 1:
        raise UserError(f"{name} ({share}) must be a share from 0 to 1")
