"""Several data sets in one run, by weights, under the same contract of order.

In: samples of each data set, a share for each. Out: `MixedSamples`: sample g of the run is one of them, as a pure
function of the seed. Shares are kept exactly in every block of `BLOCK` samples: of data set k a block has
`quotas[k]` samples, the next ones of its own order, scattered over the block by a permutation that (seed, block)
chooses. So each data set goes through its own epochs, each story once in each.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from slm_ray.dataset.manifest import BLOCK
from slm_ray.dataset.samples import Rows, Samples
from slm_ray.dataset.scattering import Numbers, key_of, scattered

_OF_BLOCKS = 0x6D6978
"""Keeps the keys of blocks apart from those of epochs."""


def located(numbers: Numbers, quotas: Sequence[int], seed: int) -> tuple[Numbers, Numbers]:
    """Of samples of a run: which data set each is of, and its number in the order of that one."""
    blocks, places = numbers // BLOCK, numbers % BLOCK
    slots = scattered(places, BLOCK, key_of(seed, _OF_BLOCKS, blocks))
    ends = np.cumsum(quotas, dtype=np.int64)
    which = np.searchsorted(ends, slots, side="right").astype(np.int64)
    each = np.asarray(quotas, np.int64)[which]
    return which, blocks * each + slots - (ends[which] - each)


@dataclass(frozen=True, eq=False)
class MixedSamples:
    """Samples of several data sets."""

    names: tuple[str, ...]
    parts: tuple[Samples, ...]
    quotas: tuple[int, ...]
    seed: int

    @property
    def n_samples(self) -> int:
        """As many as all data sets have in an epoch of theirs."""
        return sum(part.n_samples for part in self.parts)

    def rows(self, numbers: Numbers) -> Rows:
        """See `Samples`."""
        which, own = located(numbers, self.quotas, self.seed)
        found = [(np.flatnonzero(which == number), part) for number, part in enumerate(self.parts)]
        filled = [(places, part.rows(own[places])) for places, part in found if len(places)]
        shape = (len(numbers), filled[0][1].inputs.shape[1])
        has_places = filled[0][1].places is not None
        result = Rows(np.empty(shape, np.int64), np.empty(shape, np.int64), np.empty(shape, np.int64))
        assert result.places is not None
        for places, rows in filled:
            result.inputs[places], result.targets[places] = rows.inputs, rows.targets
            if rows.places is not None:
                result.places[places] = rows.places
        return result if has_places else Rows(result.inputs, result.targets)

    def n_targets(self, numbers: Numbers) -> int:
        """See `Samples`."""
        which, own = located(numbers, self.quotas, self.seed)
        return sum(part.n_targets(own[which == number]) for number, part in enumerate(self.parts))

    def describe(self) -> str:
        """See `Samples`."""
        said = [
            f"{quota / BLOCK:.2%} of {name} ({part.describe().removeprefix('samples: ')})"
            for name, quota, part in zip(self.names, self.quotas, self.parts)
        ]
        return f"samples: {'; '.join(said)}"
