"""What a story is: cleaned text, or a reason why it is not one, and the split it belongs to.

In: the text of one story as it was read. Out: cleaned text, a reason from `REASONS`, a 16-byte hash, a split.
Stands between `sources` (reading) and `tokenizer`. Pure functions of the text alone, so that no result
depends on the order of stories, on the runner or on the number of workers.
"""

import hashlib
import re
from dataclasses import dataclass

REASONS = (
    "not_text",  # null, a number, a list: no string at all
    "bad_json",  # a JSONL line that is not an object
    "bad_csv",  # a CSV row with more or fewer fields than the header
    "invalid_utf8",  # bytes that are not UTF-8, a lone surrogate
    "empty",  # nothing but white space
    "control_characters",  # NUL and the like: binary data, not prose
    "too_short",  # fewer than `min_chars`
    "too_long",  # more than `max_chars`
    "duplicate",  # equal to a kept story but for white space and case
)
"""Every reason for which a story is kept aside; each is counted in the manifest and listed in `rejected/`."""

HASH_BYTES = 16
_CONTROL = re.compile(r"[\x00-\x08\x0e-\x1b\x7f]")


@dataclass(frozen=True, kw_only=True)
class CleaningRules:
    """How stories are cleaned, and which are rejected."""

    keep_paragraphs: bool = False  # keep line breaks as one "\n" each instead of a space
    min_chars: int = 50  # shortest cleaned story, characters
    max_chars: int = 20_000  # longest cleaned story, characters


def clean_story(text: str, keep_paragraphs: bool = False) -> str:
    r"""Join all white space to single spaces, or keep paragraphs apart by one line break.

    `" One.\n\n Two  words.\r\n"` becomes `"One. Two words."`, with `keep_paragraphs` `"One.\nTwo words."`.
    """
    if not keep_paragraphs:
        return " ".join(text.split())
    paragraphs = (" ".join(line.split()) for line in text.splitlines())
    return "\n".join(paragraph for paragraph in paragraphs if paragraph)


def rejection_reason(text: str, rules: CleaningRules | None = None) -> str | None:
    """Why this cleaned text is not taken (one of `REASONS`), or None when it is."""
    rules = rules or CleaningRules()
    if not text:
        return "empty"
    if _CONTROL.search(text):
        return "control_characters"
    if len(text) < rules.min_chars:
        return "too_short"
    if len(text) > rules.max_chars:
        return "too_long"
    return None


def examine(raw: bytes, rules: CleaningRules) -> tuple[str, str | None]:
    """Decode, clean and judge one raw story: `(cleaned text, None)`, or `(what was found, reason)`."""
    try:
        text = clean_story(raw.decode("utf-8"), rules.keep_paragraphs)
    except UnicodeDecodeError:
        return raw.decode("utf-8", errors="replace"), "invalid_utf8"
    return text, rejection_reason(text, rules)


def story_hash(text: str) -> bytes:
    """16 bytes that name a story: equal for texts that differ only in white space and case."""
    normalised = " ".join(text.split()).casefold()
    return hashlib.blake2b(normalised.encode("utf-8"), digest_size=HASH_BYTES).digest()


def split_of_hash(digest: bytes, fractions: tuple[float, float]) -> str:
    """The split of a story by its `story_hash`; `fractions` are the shares of validation and test."""
    validation, test = fractions
    place = int.from_bytes(digest[:8]) / 2**64  # uniform in [0, 1)
    if place < validation:
        return "validation"
    return "test" if place < validation + test else "train"


def assign_split(text: str, fractions: tuple[float, float]) -> str:
    """The split of a story by its text: `train`, `validation` or `test`.

    Two copies that differ only in white space or case always share a split, so no copy of a training story is
    ever validated on. `fractions` are the shares of validation and test.
    """
    return split_of_hash(story_hash(text), fractions)


def is_sampled(digest: bytes, share: float) -> bool:
    """Whether a story belongs to a fixed sample of about `share` of all, by other bits than the split's."""
    return int.from_bytes(digest[8:16]) < share * 2**64
