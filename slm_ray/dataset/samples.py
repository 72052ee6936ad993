"""What a training sample is, and in which order an epoch has them.

In: a token stream, the context, a seed. Out: `Samples`, which know what sample g of a run holds. Two kinds: windows of
the stream, cut anywhere, and whole stories packed into the context. Sample g is sample `g % n` of epoch `g // n`, and
the order of an epoch is a permutation that is a function of (seed, epoch) alone.
"""

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt

from slm_ray.config.schema import IGNORED_TARGET, PackingName
from slm_ray.dataset.manifest import BLOCK
from slm_ray.dataset.packing import Packing
from slm_ray.dataset.scattering import GOLDEN, Numbers, hash_bits
from slm_ray.dataset.stream import TokenStream
from slm_ray.errors import UserError

DRAWN_AT_ONCE, DRAWS_KEPT = 2048, 16
"""Samples of whole stories that are drawn together, which takes hardly longer than a few, and how often that is kept:
enough for two blocks of a mixture."""
PIECES_AT_ONCE, PIECES_KEPT = 2**14, 2**20
"""Fewer samples are drawn together where they hold more pieces of stories than these; 24 bytes are kept of each."""


def permutation(n_samples: int, seed: int, epoch: int) -> npt.NDArray[np.integer]:
    """The order of one epoch of windows: a permutation of range(n_samples) that depends on (seed, epoch) alone.

    Samples are sorted by a keyed hash of their number, so the result is the same on every machine and with every
    version of NumPy, which its own generators do not promise. It is held in 4 bytes a sample and takes 16 for the
    moment in which it is made; whole stories are scattered instead (`scattering`), which takes none.
    """
    key = hash_bits(np.array([seed], dtype=np.uint64) + GOLDEN)
    key = hash_bits(key + np.array([epoch], dtype=np.uint64))
    # an odd multiple keeps the numbers distinct, and `hash_bits` is one to one: there are no ties
    hashes = np.arange(n_samples, dtype=np.uint64)
    hashes *= GOLDEN
    hashes += key
    order: npt.NDArray[np.integer] = np.argsort(hash_bits(hashes))
    if n_samples <= 2**32:
        order = order.astype(np.uint32)
    order.setflags(write=False)
    return order


def n_samples(n_tokens: int, seq_len: int) -> int:
    """Windows of a training split of `n_tokens`; what does not fill the last one is left out.

    Raises:
        UserError: the split does not fill one window.
    """
    if n_tokens < seq_len:
        raise UserError(
            f"the training split has {n_tokens} tokens, and one sample needs {seq_len}: "
            "prepare more stories or lower model.seq_len"
        )
    return n_tokens // seq_len


def by_epoch(numbers: Numbers, n: int) -> Iterator[tuple[int, npt.NDArray[np.bool_], Numbers]]:
    """For each epoch that some samples of a run lie in: which of them do, and their places in it."""
    epochs = numbers // n
    for epoch in np.unique(epochs):
        of_epoch = epochs == epoch
        yield int(epoch), of_epoch, numbers[of_epoch] % n


@dataclass(frozen=True, kw_only=True)
class SampleOrder:
    """Which samples each step takes from a stream of `n_samples` windows."""

    n_samples: int
    batch_size: int
    seed: int

    def samples(self, step: int) -> Numbers:
        """Numbers of the windows that step `step` (from 0) sees, (batch_size,), in their global order."""
        first = step * self.batch_size
        return self.chosen(np.arange(first, first + self.batch_size))

    @functools.cached_property
    def _of_epoch(self) -> Callable[[int], npt.NDArray[np.integer]]:
        """Orders of epochs, of which those are kept that a step may need again: it may straddle two epochs, or in a
        mixture two blocks, whose samples are all of as many epochs as lie in them."""
        kept = 2 + 2 * BLOCK // self.n_samples
        return functools.lru_cache(maxsize=kept)(functools.partial(permutation, self.n_samples, self.seed))

    def chosen(self, numbers: Numbers) -> Numbers:
        """Numbers of the windows that are samples `numbers` of a run."""
        chosen = np.empty(len(numbers), dtype=np.int64)
        for epoch, of_epoch, places in by_epoch(numbers, self.n_samples):
            chosen[of_epoch] = self._of_epoch(epoch)[places]
        return chosen


@dataclass(frozen=True, eq=False)
class Rows:
    """Samples as a model takes them."""

    inputs: npt.NDArray[np.int64]
    """(rows, seq_len)"""
    targets: npt.NDArray[np.int64]
    """(rows, seq_len): the token after each input; IGNORED_TARGET where a sample is filled up."""
    places: npt.NDArray[np.int64] | None = None
    """(rows, seq_len): how far each input lies behind the beginning of its piece of a story, where there are such."""


class Samples(Protocol):
    """The training split in samples of one length."""

    @property
    def n_samples(self) -> int:
        """In an epoch."""

    def rows(self, numbers: Numbers) -> Rows:
        """The samples of a run that have these numbers, from 0 on."""

    def n_targets(self, numbers: Numbers) -> int:
        """How many tokens they predict together."""

    def describe(self) -> str:
        """One sentence: how many samples an epoch has, and what cutting and filling up cost."""


class WindowSamples:
    """Windows of seq_len + 1 tokens that lie seq_len apart, so that within an epoch each token is a target once, but
    for the remainder that does not fill a window."""

    def __init__(self, stream: TokenStream, seq_len: int, seed: int) -> None:
        """Raises: UserError when the split does not fill one window."""
        self._stream, self._seq_len = stream, seq_len
        self.n_samples = n_samples(stream.n_targets, seq_len)
        self._order = SampleOrder(n_samples=self.n_samples, batch_size=1, seed=seed)

    def rows(self, numbers: Numbers) -> Rows:
        """See `Samples`."""
        index = self._order.chosen(numbers)[:, None] * self._seq_len + np.arange(self._seq_len + 1)
        windows = self._stream.tokens[index].astype(np.int64)  # (rows, seq_len + 1)
        return Rows(windows[:, :-1], windows[:, 1:])

    def n_targets(self, numbers: Numbers) -> int:
        """See `Samples`."""
        return len(numbers) * self._seq_len

    def describe(self) -> str:
        """See `Samples`."""
        left = self._stream.n_targets - self.n_samples * self._seq_len
        return (
            f"samples: {self.n_samples:,} windows of {self._seq_len:,} tokens an epoch, cut anywhere; "
            f"{left:,} tokens at the end fill none"
        )


@dataclass(frozen=True, eq=False)
class _Drawn:
    """What some samples that follow one another in a run hold."""

    first: Numbers
    """Place of each sample's first piece in the arrays below, and where the last one ends."""
    story: Numbers
    start: Numbers
    length: Numbers
    fill: Numbers
    """Targets of each sample."""

    def pieces(self, at: int) -> Iterator[tuple[int, int, int]]:
        """Of each piece of a sample: its story, its first token there, its length."""
        own = slice(self.first[at], self.first[at + 1])
        return zip(self.story[own].tolist(), self.start[own].tolist(), self.length[own].tolist())


class StorySamples:
    """Whole stories packed into the context (`packing`); a longer story goes on in another sample."""

    def __init__(self, stream: TokenStream, seq_len: int, seed: int) -> None:
        self._stream, self._seq_len, self._seed = stream, seq_len, seed
        self.packing = Packing(stream.stories, seq_len)
        self.n_samples = self.packing.n_samples
        few = PIECES_AT_ONCE * self.n_samples // max(1, self.packing.n_pieces)
        self._at_once = min(DRAWN_AT_ONCE, max(1, few))
        kept = min(DRAWS_KEPT * DRAWN_AT_ONCE // self._at_once, PIECES_KEPT // PIECES_AT_ONCE)
        self._drawn = functools.lru_cache(maxsize=kept)(self._draw)

    def _draw(self, draw: int) -> _Drawn:
        """Epochs of a small data set are drawn together: it goes through many in a block of a mixture."""
        count = self._at_once
        epochs, places = np.divmod(np.arange(draw * count, (draw + 1) * count), self.n_samples)
        numbers = self.packing.numbers(places, self._seed, epochs)
        found = self.packing.pieces(numbers, self._seed, epochs)
        first = np.searchsorted(found.sample, np.arange(count + 1))
        return _Drawn(first, found.story, found.start, found.length, self.packing.fills(numbers))

    def _at(self, number: int) -> tuple[_Drawn, int]:
        """What was drawn with a sample of the run, and its place there."""
        draw, place = divmod(number, self._at_once)
        return self._drawn(draw), place

    def rows(self, numbers: Numbers) -> Rows:
        """See `Samples`."""
        shape = (len(numbers), self._seq_len)
        inputs = np.full(shape, self._stream.eos_id, np.int64)
        targets = np.full(shape, IGNORED_TARGET, np.int64)
        places = np.zeros(shape, np.int64)
        for row, number in enumerate(numbers.tolist()):
            drawn, at = self._at(number)
            begin = 0
            for story, start, length in drawn.pieces(at):
                end = begin + length
                inputs[row, begin:end] = self._stream.inputs_of(story, start, start + length)
                targets[row, begin:end] = self._stream.targets_of(story, start, start + length)
                places[row, begin:end] = np.arange(length)
                begin = end
            places[row, begin:] = np.arange(self._seq_len - begin)  # of what fills it up
        return Rows(inputs, targets, places)

    def n_targets(self, numbers: Numbers) -> int:
        """See `Samples`."""
        found = (self._at(number) for number in numbers.tolist())
        return sum(int(drawn.fill[at]) for drawn, at in found)

    def describe(self) -> str:
        """See `Samples`."""
        return self.packing.describe()


SAMPLES: dict[PackingName, Callable[[TokenStream, int, int], Samples]] = {
    "windows": WindowSamples,
    "stories": StorySamples,
}
