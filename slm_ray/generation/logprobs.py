"""How likely the model itself held a token: the logarithm of its probability, before any sampling setting.

In: logits. Out: `TokenLogprob`s. The engine asks for them where a request does.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from slm_ray.tokenization.tokenizer import Tokenizer

Array = NDArray[Any]


@dataclasses.dataclass(frozen=True)
class TokenLogprob:
    """A token with its log-probability, in nats, at most 0."""

    token: int
    text: str
    """Its own text; U+FFFD where it is part of a character."""
    logprob: float
    top: tuple[tuple[int, str, float], ...]
    """The likeliest tokens in its place: token, text, log-probability, likeliest first."""


def token_logprobs(logits: Array, tokens: Sequence[int], n_top: int, tokenizer: Tokenizer) -> tuple[TokenLogprob, ...]:
    """Log-softmax of each row at its token, and the `n_top` likeliest of the row.

    logits: (N, vocab_size). tokens: N ids.
    """
    wide = logits.astype(np.float64)
    wide -= wide.max(axis=1, keepdims=True)
    wide -= np.log(np.exp(wide).sum(axis=1, keepdims=True))  # (N, vocab_size) log-probabilities
    best = np.argsort(-wide, axis=1, kind="stable")[:, :n_top] if n_top else np.empty((len(wide), 0), dtype=np.int64)
    texts = tokenizer.pieces([*tokens, *best.flatten().tolist()])
    found = []
    for index, token in enumerate(tokens):
        own = texts[len(tokens) + index * n_top :][:n_top]
        top = tuple((int(one), text, float(wide[index, one])) for one, text in zip(best[index], own))
        found.append(TokenLogprob(token, texts[index], float(wide[index, token]), top))
    return tuple(found)
