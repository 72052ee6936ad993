"""Stories that nearly equal another one, by MinHash: a kept story of 0.8 common word 5-grams is hardly new text.

In: cleaned ranges. Out: the rows to leave out, by range. Called by `pipelines/transforms.py`; only signatures
(`N_HASHES` bytes) and positions (8 bytes) leave a range, 136 bytes a story: 286 MB for the 2.1 million TinyStories.

1. Each story becomes the set of its 5-grams of `words`, and the set a signature: the lowest value of each of 128 hash
   functions (Broder 1997, "On the resemblance and containment of documents"), of which 8 bits are kept (Li and König
   2010, "b-bit minwise hashing"). Two signatures agree in about the share of 5-grams that the sets have in common.
2. All signatures meet in one place, where they take 310 bytes a story at the peak. They are so small that this takes
   less to shuffle than the usual way, each band's hash under a key of its own (16 bytes for each of 16 bands and no
   signature to check it by), and the groups have to be joined in one place anyhow. It takes 8 s for 2.1 million
   stories; the limit is that place's memory.
3. Stories that agree in all rows of a band are candidates (locality-sensitive hashing: Leskovec et al., "Mining of
   Massive Datasets", section 3.4). Only those whose whole signatures are similar enough become one group.
4. Of each group, joined over all bands, the story with the lowest position stays, and then of those that are not
   similar to it, and so on: what is left out is similar to a story that stays, not only to one that is left out.

Own code, because `datasketch` takes one story at a time from Python: 30 times the time of `signatures`.
"""

import hashlib
from collections.abc import Iterable, Iterator

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from slm_ray.errors import UserError
from slm_ray.preparation.duplicates import Positions, row_positions, rows_by_range
from slm_ray.preparation.words import unspaced_starts
from slm_ray.sources.reading import Item

Signatures = npt.NDArray[np.uint8]
"""(stories, N_HASHES): 8 bits of the lowest value of each hash function."""

N_HASHES = 128  # the estimate's standard error is 0.035 where 0.8 of two sets are common
SHINGLE_WORDS = 5
LOWEST_THRESHOLD = 0.1  # below, almost all stories would be candidates
N_NEIGHBOURS = 16  # a story is compared with so many before it that share its band

_MIN_RECALL = 0.9  # of pairs that are exactly as similar as the threshold; more of those above it
_STORIES_AT_ONCE = 256  # 40,000 5-grams: the arrays of one hash function stay in the processor's cache
_BYTES_AT_ONCE = 2**20  # of text; the arrays below take 100 times as much where each character is a word
_PAIRS_AT_ONCE = 2**15

_Ints = npt.NDArray[np.int64]
_Words = npt.NDArray[np.uint64]

_RANDOM = hashlib.shake_128(b"near duplicates").digest(8 * 256 + 4 * 2 * N_HASHES)  # fixed, the same on every machine
_LETTERS = np.frombuffer(_RANDOM, "<u8", 256).astype(np.uint64)  # a number for each byte
_FACTORS, _SUMMANDS = np.frombuffer(_RANDOM, "<u4", 2 * N_HASHES, 8 * 256).astype(np.uint32).reshape(2, N_HASHES)
_FACTORS |= np.uint32(1)
_BASE = 0x9E3779B97F4A7C15  # of the polynomial that hashes text; odd, so it has an inverse
_LETTERS[ord("A") : ord("Z") + 1] = _LETTERS[ord("a") : ord("z") + 1]
_LETTERS[ord("\n")] = _LETTERS[ord(" ")]


def signatures(texts: pa.StringArray | pa.LargeStringArray) -> Signatures:
    """The MinHash signatures of cleaned texts, whose words stand apart by one space or line break.

    Words, those of `words`, are compared without ASCII case and with their punctuation. A text of fewer than five is
    one shingle, the whole. 4,000 TinyStories (3.2 MB) take 0.1 s on one core, with datasketch 3 s.
    """
    content, borders = _bytes_and_borders(texts)
    lowest = np.empty((N_HASHES, len(texts)), np.uint32)
    first = 0
    while first < len(texts):
        # 1. hash each shingle of some texts
        last = int(np.searchsorted(borders, borders[first] + _BYTES_AT_ONCE, side="right")) - 1
        last = min(max(last, first + 1), first + _STORIES_AT_ONCE, len(texts))
        shingles, starts = _shingles(
            content[borders[first] : borders[last]], borders[first : last + 1] - borders[first]
        )
        # 2. take the lowest value of each function
        _lowest_values(shingles, starts[:-1], lowest[:, first:last])
        first = last
    # 3. keep 8 bits of each
    mixed = lowest * np.uint32(0x9E3779B1) >> np.uint32(24)  # 8 bits that depend on all 32
    return np.ascontiguousarray(mixed.T.astype(np.uint8))


def similarity(one: Signatures, other: Signatures) -> npt.NDArray[np.float64]:
    """The estimated share of common shingles (Jaccard similarity) of pairs of signatures, row by row.

    Corrected for the 1 in 256 of 8-bit values that agree by chance; so below 0 for some that have nothing in common.
    """
    agreeing: npt.NDArray[np.float64] = np.mean(one == other, axis=1)
    by_chance = 1 / 256
    return (agreeing - by_chance) / (1 - by_chance)


def band_shape(threshold: float) -> tuple[int, int]:
    """`(bands, rows of each)`: the fewest candidates that miss at most a tenth of the pairs at the threshold.

    Pairs of similarity s become candidates with the chance `1 - (1 - s**rows)**bands`, an S-curve that is made to rise
    just below the threshold: for 0.8 16 bands of 8 rows, which find 95 % of the pairs at 0.8, all but 1 in 8,000
    at 0.9, and 6 % of those at 0.5, which the whole signatures then tell apart.

    Raises:
        UserError: the threshold is not from 0.1 to 1.
    """
    if not LOWEST_THRESHOLD <= threshold <= 1:
        raise UserError(f"near_duplicates ({threshold}) must be a similarity from {LOWEST_THRESHOLD} to 1, such as 0.8")
    found = [
        rows for rows in range(1, N_HASHES // 2 + 1) if 1 - (1 - threshold**rows) ** (N_HASHES // rows) >= _MIN_RECALL
    ]
    return N_HASHES // found[-1], found[-1]


def bands(found: Signatures, threshold: float) -> Iterator[_Words]:
    """For each band one number a story (stories,), equal where all its rows are."""
    n_bands, n_rows = band_shape(threshold)
    for band in range(n_bands):
        keys = np.zeros(len(found), np.uint64)
        for column in range(band * n_rows, (band + 1) * n_rows):
            keys = (keys ^ found[:, column]) * np.uint64(0x100000001B3)  # FNV-1a
        yield keys


def candidates(keys: _Words) -> Iterator[tuple[_Ints, _Ints]]:
    """Pairs `(stories, earlier ones)` that share a band's number, one batch for each distance between them.

    Each story is paired with at most `N_NEIGHBOURS` before it in its bucket. So a bucket of 50,000 copies of one form
    letter costs 50,000 times that, not their square, and is still linked, each to its neighbour. What may be
    missed: in a large bucket of stories that differ, two similar ones with more than 16 others between them, if
    they share no other band either.
    """
    # 1. bring equal keys together
    order = np.argsort(keys, kind="stable")  # within a bucket the lower story stays first
    ordered = keys[order]
    # 2. drop stories that are alone in their bucket
    is_shared = np.zeros(len(keys) + 1, bool)
    is_shared[1:-1] = ordered[1:] == ordered[:-1]
    crowded = is_shared[:-1] | is_shared[1:]  # few: most stories are alone
    order, ordered = order[crowded], ordered[crowded]
    # 3. pair each story with those shortly before it
    for distance in range(1, min(N_NEIGHBOURS, len(order) - 1) + 1):
        pairs = np.flatnonzero(ordered[distance:] == ordered[:-distance])
        if not len(pairs):
            return
        yield order[pairs + distance], order[pairs]


def lowest_of_group(found: Signatures, threshold: float) -> _Ints:
    """For each story the first of its group (stories,); itself where it is alone.

    Groups are joined over chains: if A is similar to B and B to C, the three are one.

    Raises:
        UserError: the threshold is not from 0.1 to 1.
    """
    group = np.arange(len(found))
    for keys in bands(found, threshold):
        for one, other in candidates(keys):
            apart = np.flatnonzero(group[one] != group[other])  # the others are joined already
            group = _joined(group, *_similar(found, one[apart], other[apart], threshold))
    return group


def similar_kept(found: Signatures, group: _Ints, threshold: float) -> _Ints:
    """For each story the one that stays in its place (stories,); itself where it stays.

    `group` is that of `lowest_of_group`. In each the first story stays and those similar to it leave; of the rest the
    first stays, and so on. A chain of 300 stories, each a little other than the one before, is not one story.
    """
    # 1. begin with all stories of groups of two or more
    kept = np.arange(len(found))
    sizes = np.bincount(group, minlength=len(found))
    left = np.flatnonzero(sizes[group] > 1)
    while len(left):
        # 2. the first story left of each group stays
        _, firsts, of_group = np.unique(group[left], return_index=True, return_inverse=True)
        leaders = left[firsts][of_group]  # for each story left the first one left of its group
        # 3. those similar to it leave
        leaving, their_leaders = _similar(found, left, leaders, threshold)
        kept[leaving] = their_leaders
        # 4. go on with the rest
        left = left[(kept[left] == left) & (left != leaders)]
    return kept


def sign_rows(item: Item) -> Iterator[tuple[int, tuple[Positions, Signatures]]]:
    """`(0, (positions, signatures))` of the kept rows of a range: all that is shuffled, to the one key."""
    part, batch = item
    rows = np.flatnonzero(batch["reason"].is_null().to_numpy(zero_copy_only=False))
    if len(rows):
        yield 0, (row_positions(part, rows), signatures(batch["text"].take(pa.array(rows))))


def find_near_duplicates(
    group: tuple[int, Iterable[tuple[Positions, Signatures]]], threshold: float
) -> Iterator[tuple[int, _Ints]]:
    """`(range number, rows)` of all stories of which a similar one with a lower position stays.

    Stories are put in order of their positions first, so the order in which ranges arrive changes nothing.
    """
    parts = sorted(group[1], key=lambda part: int(part[0][0]))  # ranges hold their rows in order, and do not overlap
    positions = np.concatenate([positions for positions, _ in parts])
    found = np.concatenate([found for _, found in parts])
    kept = similar_kept(found, lowest_of_group(found, threshold), threshold)
    yield from rows_by_range(positions[kept != np.arange(len(kept))])


def _bytes_and_borders(texts: pa.StringArray | pa.LargeStringArray) -> tuple[npt.NDArray[np.uint8], _Ints]:
    """The bytes of all texts, and where each begins in them (texts + 1,)."""
    width = np.int64 if pa.types.is_large_string(texts.type) else np.int32
    _, offsets, content = texts.buffers()
    borders = np.frombuffer(offsets, width)[texts.offset : texts.offset + len(texts) + 1].astype(np.int64)
    return np.frombuffer(content or b"", np.uint8)[borders[0] : borders[-1]], borders - borders[0]


def _shingles(content: npt.NDArray[np.uint8], borders: _Ints) -> tuple[npt.NDArray[np.uint32], _Ints]:
    """A hash of each 5-gram of words, text after text, and where those of each text begin (texts + 1,)."""
    # 1. number the words: each ends at a space, at its text's end, or beside a character that is a word by itself
    is_space = (content == ord(" ")) | (content == ord("\n"))
    spaces, seams = np.flatnonzero(is_space), _seams(content, is_space, borders)
    ends = np.sort(np.concatenate((spaces, seams)), kind="stable") if len(seams) else spaces
    words = np.searchsorted(ends, borders) + np.arange(len(borders))  # (texts + 1,) the first word of each
    # 2. find where each word begins and ends
    first_bytes = np.sort(np.concatenate((borders[:-1], spaces + 1, seams)), kind="stable")  # (words,)
    last_bytes = np.sort(np.concatenate((ends, borders[1:])), kind="stable")
    # 3. count the shingles of each text, at least one
    n_shingles = np.maximum(np.diff(words) - (SHINGLE_WORDS - 1), 1)
    starts = np.concatenate(([0], np.cumsum(n_shingles)))
    # 4. find first and last word of each shingle
    begin = np.arange(starts[-1]) + np.repeat(words[:-1] - starts[:-1], n_shingles)  # (shingles,) their first words
    end = np.minimum(begin + (SHINGLE_WORDS - 1), np.repeat(words[1:] - 1, n_shingles))  # (shingles,)
    # 5. hash the bytes from one to the other
    return _hash_spans(content, first_bytes[begin], last_bytes[end]), starts


def _seams(content: npt.NDArray[np.uint8], is_space: npt.NDArray[np.bool_], borders: _Ints) -> _Ints:
    """Where one word ends and the next begins without a space between them, as in Chinese."""
    seams = np.unique(np.concatenate(unspaced_starts(content)))
    seams = seams[(seams > 0) & (seams < len(content))]
    seams = seams[~(is_space[seams] | is_space[seams - 1])]
    return np.setdiff1d(seams, borders, assume_unique=True) if len(seams) else seams


def _hash_spans(content: npt.NDArray[np.uint8], begin: _Ints, end: _Ints) -> npt.NDArray[np.uint32]:
    """A hash of each `content[begin:end]`: a polynomial in the bytes' random numbers modulo 2**64, then mixed.

    Made from prefix sums, so overlapping spans cost nothing extra; the inverse base makes the hash independent of where
    a span begins.
    """
    # 1. sum up byte i times base**i
    sums = np.zeros(len(content) + 1, np.uint64)  # (bytes + 1,)
    np.cumsum(_LETTERS[content] * _powers(_BASE, len(content)), out=sums[1:])
    # 2. subtract, and divide by the power where the span begins
    spans = (sums[end] - sums[begin]) * _powers(pow(_BASE, -1, 2**64), len(content) + 1)[begin]
    # 3. mix the bits, keep the upper half
    spans ^= spans >> np.uint64(33)
    spans *= np.uint64(0xFF51AFD7ED558CCD)  # the mixing step of MurmurHash3
    return (spans >> np.uint64(32)).astype(np.uint32)


def _powers(base: int, n: int) -> _Words:
    """1, base, base**2, ... modulo 2**64, n of them."""
    powers = np.full(n, base, np.uint64)
    powers[:1] = 1
    return np.cumprod(powers, dtype=np.uint64)


def _lowest_values(shingles: npt.NDArray[np.uint32], starts: _Ints, lowest: npt.NDArray[np.uint32]) -> None:
    """Fill `lowest` (N_HASHES, texts) with the lowest value of each function `a * shingle + b` modulo 2**32."""
    values = np.empty_like(shingles)
    for row, (factor, summand) in enumerate(zip(_FACTORS, _SUMMANDS, strict=True)):
        np.multiply(shingles, factor, out=values)
        np.add(values, summand, out=values)
        np.minimum.reduceat(values, starts, out=lowest[row])


def _similar(found: Signatures, one: _Ints, other: _Ints, threshold: float) -> tuple[_Ints, _Ints]:
    """The pairs that are estimated to be at least as similar as the threshold."""
    pieces = range(0, len(one), _PAIRS_AT_ONCE)
    estimates = [
        similarity(found[one[at : at + _PAIRS_AT_ONCE]], found[other[at : at + _PAIRS_AT_ONCE]]) for at in pieces
    ]
    close = np.concatenate([np.zeros(0), *estimates]) >= threshold
    return one[close], other[close]


def _joined(group: _Ints, one: _Ints, other: _Ints) -> _Ints:
    """Groups after each pair became one: union-find, all pairs at once.

    Repeated, because a group that is in several pairs is hung below only one of them in a round.
    """
    while len(one):
        # 1. drop pairs that are one group already
        low, high = np.minimum(group[one], group[other]), np.maximum(group[one], group[other])
        apart = low != high
        one, other, low, high = one[apart], other[apart], low[apart], high[apart]
        # 2. hang the higher group below the lower
        np.minimum.at(group, high, low)
        # 3. look up every story's new first
        while np.any((first := group[group]) != group):
            group = first
    return group
