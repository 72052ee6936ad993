"""Which stories the samples of a step are made of: the way back from `batches` to the shards.

In: a data set, numbers of windows (of `SampleOrder`), or pieces of stories (of `Packing`). Out: for each sample, its
stories, with the place of each in its shard and the tokens that the sample has of it. Only the shards that these lie in
are read.
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from slm_ray.dataset.manifest import MANIFEST, Manifest, Shard
from slm_ray.dataset.packing import Pieces
from slm_ray.dataset.shards import read_shard
from slm_ray.errors import UserError
from slm_ray.storage import StoragePath


@dataclass(frozen=True, kw_only=True)
class StoryPart:
    """What one window has of one story."""

    story_id: str
    shard: Shard
    row: int
    """In the shard, from 0."""
    n_tokens: int
    """Of the whole story, its end-of-text token included."""
    start: int
    """First token of the story that the window has, from 0."""
    first_target: int
    """First token that the model had to predict there: `start`, but for the first token of a window, which is only
    read."""
    ids: tuple[int, ...]
    """The tokens that the window has."""

    @property
    def stop(self) -> int:
        """End of its tokens in the story, exclusive."""
        return self.start + len(self.ids)


def story_parts(
    folder: str | StoragePath, manifest: Manifest, windows: Sequence[int], seq_len: int
) -> list[list[StoryPart]]:
    """The stories of each window of the training split, in the order of their tokens.

    Window w has the seq_len + 1 tokens of the split from w * seq_len - 1 on, of which the first is only read; that of
    window 0 is the end-of-text token before the split, which is no story's. With seq_len 3, stories `a b $` and
    `d e f $`: window 0 is `$ a b $`, window 1 is `$ d e f`, whose first token is the end of the first story.

    Raises:
        UserError: a shard of theirs is missing, altered, or not as the manifest counts it.
    """
    shards = manifest.splits["train"].shards
    borders = [0, *itertools.accumulate(shard.tokens for shard in shards)]
    found: list[list[StoryPart]] = [[] for _ in windows]
    for shard, first in zip(shards, borders, strict=False):
        starts = [window * seq_len - first for window in windows]  # of the targets, as seen from the shard
        inside = [place for place, start in enumerate(starts) if start - 1 < shard.tokens and start + seq_len > 0]
        if not inside:
            continue
        stories = _Stories.read(folder, shard)
        for place in inside:
            found[place] += stories.between(starts[place], starts[place] + seq_len)
    return found


def piece_parts(folder: str | StoragePath, manifest: Manifest, pieces: Pieces, n_samples: int) -> list[list[StoryPart]]:
    """The stories of each of `n_samples` samples of whole stories of the training split, in the order of their tokens.

    A story that goes on has the token before as its first one, which is only read; one that begins is read after the
    end-of-text token, which is no story's.

    Raises:
        UserError: a shard of theirs is missing, altered, or not as the manifest counts it.
    """
    shards = manifest.splits["train"].shards
    borders = [0, *itertools.accumulate(shard.rows for shard in shards)]
    found: list[dict[int, StoryPart]] = [{} for _ in range(n_samples)]
    for shard, first in zip(shards, borders, strict=False):
        inside = np.flatnonzero((pieces.story >= first) & (pieces.story < first + shard.rows)).tolist()
        if not inside:
            continue
        stories = _Stories.read(folder, shard)
        for place in inside:
            start, length = int(pieces.start[place]), int(pieces.length[place])
            part = stories.part(int(pieces.story[place]) - first, max(start - 1, 0), start, start + length)
            found[int(pieces.sample[place])][place] = part
    return [[parts[place] for place in sorted(parts)] for parts in found]


@dataclass(frozen=True)
class _Stories:
    """The stories of one shard."""

    shard: Shard
    story_ids: list[str]
    tokens: "np.ndarray[tuple[int], np.dtype[np.unsignedinteger]]"
    borders: "np.ndarray[tuple[int], np.dtype[np.int64]]"
    """Where each story begins in `tokens`, then the end: (rows + 1,)."""

    @classmethod
    def read(cls, folder: str | StoragePath, shard: Shard) -> "_Stories":
        table = read_shard(folder, shard)
        lists = table["tokens"].combine_chunks()
        tokens = lists.flatten().to_numpy()
        if len(tokens) != shard.tokens:
            raise UserError(
                f"{shard.file} has {len(tokens)} tokens, but {MANIFEST} lists {shard.tokens}: prepare the data again"
            )
        borders = np.concatenate([[0], np.cumsum(lists.value_lengths().to_numpy())]).astype(np.int64)
        return cls(shard, table["story_id"].to_pylist(), tokens, borders)

    def part(self, row: int, start: int, first_target: int, stop: int) -> StoryPart:
        """The tokens `start` to `stop` of one story."""
        begin, end = int(self.borders[row]), int(self.borders[row + 1])
        return StoryPart(
            story_id=self.story_ids[row],
            shard=self.shard,
            row=row,
            n_tokens=end - begin,
            start=start,
            first_target=first_target,
            ids=tuple(self.tokens[begin + start : begin + stop].tolist()),
        )

    def between(self, first_target: int, stop: int) -> list[StoryPart]:
        """The parts of a window: its targets from `first_target` to `stop`, and the token before them."""
        first, stop = max(first_target - 1, 0), min(stop, len(self.tokens))
        row = int(np.searchsorted(self.borders, first, side="right")) - 1
        parts = []
        while row < len(self.story_ids) and self.borders[row] < stop:
            begin, end = int(self.borders[row]), int(self.borders[row + 1])
            start, part_stop = max(begin, first), min(end, stop)
            if start < part_stop:
                parts.append(self.part(row, start - begin, max(start, first_target) - begin, part_stop - begin))
            row += 1
        return parts
