"""Why a story is rejected, and a check that not too many are: then the source or the rules are probably wrong.

In: the counts by reason of a whole job. Out: nothing, or a `UserError`. Called by `pipelines/prepare.py` before it
publishes a data set.
"""

from collections.abc import Mapping

from slm_ray.errors import UserError

REASONS = (
    "not_text",  # null, a number, a list: no string at all
    "bad_json",  # a JSONL line that is not an object
    "bad_csv",  # a CSV row with more or fewer fields than the header
    "invalid_utf8",  # bytes that are not UTF-8, a lone surrogate
    "empty",  # nothing but white space and invisible characters
    "control_characters",  # NUL and the like: binary data, not prose
    "too_short",  # fewer than `min_chars`
    "too_long",  # more than `max_chars`
    "too_few_words",  # fewer than `min_words`
    "other_characters",  # more than the share `max_other_characters` of another script, emoji, symbols
    "not_in_tokenizer",  # a character that a given tokenizer has no piece for; the evidence names it
    "duplicate",  # equal to a kept story but for white space and case
    "near_duplicate",  # similar to a kept story, see `near_duplicates`
)
"""Every reason for which a story is rejected; each is counted in the manifest and listed in `rejected/`."""

MAX_REJECTED = 0.05
"""The default limit, as a share of the stories read."""

MIN_REJECTED = 10
"""Up to this number, rejected stories are too many only if they are more than half of all, or if the limit is 0: of
twenty stories tried by hand, two may be bad."""

NOT_REJECTED = ("duplicate", "near_duplicate")
"""Reasons of stories that are left out because a kept story is equal or similar."""

ADVICE = {
    "not_text": "look at the column (--text-column)",
    "bad_json": "look at the lines of the source",
    "bad_csv": "look at the rows of the source",
    "invalid_utf8": "write the source as UTF-8",
    "empty": "look at the column (--text-column)",
    "control_characters": "look whether the source is text",
    "too_short": "cut prose in text files with --cut-text pieces, or lower --min-chars",
    "too_long": "cut text files with --cut-text lines (a story a line) or --cut-text pieces, or raise --max-chars",
    "too_few_words": "lower --min-words",
    "other_characters": "raise --max-other-characters",
    "not_in_tokenizer": "train the tokenizer with --byte_fallback=true or --character_coverage=1.0, or leave it out",
}
"""What the user can change, by reason."""


def refuse_too_many(reasons: Mapping[str, int], read: int, limit: float, evidence: str = "rejected/") -> None:
    """Refuse a job that rejected more than the share `limit` of its stories, and more than a few.

    A few are up to `MIN_REJECTED` stories that are at most half of all; with a limit of 0 none are allowed.

    `reasons` counts stories by their reason of `REASONS`; duplicates and near duplicates do not count. `evidence` is
    the folder that shows the rejected stories.

    Raises:
        UserError: too many were rejected; with the share, the most frequent reason and advice.
    """
    rejected = {reason: n for reason, n in reasons.items() if reason not in NOT_REJECTED}
    total = sum(rejected.values())
    if not total or total / read <= limit or (limit > 0 and total <= MIN_REJECTED and 2 * total <= read):
        return
    most = min(rejected, key=lambda reason: (-rejected[reason], reason))
    raise UserError(
        f"{total:,} of {read:,} stories ({total / read:.1%}) were rejected, more than {limit:.1%}; "
        f"most frequent reason: {most} ({rejected[most]:,}): {ADVICE[most]}, or raise --max-rejected; "
        f"they are in {evidence}"
    )
