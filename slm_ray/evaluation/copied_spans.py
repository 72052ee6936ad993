"""What of the written text stands in the training data word for word: exact, in one pass and little memory.

In: written texts as tokens, blocks of training stories. Out: for each text how many of its 8-grams were found, and the
longest span that it shares with one training story.

The index is of what was written, not of the training data: a few thousand 8-grams, hashed. The training data streams
past it, a shard at a time; hits are compared token by token. So it takes no index of 475 million tokens (a suffix array
of the whole of TinyStories is 1.9 GB beside 0.95 GB of tokens, and minutes to sort), but per million tokens of a piece
2 MB of tokens, 8 MB of hashes and as much again while they are made, 16 MB for the filter, and the matching runs, each
kept once: together below 100 MB, whatever the size of the data.
"""

import dataclasses
from collections.abc import Iterator, Sequence

import numpy as np
import numpy.typing as npt

from slm_ray.evaluation.stories import StoryBlock

GRAM = 8
"""Tokens of the shortest span that counts as copied."""
PIECE_TOKENS = 2**20
"""Training tokens that are hashed at a time, and the rest of the last story."""
_FILTER_BITS = 24
_MULTIPLIERS = (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB, 0xD6E8FEB86659FD93)

Array = npt.NDArray[np.int64]
Hashes = npt.NDArray[np.uint64]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Copied:
    """How much of one text stands in the training data."""

    n_grams: int
    """8-grams of the text, by their places."""
    n_found: int
    """Those that stand in a training story."""
    longest: int
    """Tokens of the longest span that stands in one training story; 0 where none of 8 tokens does."""
    start: int
    """Where in the text that span begins."""


class CopiedSpans:
    """Collects what training stories have in common with the texts; `add` them all, then ask for `results`."""

    def __init__(self, texts: Sequence[Sequence[int]]) -> None:
        self._lengths = [len(text) for text in texts]
        grams, owners = _grams(texts)
        self._grams, kinds = np.unique(grams, axis=0, return_inverse=True)  # (G, 8)
        kinds = kinds.reshape(-1)
        self._multiplier, self._hashes = _hashed_apart(self._grams)
        self._order = np.argsort(self._hashes)
        self._filter = np.zeros(2**_FILTER_BITS, bool)
        self._filter[_slot(self._hashes)] = True
        self._found = np.zeros(len(self._grams), bool)
        self._runs: set[bytes] = set()
        self._kinds, self._owners = kinds, owners
        by_kind = np.argsort(kinds, kind="stable")
        ends = np.cumsum(np.bincount(kinds, minlength=len(self._grams)))
        self._places = np.split(by_kind, ends[:-1]) if len(self._grams) else []

    def add(self, block: StoryBlock) -> None:
        """Look for the texts in some training stories."""
        if not len(self._grams):
            return
        for first, last in _pieces(block.ends):
            self._add(block.tokens[first:last])

    def _add(self, tokens: npt.NDArray[np.unsignedinteger]) -> None:
        """No 8-gram of a text has an end-of-text token in it, so none is found across two stories."""
        if len(tokens) < GRAM:
            return
        hashes = _hash(np.lib.stride_tricks.sliding_window_view(tokens, GRAM), self._multiplier)
        places = np.flatnonzero(self._filter[_slot(hashes)])
        own = self._hashes[self._order]
        at = np.minimum(np.searchsorted(own, hashes[places]), len(own) - 1)
        is_equal = own[at] == hashes[places]
        places, kinds = places[is_equal], self._order[at[is_equal]]
        window = tokens[places[:, None] + np.arange(GRAM)]
        is_true = (window == self._grams[kinds]).all(axis=1)  # a hash proves nothing
        places, kinds = places[is_true], kinds[is_true]
        if not len(places):
            return
        self._found[kinds] = True
        for run in np.split(kinds, np.flatnonzero(np.diff(places) != 1) + 1):
            self._runs.add(run.astype(np.int32).tobytes())

    def results(self) -> list[Copied]:
        """One for each text, in order."""
        spans = self._longest_spans()
        results = []
        first = 0
        for length in self._lengths:
            count = max(length - GRAM + 1, 0)
            part = spans[first : first + count]
            found = int(self._found[self._kinds[first : first + count]].sum())
            best = int(part.max()) if count else 0
            start = int(part.argmax()) - best + 1 if best else 0
            longest = best + GRAM - 1 if best else 0
            results.append(Copied(n_grams=count, n_found=found, longest=longest, start=start))
            first += count
        return results

    def _longest_spans(self) -> Array:
        """For each 8-gram of the texts, how many in a row up to it follow each other in a training story too."""
        longest = np.zeros(len(self._kinds), np.int64)
        here = np.zeros(len(self._kinds) + 1, np.int64)  # the last stands for the one before the first
        is_first = np.append(True, np.diff(self._owners) != 0) if len(self._owners) else np.zeros(0, bool)
        for run in self._runs:
            before = np.zeros(0, np.int64)
            for kind in np.frombuffer(run, np.int32):
                places = self._places[kind]
                lengths = np.where(is_first[places], 0, here[places - 1]) + 1
                here[before] = 0
                here[places] = lengths
                longest[places] = np.maximum(longest[places], lengths)
                before = places
            here[before] = 0
        return longest


def _grams(texts: Sequence[Sequence[int]]) -> tuple[Array, Array]:
    """All 8-grams of the texts, (P, 8), text after text, and the text of each, (P,)."""
    parts, owners = [np.zeros((0, GRAM), np.int64)], []
    for number, text in enumerate(texts):
        if len(text) >= GRAM:
            parts.append(np.lib.stride_tricks.sliding_window_view(np.array(text, np.int64), GRAM))
            owners += [number] * len(parts[-1])
    return np.concatenate(parts), np.array(owners, np.int64)


def _hashed_apart(grams: Array) -> tuple[np.uint64, Hashes]:
    """A multiplier with which no two of the grams have one hash, and their hashes."""
    for multiplier in map(np.uint64, _MULTIPLIERS):
        hashes = _hash(grams, multiplier)
        if len(np.unique(hashes)) == len(grams):
            return multiplier, hashes
    raise AssertionError("two of some thousand 8-grams have one 64-bit hash four times")


def _hash(windows: npt.NDArray[np.integer], multiplier: np.uint64) -> Hashes:
    """Hashes of windows of 8 tokens, (N, 8) -> (N,): a polynomial, mixed at the end so that its top bits are used."""
    hashes = np.zeros(len(windows), np.uint64)
    for column in range(GRAM):
        hashes *= multiplier
        hashes += windows[:, column].astype(np.uint64) + np.uint64(1)
    hashes ^= hashes >> np.uint64(31)
    hashes *= multiplier
    return hashes


def _slot(hashes: Hashes) -> Hashes:
    return hashes >> np.uint64(64 - _FILTER_BITS)


def _pieces(ends: Array) -> Iterator[tuple[int, int]]:
    """Borders of pieces of whole stories, each of at least `PIECE_TOKENS` but the last."""
    first = 0
    for end in ends[1:].tolist():
        if end - first >= PIECE_TOKENS:
            yield first, end
            first = end
    if first < ends[-1]:
        yield first, int(ends[-1])
