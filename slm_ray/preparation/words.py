"""What a word is: what stands between white space, and each character of a script that is written without spaces.

In: cleaned texts, or bytes of them. Out: words counted, or the bytes where one begins. Chinese, Japanese, Thai, Lao,
Khmer, Burmese and Tibetan put no space between words; there a character counts as one, as it does in the n-grams of
search engines. Text without such characters is divided by white space alone. Used by `cleaning`, `near_duplicates` and
`summary`; the tokenizer has words of its own, its pre-tokens.
"""

import itertools
import re
from collections import Counter

import numpy as np
import numpy.typing as npt

_RANGES = (  # first and last code point of the scripts without spaces; their punctuation is left out
    (0x0E01, 0x0EFF),  # Thai, Lao
    (0x0F40, 0x0FBC),  # Tibetan
    (0x1000, 0x109F),  # Burmese
    (0x1780, 0x17D3),  # Khmer
    (0x3005, 0x3007),
    (0x3041, 0x30FA),  # Hiragana, Katakana
    (0x30FC, 0x30FF),
    (0x31F0, 0x31FF),
    (0x3400, 0x4DBF),  # Han
    (0x4E00, 0x9FFF),
    (0xF900, 0xFAFF),
    (0xFF66, 0xFF9F),  # Katakana of half width
    (0x20000, 0x3FFFF),
)
_ONE = "[" + "".join(f"{chr(first)}-{chr(last)}" for first, last in _RANGES) + "]"
UNSPACED = re.compile(_ONE)
"""A character that is a word by itself."""

_NEXT_BYTES = 3  # of a character of three bytes or more; the fourth decides about no script
_WORD = re.compile(rf"{_ONE}|[^\s{_ONE[1:]}+")
_SPACED = re.compile(r"\S+")


def count_words(text: str) -> int:
    """How many words a text has; `"One two"` has 2, `"小猫"` too."""
    spaced = len(text.split())
    return spaced if text.isascii() or not UNSPACED.search(text) else spaced + n_more_words(text)


def first_words(text: str, count: int) -> str:
    """The beginning of a text up to the end of so many words; the whole text where it has no more.

    Between spaces, where no character is a word by itself: `first_words("One  two three", 2)` is `One  two`, and
    `first_words("小猫。Tom", 2)` is `小猫`.
    """
    pattern = _WORD if UNSPACED.search(text) else _SPACED
    words = (word for word in pattern.finditer(text) if pattern is _SPACED or _is_word(word.group()))
    last = next(itertools.islice(words, count - 1, None), None)
    return text if last is None else text[: last.end()]


def n_more_words(text: str) -> int:
    """How many words a text has beyond those between white space: `"小猫 cat"` has 1 more."""
    return sum(_n_more(run) for run in text.split())


def split_unspaced(run: str) -> Counter[str]:
    """The words of a run without white space, with the marks between them: `"小猫。Tom"` has 小, 猫 and 。Tom."""
    return Counter(_WORD.findall(run))


def unspaced_starts(content: npt.NDArray[np.uint8]) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Where in UTF-8 text each character begins that is a word by itself, and the byte after its last."""
    leads = np.flatnonzero(content >= 0xE0)
    if not len(leads):
        return leads, leads
    padded = np.concatenate((content, np.zeros(_NEXT_BYTES, np.uint8))).astype(np.int64)
    lead, second, third, fourth = (padded[leads + at] for at in range(4))
    is_long = lead >= 0xF0
    code = np.where(
        is_long,
        (lead & 0x07) << 18 | (second & 0x3F) << 12 | (third & 0x3F) << 6 | (fourth & 0x3F),
        (lead & 0x0F) << 12 | (second & 0x3F) << 6 | (third & 0x3F),
    )
    is_unspaced = np.zeros(len(code), bool)
    for first, last in _RANGES:
        is_unspaced |= (code >= first) & (code <= last)
    starts = leads[is_unspaced]
    return starts, starts + np.where(is_long[is_unspaced], 4, 3)


def _n_more(run: str) -> int:
    """Marks alone, as a full stop between two characters, are no words."""
    if run.isascii() or not UNSPACED.search(run):
        return 0
    return sum(map(_is_word, _WORD.findall(run))) - 1


def _is_word(part: str) -> bool:
    return any(map(str.isalnum, part)) or UNSPACED.match(part) is not None
