"""The tokens of a split as training reads them: one run of ids, and where the stories lie in it.

In: the tokens of all stories one after another. Out: a `TokenStream`, for `samples` and validation.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from slm_ray.dataset.packing import StoryIndex

Tokens = npt.NDArray[np.unsignedinteger]
_NOTHING = np.zeros(1, np.int64)


@dataclass(frozen=True)
class TokenStream:
    """One split as a single run of tokens that begins with an end-of-text token, as every story's beginning is seen.

    [7, 8, 0, 9, 0] with end-of-text token 0 -> the stream [0, 7, 8, 0, 9, 0], whose targets are exactly the five
    tokens.
    """

    tokens: Tokens  # (1 + n_targets,)
    n_bytes: int  # UTF-8 bytes of the split's stories
    stories: StoryIndex = field(default_factory=lambda: StoryIndex.of_ends(_NOTHING))
    """Where the stories lie among the targets; without any, nothing but windows can be taken from it."""

    @classmethod
    def of_split(
        cls, tokens: Tokens, n_bytes: int, eos_id: int, ends: npt.NDArray[np.int64] = _NOTHING
    ) -> "TokenStream":
        """Put the end-of-text token before the split's tokens. ends: (stories + 1,), the stories' borders from 0 on."""
        whole = np.concatenate([np.array([eos_id], dtype=tokens.dtype), tokens])
        return cls(whole, n_bytes, StoryIndex.of_ends(ends))

    @classmethod
    def joined(cls, streams: Sequence["TokenStream"]) -> "TokenStream":
        """The stories of several streams of one tokenizer, one after another, in memory."""
        tokens = np.concatenate([stream.tokens[1:] for stream in streams])
        starts = np.cumsum([0, *(stream.n_targets for stream in streams)])
        ends = [stream.stories.ends[1:] + start for stream, start in zip(streams, starts)]
        n_bytes = sum(stream.n_bytes for stream in streams)
        return cls.of_split(tokens, n_bytes, streams[0].eos_id, np.concatenate([_NOTHING, *ends]))

    @property
    def n_targets(self) -> int:
        """Tokens that can be predicted: all of the split's."""
        return len(self.tokens) - 1

    @property
    def eos_id(self) -> int:
        """The end-of-text token."""
        return int(self.tokens[0])

    def inputs_of(self, story: int, start: int, stop: int) -> npt.NDArray[np.int64]:
        """What a model reads to predict the tokens `start` to `stop` of a story: those one place earlier, of which the
        first is the end-of-text token where `start` is 0. (stop - start,)
        """
        first = int(self.stories.ends[story])
        inputs = self.tokens[first + start : first + stop].astype(np.int64)
        if start == 0 and stop > 0:
            inputs[0] = self.eos_id
        return inputs

    def targets_of(self, story: int, start: int, stop: int) -> npt.NDArray[np.int64]:
        """The tokens `start` to `stop` of a story, (stop - start,)."""
        first = int(self.stories.ends[story]) + 1
        return self.tokens[first + start : first + stop].astype(np.int64)
