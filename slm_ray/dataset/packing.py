"""Whole stories in samples of one length: which pieces lie together, as a function of the stories' lengths alone.

In: how many stories there are of each length, the context. Out: a `Packing`: samples that begin at a story's beginning,
or go on with one that was longer than the context, filled up by best fit. `samples` says which stories they are in an
epoch. Nothing here grows with the number of stories: lengths are counted, and equal samples are described once.
"""

import bisect
from collections import Counter
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from slm_ray.dataset.scattering import Numbers, key_of, scattered


@dataclass(frozen=True, kw_only=True, eq=False)
class StoryIndex:
    """The stories of a split, found by their length."""

    ends: npt.NDArray[np.int64]
    """(n + 1,): story i has the tokens ends[i] to ends[i + 1] of the split."""
    by_length: npt.NDArray[np.uint32]
    """(n,): numbers of the stories, the shortest first, equal ones in their order."""
    lengths: npt.NDArray[np.int64]
    """(d,): the lengths that there are, ascending, end-of-text token included."""
    counts: npt.NDArray[np.int64]
    """(d,): how many stories have each."""

    @classmethod
    def of_ends(cls, ends: npt.NDArray[np.int64]) -> "StoryIndex":
        """Sort the stories; this takes a moment's memory of 20 bytes a story."""
        lengths = np.diff(ends)
        by_length = np.argsort(lengths, kind="stable").astype(np.uint32)
        distinct, counts = np.unique(lengths, return_counts=True)
        return cls(ends=ends, by_length=by_length, lengths=distinct, counts=counts.astype(np.int64))

    def __len__(self) -> int:
        return len(self.by_length)


@dataclass(frozen=True, eq=False)
class Pieces:
    """Pieces of stories, in the order in which they lie in some samples."""

    sample: Numbers
    """(k,): which of the samples that were asked for has it; ascending."""
    story: Numbers
    """(k,): number of the story in the split."""
    start: Numbers
    """(k,): its first token in the story; above 0 where the story goes on."""
    length: Numbers
    """(k,)"""


@dataclass
class _Alike:
    """Samples that hold pieces of the same lengths."""

    count: int
    pattern: list[int] = field(default_factory=list)


def best_fit(counts: dict[int, int], seq_len: int) -> list[tuple[int, list[int]]]:
    """Best-fit decreasing: each piece goes where it leaves the least room, the longest first.

    counts: pieces by length, of 1 to seq_len. Returns (how many samples, the lengths in each). The same as placing one
    piece after another, but samples that are alike are filled together, so it takes no longer for millions.
    {5: 2, 3: 3}, 8 -> [(2, [5, 3]), (1, [3])]
    """
    by_room: dict[int, list[_Alike]] = {}
    rooms: list[int] = []  # the keys with something in them, ascending
    full: list[_Alike] = []

    def put(alike: _Alike, room: int) -> None:
        if room == 0:
            full.append(alike)
            return
        if room not in by_room:
            bisect.insort(rooms, room)
        by_room.setdefault(room, []).append(alike)

    for length in sorted(counts, reverse=True):
        left = counts[length]
        while left:
            place = bisect.bisect_left(rooms, length)
            if place == len(rooms):
                room, alike = seq_len, _Alike(-(-left // (seq_len // length)))
            else:
                room = rooms[place]
                alike = by_room[room].pop()
                if not by_room[room]:
                    del by_room[room], rooms[place]
            each = room // length  # once one is in, the same sample is the best fit for the next
            whole = min(alike.count, left // each)
            rest = min(left - whole * each, each - 1) if whole < alike.count else 0
            untouched = alike.count - whole - (rest > 0)
            if whole:
                put(_Alike(whole, alike.pattern + [length] * each), room - each * length)
            if rest:
                put(_Alike(1, alike.pattern + [length] * rest), room - rest * length)
            if untouched:
                put(_Alike(untouched, alike.pattern), room)
            left -= whole * each + rest
    return [(alike.count, alike.pattern) for alike in full + [one for room in rooms for one in by_room[room]]]


@dataclass(frozen=True, eq=False)
class _Sources:
    """Which stories have the pieces of each length: pieces are numbered by their length, then by that of the story."""

    piece: Numbers
    """(m,): length of the pieces of this entry."""
    story: Numbers
    """(m,): length of the stories that have them."""
    each: Numbers
    """(m,): how many a story has of them."""
    first_story: Numbers
    """(m,): place in `by_length` of the first of these stories."""
    first: Numbers
    """(m + 1,): number of the entry's first piece."""


class Packing:
    """Samples of whole stories. A story of n tokens takes n places: its end-of-text token is its last target."""

    def __init__(self, stories: StoryIndex, seq_len: int) -> None:
        self.stories, self.seq_len = stories, seq_len
        self._sources = _sources(stories, seq_len)
        counts: Counter[int] = Counter()
        for length, n_pieces in zip(self._sources.piece.tolist(), np.diff(self._sources.first).tolist()):
            counts[length] += n_pieces
        alike = best_fit(counts, seq_len)
        patterns = [pattern for _, pattern in alike]
        sizes = np.array([len(pattern) for pattern in patterns], np.int64)
        samples = np.array([count for count, _ in alike], np.int64)
        self._first_sample = np.concatenate([[0], np.cumsum(samples)])  # (groups + 1,)
        self._first_slot = np.concatenate([[0], np.cumsum(sizes)])  # (groups + 1,)
        self._slot_length = np.array([length for pattern in patterns for length in pattern], np.int64)
        self._slot_rank = self._ranks(alike)
        self._fill = np.array([sum(pattern) for pattern in patterns], np.int64)
        classes = np.array(sorted(counts), np.int64)
        self._class_length, self._class_size = classes, np.array([counts[one] for one in classes.tolist()], np.int64)
        self._class_first = np.concatenate([[0], np.cumsum(self._class_size)])
        self._slot_class = np.searchsorted(classes, self._slot_length)

    @staticmethod
    def _ranks(alike: list[tuple[int, list[int]]]) -> Numbers:
        """Of each slot, which of the pieces of its length the first sample of its group has there."""
        used: Counter[int] = Counter()
        ranks = []
        for count, pattern in alike:
            for length in pattern:
                ranks.append(used[length])
                used[length] += count
        return np.array(ranks, np.int64)

    @property
    def n_samples(self) -> int:
        """In an epoch, the same in every one."""
        return int(self._first_sample[-1])

    @property
    def n_pieces(self) -> int:
        """Of stories, in an epoch: each that is no longer than the context is one."""
        return int(self._class_first[-1])

    @property
    def n_tokens(self) -> int:
        """Targets of an epoch: all tokens of the split."""
        return int(self.stories.lengths @ self.stories.counts)

    @property
    def n_cut_stories(self) -> int:
        """Stories that are longer than the context."""
        return int(self.stories.counts[self.stories.lengths > self.seq_len].sum())

    def describe(self) -> str:
        """One sentence on what packing makes of the split."""
        n_places = self.n_samples * self.seq_len
        return (
            f"samples: {len(self.stories):,} whole stories in {self.n_samples:,} samples of {self.seq_len:,} tokens an "
            f"epoch; {self.n_cut_stories:,} longer ones go on in another sample; {1 - self.n_tokens / n_places:.2%} of "
            "all places are left empty"
        )

    def numbers(self, places: Numbers, seed: int, epoch: int | Numbers) -> Numbers:
        """Numbers of the samples at some places of an epoch's order: a permutation that (seed, epoch) chooses.

        epoch: one of all places, or that of each, (n,).
        """
        return scattered(places, self.n_samples, key_of(seed, epoch))

    def fills(self, numbers: Numbers) -> Numbers:
        """Tokens in each sample."""
        return self._fill[self._groups(numbers)]

    def _groups(self, numbers: Numbers) -> Numbers:
        return np.searchsorted(self._first_sample, numbers, side="right") - 1

    def pieces(self, numbers: Numbers, seed: int, epoch: int | Numbers) -> Pieces:
        """What some samples hold in an epoch, or each in one of its own, (n,).

        A story that goes on stands first, the longest of each kind before. Which lengths lie together is the same in
        each epoch, which stories of these lengths is not.
        """
        groups = self._groups(numbers)
        sizes = self._first_slot[groups + 1] - self._first_slot[groups]
        sample = np.repeat(np.arange(len(numbers)), sizes)
        before = np.cumsum(sizes) - sizes
        slot = np.arange(len(sample)) - before[sample] + self._first_slot[groups][sample]
        rank = self._slot_rank[slot] + (numbers - self._first_sample[groups])[sample]
        kind, length = self._slot_class[slot], self._slot_length[slot]
        keys = key_of(seed, np.broadcast_to(epoch, numbers.shape)[sample], length)
        rank = scattered(rank, self._class_size[kind], keys)
        story, start = self._origin(self._class_first[kind] + rank)
        order = np.lexsort((np.arange(len(sample)), start == 0, sample))
        return Pieces(sample, story[order], start[order], length[order])

    def _origin(self, piece: Numbers) -> tuple[Numbers, Numbers]:
        """Story and first token of pieces, by their numbers."""
        known = self._sources
        entry = np.searchsorted(known.first, piece, side="right") - 1
        offset, each = piece - known.first[entry], known.each[entry]
        story = self.stories.by_length[known.first_story[entry] + offset // each].astype(np.int64)
        is_whole_context = known.piece[entry] == self.seq_len
        rest = known.story[entry] - known.piece[entry]
        return story, np.where(is_whole_context, offset % each * self.seq_len, rest)


def _sources(stories: StoryIndex, seq_len: int) -> _Sources:
    lengths, counts = stories.lengths, stories.counts
    first = np.cumsum(counts) - counts
    rest, full = lengths % seq_len, lengths // seq_len
    has_rest, has_full = rest > 0, full > 0
    piece = np.concatenate([rest[has_rest], np.full(int(has_full.sum()), seq_len, np.int64)])
    story = np.concatenate([lengths[has_rest], lengths[has_full]])
    each = np.concatenate([np.ones(int(has_rest.sum()), np.int64), full[has_full]])
    first_story = np.concatenate([first[has_rest], first[has_full]])
    n_pieces = each * np.concatenate([counts[has_rest], counts[has_full]])
    order = np.lexsort((story, piece))
    starts = np.concatenate([[0], np.cumsum(n_pieces[order])])
    return _Sources(piece[order], story[order], each[order], first_story[order], starts)
