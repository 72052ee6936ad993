"""Cleaning a whole batch of stories at once: the fast path of `cleaning.examine`.

In: the bytes of stories as they were read. Out: cleaned texts, reasons and hashes, equal to those that
`cleaning.examine` returns story by story. Nearly all stories of a corpus like TinyStories are plain: ASCII text with
some curly quotes, in which only white space changes. They are cleaned as one array of bytes; every other story goes
through `examine`.
"""

import functools
import hashlib
import itertools
import string
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from slm_ray.preparation.cleaning import CleaningRules, examine
from slm_ray.preparation.splits import HASH_BYTES, story_hash

Bytes = npt.NDArray[np.uint8]
Places = npt.NDArray[np.int64]
Mask = npt.NDArray[np.bool_]

ROWS_AT_ONCE = 1000  # arrays of this size stay in the cache, and their memory is not given back and taken again
MAX_BATCH_BYTES = 8 * 2**20  # the arrays below take up to 20 times as much; only very long stories need more
COMMON = "–—‘’“”…"
"""Characters beyond ASCII of which cleaning changes none, alone or side by side; all are `E2 80` and one more byte."""
SPACE, LINE_BREAK = np.uint8(0x20), np.uint8(0x0A)

_IS_BREAK = np.array([len(f"a{chr(byte)}b".splitlines()) > 1 for byte in range(SPACE)])
_IS_COMMON = np.isin(np.arange(256), [sign.encode()[-1] for sign in COMMON])
_IS_WHITE = np.array([chr(byte).isspace() for byte in range(SPACE)])
_FOLDED = bytes.maketrans(b"\n" + string.ascii_uppercase.encode(), b" " + string.ascii_lowercase.encode())


@dataclass(frozen=True)
class Cleaned:
    """What became of each story of a batch."""

    texts: pa.LargeStringArray  # cleaned, or what was found where there is a reason
    reasons: pa.StringArray  # of `rejections.REASONS`; null: kept
    hashes: pa.FixedSizeBinaryArray  # `splits.story_hash`; null where there is a reason


def clean_texts(raw: pa.LargeBinaryArray, rules: CleaningRules) -> Cleaned:
    """Decode, clean and judge the stories of a batch, none of which is null; as `cleaning.examine` does for one."""
    parts = [_clean_some(raw.slice(row, ROWS_AT_ONCE), rules) for row in range(0, max(1, len(raw)), ROWS_AT_ONCE)]
    return Cleaned(
        pa.concat_arrays([part.texts for part in parts]),
        pa.concat_arrays([part.reasons for part in parts]),
        pa.concat_arrays([part.hashes for part in parts]),
    )


def _clean_some(raw: pa.LargeBinaryArray, rules: CleaningRules) -> Cleaned:
    if raw.nbytes > MAX_BATCH_BYTES or not len(raw):
        return _examined(raw, rules)
    texts, is_plain = _clean_plain(raw, rules)
    reasons, hashes = pa.nulls(len(raw), pa.string()), _hashes(texts)
    if not is_plain.all():
        is_slow = pa.array(~is_plain)
        rest = _examined(raw.filter(is_slow), rules)
        texts, reasons, hashes = (
            pc.replace_with_mask(fast, is_slow, slow)
            for fast, slow in ((texts, rest.texts), (reasons, rest.reasons), (hashes, rest.hashes))
        )
    return Cleaned(texts, reasons, hashes)


def _examined(raw: pa.LargeBinaryArray, rules: CleaningRules) -> Cleaned:
    """One story after the other."""
    found = [examine(story, rules) for story in raw.to_pylist()]
    hashes = [story_hash(text) if reason is None else None for text, reason in found]
    return Cleaned(
        pa.array([text for text, _ in found], pa.large_string()),
        pa.array([reason for _, reason in found], pa.string()),
        pa.array(hashes, pa.binary(HASH_BYTES)),
    )


def _clean_plain(raw: pa.LargeBinaryArray, rules: CleaningRules) -> tuple[pa.LargeStringArray, Mask]:
    """All stories with their white space joined, and which of them are plain; texts of the others are meaningless."""
    # 1. find bytes beyond plain text: most stories have none, so places are fewer than a mask has bytes
    content, starts = _buffers(raw)
    low = np.flatnonzero(content < SPACE)
    is_white = _IS_WHITE[content[low]]
    high = np.flatnonzero(content >= 0x7F)
    common = _common(content, high, starts) if len(high) and not rules.normalise_quotes else high[:0]
    others = np.concatenate((low[~is_white], np.delete(high, (common[:, None] + np.arange(3)).ravel())))
    # 2. join white space
    gone, last = _white_space(content, starts)
    spaces = content.copy()
    spaces[low] = SPACE
    if rules.keep_paragraphs:
        spaces[last(low[_IS_BREAK[content[low]]])] = LINE_BREAK
    cleaned = np.delete(spaces, gone)
    ends = starts - np.searchsorted(gone, starts)  # (stories + 1,) where each cleaned story begins
    # 3. leave to `examine` what is not plain or might be rejected
    n_chars = np.diff(ends)
    if len(common):
        n_chars -= 2 * np.bincount(np.searchsorted(starts, high[common], side="right") - 1, minlength=len(raw))
    is_plain = (n_chars > 0) & (n_chars >= rules.min_chars) & (n_chars <= rules.max_chars)
    is_plain[np.searchsorted(starts, others, side="right") - 1] = False
    if rules.min_words > 1:
        is_plain &= _row_sums(cleaned <= SPACE, ends) + 1 >= rules.min_words
    texts = pa.LargeStringArray.from_buffers(len(raw), pa.py_buffer(ends), pa.py_buffer(cleaned))
    return texts, is_plain


def _common(content: Bytes, high: Places, starts: Places) -> Places:
    """Where in `high`, the places of bytes beyond ASCII, the three bytes of a character of `COMMON` begin."""
    lead, second, third = high[:-2], high[1:-1], high[2:]
    is_whole = (content[lead] == 0xE2) & (content[second] == 0x80) & _IS_COMMON[content[third]]
    found = np.flatnonzero(is_whole & (third == lead + 2))
    first, last = (np.searchsorted(starts, high[place], side="right") for place in (found, found + 2))
    in_one_story: Places = found[first == last]
    return in_one_story


def _buffers(raw: pa.LargeBinaryArray) -> tuple[Bytes, Places]:
    """The bytes of all stories, and where each begins in them."""
    starts = np.frombuffer(raw.buffers()[1], np.int64)[raw.offset : raw.offset + len(raw) + 1]
    content = np.frombuffer(raw.buffers()[2] or b"", np.uint8)[starts[0] : starts[-1]]
    return content, starts - starts[0]


def _row_sums(mask: Mask, starts: Places) -> Places:
    """How many bytes of each story are marked."""
    sums = np.add.reduceat(np.append(mask, False), starts[:-1], dtype=np.int64)
    sums[starts[1:] == starts[:-1]] = 0  # of a story without bytes, `reduceat` returns the next byte
    return sums


def _white_space(content: Bytes, starts: Places) -> tuple[Places, Callable[[Places], Places]]:
    """The places of white space that goes, and what gives for places of white space the last of their runs.

    Of `" a  b "`, one story, 0, 2 and 5 go: the last byte of each inner run stands for it.
    """
    # 1. find white space before white space of the same story
    is_white = content <= SPACE  # other bytes count too: their stories are not plain
    is_border = np.zeros(len(content) + 1, bool)
    is_border[starts] = True
    more = np.flatnonzero(is_white[:-1] & is_white[1:])
    more = more[~is_border[more + 1]]
    # 2. find the ends of runs
    breaks = np.flatnonzero(np.append(np.diff(more) != 1, True))  # the last of each run in `more`

    def last(places: Places) -> Places:
        if not len(more):
            return places
        which = np.minimum(np.searchsorted(more, places), len(more) - 1)
        ends: Places = np.where(more[which] == places, more[breaks[np.searchsorted(breaks, which)]] + 1, places)
        return ends

    # 3. a run at either end of a story goes as a whole
    filled = starts[:-1] < starts[1:]
    first, final = starts[:-1][filled], starts[1:][filled] - 1
    gone = np.concatenate((more, last(first[is_white[first]]), final[is_white[final]]))
    return np.unique(gone), last


def _hashes(texts: pa.LargeStringArray) -> pa.FixedSizeBinaryArray:
    """`splits.story_hash` of plain texts: letters of ASCII are folded, and of `COMMON` there is nothing to fold."""
    content, starts = _buffers(texts)
    lowered = memoryview(content.tobytes().translate(_FOLDED))
    borders = starts.tolist()
    name = functools.partial(hashlib.blake2b, digest_size=HASH_BYTES)
    digests = b"".join([name(lowered[start:end]).digest() for start, end in itertools.pairwise(borders)])
    return pa.FixedSizeBinaryArray.from_buffers(pa.binary(HASH_BYTES), len(texts), [None, pa.py_buffer(digests)])
