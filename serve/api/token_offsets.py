"""Where each token of an answer begins in its text, in characters, as OpenAI's `text_offset` has it.

In: tokens, one after another. Out: the same, each with its offset. `openai_routes.py` uses it.
"""

import copy
import itertools
from collections.abc import Sequence
from typing import TypeAlias

from slm_ray.generation.detokenizer import TextStream
from slm_ray.generation.logprobs import TokenLogprob
from slm_ray.tokenization.tokenizer import Tokenizer

Placed: TypeAlias = tuple[TokenLogprob, int]
"""A token and where it begins."""


class TokenOffsets:
    """Where tokens begin in the text they make: the first parts of a character that several share add nothing."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._text = TextStream(tokenizer, ())
        self._at = 0

    def copy(self) -> "TokenOffsets":
        """Another that goes on from here by itself."""
        other = copy.copy(self)
        self._text = self._text.copy()
        return other

    def of(self, tokens: Sequence[TokenLogprob]) -> list[Placed]:
        """The next tokens, each with its offset in characters."""
        placed = []
        for token in tokens:
            before = self._text.pending
            text = self._text.push(token.token)
            # Bytes before it that form no character are characters now, each U+FFFD, and it begins behind them.
            alike = itertools.takewhile(lambda pair: pair[0] == pair[1], zip(before, text))
            placed.append((token, self._at + sum(1 for _ in alike)))
            self._at += len(text)
        return placed
