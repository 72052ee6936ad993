"""The stories of a split, one shard at a time.

In: a data-set folder. Out: blocks of stories with their ids, tokens and bytes, checked against the manifest; the same
stories in the tokens of another tokenizer. However large the split is, one shard of it is in memory.
"""

import dataclasses
from collections.abc import Iterator

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from slm_ray.dataset.manifest import MANIFEST, Manifest
from slm_ray.dataset.shards import read_shard
from slm_ray.errors import UserError
from slm_ray.tokenization.tokenizer import Tokenizer


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class StoryBlock:
    """Some stories, in the order of the data set."""

    story_ids: list[str]
    tokens: npt.NDArray[np.unsignedinteger]
    """Ids of all stories one after another; each ends with the end-of-text token."""
    ends: npt.NDArray[np.int64]
    """(n + 1,): story i is `tokens[ends[i] : ends[i + 1]]`."""
    n_bytes: npt.NDArray[np.int64]
    """(n,): UTF-8 bytes of each cleaned text."""

    def __len__(self) -> int:
        return len(self.story_ids)

    @property
    def n_tokens(self) -> npt.NDArray[np.int64]:
        """(n,): tokens of each story, its end-of-text token included."""
        return np.diff(self.ends)

    def story(self, number: int) -> npt.NDArray[np.unsignedinteger]:
        """Tokens of one story, its end-of-text token last."""
        return self.tokens[self.ends[number] : self.ends[number + 1]]


def read_stories(folder: str, split: str, manifest: Manifest) -> Iterator[StoryBlock]:
    """The stories of a split, a block for each shard.

    Raises:
        UserError: the split has no stories; a shard is missing, altered, or not the one that the manifest lists.
    """
    wanted = manifest.splits[split]
    if not wanted.rows:
        raise UserError(f"{folder} has no stories in its {split} split: name another with --split")
    for shard in wanted.shards:
        block = _block(read_shard(folder, shard))
        found = (len(block.tokens), int(block.n_bytes.sum()))
        if found != (shard.tokens, shard.bytes):
            raise UserError(
                f"{folder}/{shard.file} has {found[0]} tokens of {found[1]} bytes, but {MANIFEST} lists "
                f"{shard.tokens} of {shard.bytes}: prepare the data again"
            )
        yield block


def _block(table: pa.Table) -> StoryBlock:
    tokens = table["tokens"].combine_chunks()
    lengths = np.diff(tokens.offsets.to_numpy()).astype(np.int64)
    return StoryBlock(
        story_ids=table["story_id"].to_pylist(),
        tokens=tokens.flatten().to_numpy(),
        ends=_ends(lengths),
        n_bytes=table["n_bytes"].to_numpy().astype(np.int64),
    )


def _ends(lengths: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    return np.concatenate([np.zeros(1, np.int64), np.cumsum(lengths)])


def story_text(block: StoryBlock, number: int, tokenizer: Tokenizer) -> str:
    """The cleaned text of one story.

    Raises:
        UserError: the tokenizer does not give back as many bytes as the story had.
    """
    text = tokenizer.decode(block.story(number).tolist())
    if len(text.encode()) != block.n_bytes[number]:
        raise UserError(
            f"the text of {block.story_ids[number]} does not come back from its tokens: its tokenizer loses text, so "
            "a model with another tokenizer cannot be measured on it"
        )
    return text


def encoded_anew(block: StoryBlock, own: Tokenizer, other: Tokenizer) -> StoryBlock:
    """The same stories in the tokens of another tokenizer.

    Raises:
        UserError: as `story_text`; or the other one loses text, of which a model would have less to foresee.
    """
    texts = [story_text(block, number, own) for number in range(len(block))]
    encoded = [ids.values.to_numpy() for ids in other.encode_batch(texts)]
    for story_id, text, ids in zip(block.story_ids, texts, encoded):
        if other.decode(ids.tolist()) != text:
            raise UserError(
                f"the text of {story_id} does not come back from the model's own tokenizer: it loses text, so bits per "
                "byte would mean something else"
            )
    stories = [np.append(ids, other.eos_id) for ids in encoded]
    return dataclasses.replace(
        block,
        tokens=np.concatenate(stories).astype(other.numpy_type),
        ends=_ends(np.array([len(story) for story in stories], np.int64)),
    )
