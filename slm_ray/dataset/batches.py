"""Shards to batches: which tokens step s of a run sees, as a pure function of the seed and the step.

In: the token stream of one split. Out: `(inputs, targets)` for one rank. Global sample g of a run is sample `g % n` of
epoch `g // n`, and step s takes the samples `[s * B, (s + 1) * B)`, whatever the number of workers; so resuming needs
nothing but the step. A sample is a window of seq_len + 1 tokens; windows lie seq_len apart, so that within an epoch
each token is a target once, but for the remainder that does not fill a window.
"""

import dataclasses
import functools
from collections.abc import Iterator

import numpy as np
import numpy.typing as npt

from slm_ray.config.schema import IGNORED_TARGET
from slm_ray.errors import UserError

Tokens = npt.NDArray[np.unsignedinteger]
Batch = tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]


def hash_bits(values: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    """Hash 64-bit integers one to one (the finalizer of SplitMix64, Steele et al., OOPSLA 2014)."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


@functools.lru_cache(maxsize=2)  # a step may straddle two epochs
def permutation(n_samples: int, seed: int, epoch: int) -> npt.NDArray[np.int64]:
    """The order of one epoch: a permutation of range(n_samples) that depends on (seed, epoch) alone.

    Samples are sorted by a keyed hash of their number, so the result is the same on every machine and with every
    version of NumPy, which its own generators do not promise.
    """
    key = hash_bits(np.array([seed], dtype=np.uint64) + np.uint64(0x9E3779B97F4A7C15))
    key = hash_bits(key + np.array([epoch], dtype=np.uint64))
    # an odd multiple keeps the numbers distinct, and `hash_bits` is one to one: there are no ties
    order = np.argsort(hash_bits(key + np.arange(n_samples, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)))
    order.setflags(write=False)
    return order


@dataclasses.dataclass(frozen=True)
class TokenStream:
    """One split as a single run of tokens that begins with an end-of-text token, as every story's beginning is seen.

    [7, 8, 0, 9, 0] with end-of-text token 0 -> the stream [0, 7, 8, 0, 9, 0], whose targets are exactly the five
    tokens.
    """

    tokens: Tokens  # (1 + n_targets,)
    n_bytes: int  # UTF-8 bytes of the split's stories

    @classmethod
    def of_split(cls, tokens: Tokens, n_bytes: int, eos_id: int) -> "TokenStream":
        """Put the end-of-text token before the split's tokens."""
        return cls(np.concatenate([np.array([eos_id], dtype=tokens.dtype), tokens]), n_bytes)

    @property
    def n_targets(self) -> int:
        """Tokens that can be predicted: all of the split's."""
        return len(self.tokens) - 1


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


@dataclasses.dataclass(frozen=True, kw_only=True)
class SampleOrder:
    """Which samples each step takes from a stream of `n_samples` windows."""

    n_samples: int
    batch_size: int
    seed: int

    def samples(self, step: int) -> npt.NDArray[np.int64]:
        """Numbers of the windows that step `step` (from 0) sees, (batch_size,), in their global order."""
        first = step * self.batch_size
        numbers = np.arange(first, first + self.batch_size)
        epochs = numbers // self.n_samples
        chosen = np.empty(self.batch_size, dtype=np.int64)
        for epoch in np.unique(epochs):
            of_epoch = epochs == epoch
            chosen[of_epoch] = permutation(self.n_samples, self.seed, int(epoch))[numbers[of_epoch] % self.n_samples]
        return chosen


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainBatches:
    """Batches of the training split for one rank of `world_size`."""

    stream: TokenStream
    seq_len: int
    order: SampleOrder
    rank: int
    world_size: int

    @classmethod
    def of_stream(
        cls, stream: TokenStream, *, seq_len: int, batch_size: int, seed: int, rank: int, world_size: int
    ) -> "TrainBatches":
        """Raises: UserError when the split does not fill one window."""
        order = SampleOrder(n_samples=n_samples(stream.n_targets, seq_len), batch_size=batch_size, seed=seed)
        return cls(stream=stream, seq_len=seq_len, order=order, rank=rank, world_size=world_size)

    def at(self, step: int) -> Batch:
        """The rank's share of step `step`: inputs and targets, each (batch_size / world_size, seq_len)."""
        share = self.order.batch_size // self.world_size
        numbers = self.order.samples(step)[self.rank * share : (self.rank + 1) * share]
        index = numbers[:, None] * self.seq_len + np.arange(self.seq_len + 1)  # (share, seq_len + 1)
        windows = self.stream.tokens[index].astype(np.int64)
        return windows[:, :-1], windows[:, 1:]


def evaluation_batches(
    stream: TokenStream, *, seq_len: int, batch_size: int, rank: int = 0, world_size: int = 1
) -> Iterator[Batch]:
    """Cover every target of the stream exactly once over all ranks, in order.

    Yields inputs and targets, each (at most batch_size, seq_len); the last window is filled up with IGNORED targets.
    """
    n_windows = -(-stream.n_targets // seq_len)
    padded = np.full(n_windows * seq_len + 1, IGNORED_TARGET, dtype=np.int64)
    padded[: len(stream.tokens)] = stream.tokens
    for first in range(rank * batch_size, n_windows, world_size * batch_size):
        starts = np.arange(first, min(first + batch_size, n_windows)) * seq_len
        windows = padded[starts[:, None] + np.arange(seq_len + 1)]  # (b, seq_len + 1)
        yield np.maximum(windows[:, :-1], 0), windows[:, 1:]
