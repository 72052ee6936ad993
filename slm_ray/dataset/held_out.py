"""Stories of a mixture that one data set holds out and another trains on.

In: data sets of one tokenizer. Out: a refusal where their splits do not go together. Stories are compared by their
tokens, since names of sources may be equal by chance; one shard at a time is in memory, and a number for each story
that is held out.
"""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from slm_ray.dataset.manifest import Manifest
from slm_ray.dataset.shards import Tokens, split_parts
from slm_ray.errors import UserError
from slm_ray.storage import StoragePath

HELD_OUT = ("validation", "test")
SKETCHED = 8
"""Tokens of a story by which it is looked for first."""

Marks = npt.NDArray[np.uint64]
_FOUND_SOUND: set[frozenset[str]] = set()
"""Fingerprints of data sets that went together in this process: each trial of a sweep asks anew."""


def refuse_trained_on(parts: Sequence[tuple[str | StoragePath, Manifest]]) -> None:
    """Refuse data sets of which one trains on what another validates or tests on.

    Raises:
        UserError: with both and how many stories it is; or a shard is missing or altered.
    """
    fingerprints = frozenset(manifest.fingerprint for _, manifest in parts)
    if len(parts) < 2 or fingerprints in _FOUND_SOUND:
        return
    held_out = [_held_out(folder, manifest) for folder, manifest in parts]
    for number, (folder, manifest) in enumerate(parts):
        others = [(place, *found) for (place, _), found in zip(parts, held_out) if found is not held_out[number]]
        alike = np.unique(np.concatenate([sketches for _, sketches, _ in others]))
        for tokens, lengths in split_parts(folder, "train", manifest):
            may_be = np.isin(_sketches(tokens, lengths), alike)
            trained = np.unique(marks(tokens[np.repeat(may_be, lengths)], lengths[may_be]))
            for place, _, its_marks in others:
                if count := int(np.isin(trained, its_marks).sum()):
                    raise UserError(
                        f"{folder} trains on at least {count:,} stories that {place} holds out: prepare both with the "
                        "same --validation-fraction and --test-fraction, then a story is in one split in both"
                    )
    _FOUND_SOUND.add(fingerprints)


def _held_out(folder: str | StoragePath, manifest: Manifest) -> tuple[Marks, Marks]:
    """Sketches and marks of what a data set holds out, each once."""
    found = [(_sketches(*part), marks(*part)) for split in HELD_OUT for part in split_parts(folder, split, manifest)]
    none = np.empty(0, np.uint64)
    return (
        np.unique(np.concatenate([none, *(sketches for sketches, _ in found)])),
        np.unique(np.concatenate([none, *(its_marks for _, its_marks in found)])),
    )


def _sketches(tokens: Tokens, lengths: npt.NDArray[np.int64]) -> Marks:
    """As `marks`, of a few tokens of each story and its length: soon made, and equal for a few other stories too."""
    if not len(tokens):
        return np.zeros(len(lengths), np.uint64)
    starts = np.cumsum(lengths) - lengths
    steps = np.maximum(lengths - 1, 0)[:, None] * np.arange(SKETCHED) // (SKETCHED - 1)
    seen = tokens[np.minimum(starts[:, None] + steps, len(tokens) - 1)].astype(np.uint64)  # (stories, SKETCHED)
    keys = np.random.default_rng(1).integers(2**64, size=SKETCHED + 1, dtype=np.uint64)
    sketches: Marks = (seen * keys[:-1]).sum(axis=1, dtype=np.uint64) + lengths.astype(np.uint64) * keys[-1]
    return sketches


def marks(tokens: Tokens, lengths: npt.NDArray[np.int64]) -> Marks:
    """A number for each story, (stories,), equal for equal tokens, and for others by a chance of about 2^-63.

    tokens: (n,), of all stories one after another; lengths: (stories,). The sum of each token times a random number of
    its place, modulo 2^64 (Carter and Wegman, "Universal classes of hash functions", 1979).
    """
    ends = np.cumsum(lengths)
    starts = ends - lengths
    places = np.arange(len(tokens)) - np.repeat(starts, lengths)
    keys = np.random.default_rng(0).integers(2**64, size=int(lengths.max(initial=0)), dtype=np.uint64)
    sums = np.zeros(len(tokens) + 1, np.uint64)
    np.cumsum(keys[places] * (tokens.astype(np.uint64) + np.uint64(1)), dtype=np.uint64, out=sums[1:])
    found: Marks = sums[ends] - sums[starts]
    return found
