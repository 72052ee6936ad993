"""Numbers that the report states about a data set: how stories fit a sequence length, and Zipf's law.

In: histograms and counts of a `DataSummary`. Out: a few numbers. Used by `report` and `figures`; pure functions.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

SHORTEST_SEQ_LEN = 64
RARE = 10
"""A token that occurs less often will hardly be learned."""
FIT_RANKS = (10, 1000)
"""Ranks of Zipf's fit: before, function words lie below the line; after, the small vocabulary of a corpus ends."""
FIT_POINTS = 100
MIN_FIT_RANKS = 20


@dataclass(frozen=True, kw_only=True)
class ZipfFit:
    """The line `log10(count) = intercept + slope * log10(rank)` for the ranks from `first` to `last`."""

    slope: float
    intercept: float
    first: int
    last: int
    n_ranks: int  # fitted, between them

    def count_at(self, rank: int) -> float:
        """Occurrences that the line expects of the word of this rank."""
        return float(10 ** (self.intercept + self.slope * np.log10(rank)))


def suggested_seq_len(token_lengths: Mapping[int, int]) -> int:
    """The smallest of 64, 128, 256, 512, ... that holds 95 % of the stories, end-of-text token included."""
    p95 = percentile(token_lengths, 0.95)
    seq_len = SHORTEST_SEQ_LEN
    while seq_len < p95:
        seq_len *= 2
    return seq_len


def share_within(lengths: Mapping[int, int], limit: int) -> float:
    """Share of stories, 0 to 1, that are at most `limit` long: of `{3: 1, 5: 3}` at 4 it is 0.25."""
    total = sum(lengths.values())
    return sum(count for length, count in lengths.items() if length <= limit) / total if total else 0.0


def mean(lengths: Mapping[int, int]) -> float:
    """The mean length: of `{3: 1, 5: 3}` it is 4.5."""
    return sum(length * count for length, count in lengths.items()) / max(1, sum(lengths.values()))


def fit_zipf(counts: npt.NDArray[np.int64]) -> ZipfFit | None:
    """Fit Zipf's law (G. K. Zipf, 1949) to counts in falling order; None where too few words occur.

    Least squares on the logarithms, over ranks spaced evenly in the logarithm, so that each decade weighs the same.
    """
    first, last = FIT_RANKS[0], min(FIT_RANKS[1], len(counts))
    if last - first < MIN_FIT_RANKS:
        return None
    ranks = np.unique(np.geomspace(first, last, FIT_POINTS).round().astype(np.int64))
    slope, intercept = np.polyfit(np.log10(ranks), np.log10(counts[ranks - 1]), 1)
    return ZipfFit(slope=float(slope), intercept=float(intercept), first=first, last=last, n_ranks=len(ranks))


def percentile(histogram: Mapping[int, int], share: float) -> int:
    """The smallest value that at least `share` of all do not exceed: of `{3: 1, 5: 3}` at 0.5 it is 5."""
    left = share * sum(histogram.values())
    for value in sorted(histogram):
        left -= histogram[value]
        if left <= 0:
            return value
    return max(histogram, default=0)
