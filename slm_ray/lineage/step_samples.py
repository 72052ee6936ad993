"""The stories that the samples of a step are made of, whatever a sample is and however many data sets there are.

In: what a run took (data set or mixture, seed, batch size, context, packing) and a step. Out: for each sample its
number, its epoch, the data set that it is of, and its stories. By the order contract of `dataset.batches`.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from slm_ray.config.schema import PackingName
from slm_ray.dataset.manifest import Manifest, MixedManifest, data_sets
from slm_ray.dataset.mapping.mapped import story_index
from slm_ray.dataset.mixture import located
from slm_ray.dataset.packing import Packing
from slm_ray.dataset.samples import SampleOrder, by_epoch, n_samples
from slm_ray.dataset.scattering import Numbers
from slm_ray.dataset.windows import StoryPart, piece_parts, story_parts
from slm_ray.storage import StoragePath


@dataclass(frozen=True, kw_only=True)
class NamedSample:
    """One sample of a step."""

    number: int
    """Of windows in the order of the split's text, of whole stories as they are packed; from 0."""
    epoch: int
    """Of its data set, from 0."""
    folder: str
    """Its data set."""
    manifest: Manifest
    parts: list[StoryPart]


@dataclass(frozen=True, kw_only=True)
class Taken:
    """How a run took its samples."""

    data: str
    manifest: Manifest
    seq_len: int
    packing: PackingName
    batch_size: int
    seed: int

    def at(self, step: int) -> list[NamedSample]:
        """The samples of a step (from 1), in their global order.

        Raises:
            UserError: a shard of theirs is missing, altered, or not as its manifest counts it.
        """
        numbers = np.arange((step - 1) * self.batch_size, step * self.batch_size)
        which, own = np.zeros_like(numbers), numbers
        if isinstance(self.manifest, MixedManifest):
            which, own = located(numbers, [part.quota for part in self.manifest.parts], self.seed)
        found: dict[int, NamedSample] = {}
        for number, (folder, manifest) in enumerate(data_sets(self.data, self.manifest)):
            places = np.flatnonzero(which == number)
            if len(places):
                named = self._named(folder, manifest, own[places])
                found |= zip(places.tolist(), named, strict=True)
        return [found[place] for place in range(self.batch_size)]

    def _named(self, folder: str | StoragePath, manifest: Manifest, numbers: Numbers) -> list[NamedSample]:
        """Samples of one data set by their numbers in its own order, which need not ascend."""
        draw = self._packed if self.packing == "stories" else self._cut
        named: dict[int, NamedSample] = {}
        for place, number, epoch, parts in draw(folder, manifest, numbers):
            named[place] = NamedSample(number=number, epoch=epoch, folder=str(folder), manifest=manifest, parts=parts)
        return [named[place] for place in range(len(numbers))]

    def _cut(
        self, folder: str | StoragePath, manifest: Manifest, numbers: Numbers
    ) -> Iterator[tuple[int, int, int, list[StoryPart]]]:
        """Windows of the stream of tokens."""
        samples = n_samples(manifest.splits["train"].tokens, self.seq_len)
        order = SampleOrder(n_samples=samples, batch_size=self.batch_size, seed=self.seed)
        chosen = order.chosen(numbers).tolist()
        parts = story_parts(folder, manifest, chosen, self.seq_len)
        for place, number in enumerate(numbers.tolist()):
            yield place, chosen[place], number // samples, parts[place]

    def _packed(
        self, folder: str | StoragePath, manifest: Manifest, numbers: Numbers
    ) -> Iterator[tuple[int, int, int, list[StoryPart]]]:
        """Samples of whole stories."""
        packing = Packing(story_index(folder, "train", manifest), self.seq_len)
        for epoch, of_epoch, places in by_epoch(numbers, packing.n_samples):
            chosen = packing.numbers(places, self.seed, epoch)
            parts = piece_parts(folder, manifest, packing.pieces(chosen, self.seed, epoch), len(chosen))
            for place, number, its in zip(np.flatnonzero(of_epoch).tolist(), chosen.tolist(), parts, strict=True):
                yield place, number, epoch, its
