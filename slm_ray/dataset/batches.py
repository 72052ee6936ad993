"""Shards to batches: which tokens step s of a run sees, as a pure function of the seed and the step.

In: the token stream of one split. Out: a `Batch` for one rank. Step s takes the samples `[s * B, (s + 1) * B)` of a
run's order, whatever the number of workers; so resuming needs nothing but the step. What a sample is, and which one
comes when, `samples` says.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from slm_ray.config.schema import IGNORED_TARGET, PackingName
from slm_ray.dataset.samples import SAMPLES, Samples
from slm_ray.dataset.stream import TokenStream


@dataclass(frozen=True, eq=False)
class Batch:
    """A rank's share of a step."""

    inputs: npt.NDArray[np.int64]
    """(rows, seq_len)"""
    targets: npt.NDArray[np.int64]
    """(rows, seq_len): the token after each input; IGNORED_TARGET where a sample is filled up."""
    places: npt.NDArray[np.int64] | None
    """(rows, seq_len): how far each input lies behind the beginning of its piece of a story; None of windows."""
    n_targets: int
    """Targets that count, of the whole step over all ranks."""


@dataclass(frozen=True, kw_only=True)
class TrainBatches:
    """Batches of the training split for one rank of `world_size`."""

    samples: Samples
    batch_size: int
    rank: int
    world_size: int

    @classmethod
    def of_stream(
        cls,
        stream: TokenStream,
        *,
        seq_len: int,
        batch_size: int,
        seed: int,
        rank: int,
        world_size: int,
        packing: PackingName = "windows",
    ) -> "TrainBatches":
        """Raises: UserError when the split does not fill one sample."""
        samples = SAMPLES[packing](stream, seq_len, seed)
        return cls(samples=samples, batch_size=batch_size, rank=rank, world_size=world_size)

    def at(self, step: int) -> Batch:
        """The rank's share of step `step`, (batch_size / world_size) samples."""
        share, first = self.batch_size // self.world_size, step * self.batch_size
        numbers = np.arange(first, first + self.batch_size)
        own = self.samples.rows(numbers[self.rank * share : (self.rank + 1) * share])
        return Batch(own.inputs, own.targets, own.places, self.samples.n_targets(numbers))


def evaluation_batches(
    stream: TokenStream, *, seq_len: int, batch_size: int, rank: int = 0, world_size: int = 1
) -> Iterator[tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]]:
    """Cover every target of the stream exactly once over all ranks, in order.

    Yields inputs and targets, each (at most batch_size, seq_len); the last window is filled up with IGNORED targets.
    """
    n_windows = -(-stream.n_targets // seq_len)
    for first in range(rank * batch_size, n_windows, world_size * batch_size):
        last = min(first + batch_size, n_windows)
        padded = np.full((last - first) * seq_len + 1, IGNORED_TARGET, dtype=np.int64)
        part = stream.tokens[first * seq_len : last * seq_len + 1]
        padded[: len(part)] = part
        windows = padded[np.arange(last - first)[:, None] * seq_len + np.arange(seq_len + 1)]  # (b, seq_len + 1)
        yield np.maximum(windows[:, :-1], 0), windows[:, 1:]
