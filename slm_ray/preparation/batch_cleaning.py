"""Cleaning a whole batch of stories at once: the fast path of `cleaning.examine`.

In: the bytes of stories as they were read. Out: cleaned texts, reasons and hashes, equal to those that
`cleaning.examine` returns story by story. Nearly all stories of a corpus like TinyStories are plain: ASCII text in
which only white space changes. They are cleaned as one array of bytes; every other story goes through `examine`.
"""

import hashlib
import itertools
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from slm_ray.preparation.cleaning import CleaningRules, examine
from slm_ray.preparation.splits import HASH_BYTES, story_hash

Bytes = npt.NDArray[np.uint8]
Mask = npt.NDArray[np.bool_]

ROWS_AT_ONCE = 1000  # arrays of this size stay in the cache, and their memory is not given back and taken again
MAX_BATCH_BYTES = 8 * 2**20  # the arrays below take up to 20 times as much; only very long stories need more
SPACE, LINE_BREAK = np.uint8(0x20), np.uint8(0x0A)

_IS_BREAK = np.array([len(f"a{chr(byte)}b".splitlines()) > 1 for byte in range(SPACE)])
_BREAK_TO_SPACE = bytes.maketrans(b"\n", b" ")


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
    slow = np.flatnonzero(~is_plain)
    if not len(slow):
        return Cleaned(texts, pa.nulls(len(raw), pa.string()), _hashes(texts))
    rest = _examined(raw.take(pa.array(slow)), rules)
    fast = np.flatnonzero(is_plain)
    plain = texts.take(pa.array(fast))
    place = np.empty(len(raw), np.int64)  # (stories,) where each stands among fast, then slow ones
    place[fast], place[slow] = np.arange(len(fast)), len(fast) + np.arange(len(slow))
    return Cleaned(
        pa.concat_arrays([plain, rest.texts]).take(pa.array(place)),
        pa.concat_arrays([pa.nulls(len(fast), pa.string()), rest.reasons]).take(pa.array(place)),
        pa.concat_arrays([_hashes(plain), rest.hashes]).take(pa.array(place)),
    )


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
    # 1. mark bytes beyond plain text
    content, starts = _buffers(raw)
    is_other = _is_other(content)
    # 2. join white space
    keep, spaces = _white_space(content, (content <= SPACE) & ~is_other, starts, rules.keep_paragraphs)
    cleaned = spaces[keep]
    # 3. measure each cleaned story
    n_chars = _row_sums(keep, starts)
    ends = np.concatenate(([0], np.cumsum(n_chars)))  # (stories + 1,) where each cleaned story begins
    # 4. leave to `examine` what is not plain or might be rejected
    is_plain = (_row_sums(is_other, starts) == 0) & (n_chars > 0)
    is_plain &= (n_chars >= rules.min_chars) & (n_chars <= rules.max_chars)
    if rules.min_words > 1:
        is_plain &= _row_sums(cleaned <= SPACE, ends) + 1 >= rules.min_words
    texts = pa.LargeStringArray.from_buffers(len(raw), pa.py_buffer(ends), pa.py_buffer(cleaned))
    return texts, is_plain


def _buffers(raw: pa.LargeBinaryArray) -> tuple[Bytes, npt.NDArray[np.int64]]:
    """The bytes of all stories, and where each begins in them."""
    starts = np.frombuffer(raw.buffers()[1], np.int64)[raw.offset : raw.offset + len(raw) + 1]
    content = np.frombuffer(raw.buffers()[2] or b"", np.uint8)[starts[0] : starts[-1]]
    return content, starts - starts[0]


def _row_sums(mask: Mask, starts: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """How many bytes of each story are marked."""
    sums = np.add.reduceat(np.append(mask, False), starts[:-1], dtype=np.int64)
    sums[starts[1:] == starts[:-1]] = 0  # of a story without bytes, `reduceat` returns the next byte
    return sums


def _is_other(content: Bytes) -> Mask:
    """Which bytes are neither printed ASCII nor white space; `uint8` wraps, so one comparison has both ends."""
    return (content >= 0x7F) | (content < 0x09) | (content - np.uint8(0x0E) < 0x1C - 0x0E)


def _white_space(
    content: Bytes, is_white: Mask, starts: npt.NDArray[np.int64], keep_paragraphs: bool
) -> tuple[Mask, Bytes]:
    r"""Which bytes stay, and all bytes with white space replaced: the last byte of each inner run stands for it.

    Of `" a\n\n b "` stay `"a b"`, with `keep_paragraphs` `"a\nb"`.
    """
    # 1. mark where stories begin and end
    is_border = np.zeros(len(content) + 1, bool)
    is_border[starts] = True
    # 2. find runs of white space, each inside one story
    runs_on = is_white[:-1] & is_white[1:] & ~is_border[1:-1]  # (bytes - 1,) both sides belong to one run
    first, last = is_white.copy(), is_white.copy()
    first[1:] &= ~runs_on
    last[:-1] &= ~runs_on
    firsts, lasts = np.flatnonzero(first), np.flatnonzero(last)  # (runs,)
    # 3. keep what is not white, and of each inner run the last byte
    keep = ~is_white
    keep[lasts[~(is_border[firsts] | is_border[lasts + 1])]] = True
    # 4. make every white byte a space
    spaces = np.maximum(content, SPACE)  # of plain stories, nothing but white space is below
    # 5. make runs that hold a line break a line break
    if keep_paragraphs:
        n_breaks = np.concatenate(([0], np.cumsum(_IS_BREAK[np.minimum(content, SPACE - 1)])))
        spaces[lasts[n_breaks[lasts + 1] > n_breaks[firsts]]] = LINE_BREAK
    return keep, spaces


def _hashes(texts: pa.LargeStringArray) -> pa.FixedSizeBinaryArray:
    """`splits.story_hash` of plain ASCII texts."""
    content, starts = _buffers(texts)
    lowered = memoryview(content.tobytes().translate(_BREAK_TO_SPACE).lower())
    borders = starts.tolist()
    digests = b"".join(
        hashlib.blake2b(lowered[start:end], digest_size=HASH_BYTES).digest()
        for start, end in itertools.pairwise(borders)
    )
    return pa.FixedSizeBinaryArray.from_buffers(pa.binary(HASH_BYTES), len(texts), [None, pa.py_buffer(digests)])
