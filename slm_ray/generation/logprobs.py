"""How likely the model itself held a token: the logarithm of its probability, before any sampling setting.

In: logits. Out: `TokenLogprob`s. The engine asks for them where a request does.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from slm_ray.generation.sampling import likeliest
from slm_ray.tokenization.tokenizer import Tokenizer

Array = NDArray[Any]
_ROWS = 16
"""Rows of logits that are looked at together."""


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

    Whole rows are neither sorted nor copied in float64, and few are in hand at a time: what one request asks for, all
    that are being written wait for.

    logits: (N, vocab_size). tokens: N ids.
    """
    found: list[TokenLogprob] = []
    for start in range(0, len(tokens), _ROWS):
        found += _of_block(logits[start : start + _ROWS], tokens[start : start + _ROWS], n_top, tokenizer)
    return tuple(found)


def _of_block(logits: Array, tokens: Sequence[int], n_top: int, tokenizer: Tokenizer) -> list[TokenLogprob]:
    largest = logits.max(axis=1, keepdims=True)  # (N, 1)
    sums = np.exp(logits - largest).sum(axis=1, dtype=np.float64)  # (N,)
    scale = largest[:, 0].astype(np.float64) + np.log(sums)  # (N,) log of the sum of all exponentials
    order, best = likeliest(logits, min(n_top, logits.shape[1])) if n_top else (np.empty((len(logits), 0), int),) * 2
    ids = sorted({*tokens, *order.flatten().tolist()})
    texts = dict(zip(ids, tokenizer.pieces(ids), strict=True))
    found = []
    for row, token in enumerate(tokens):
        chances = (best[row].astype(np.float64) - scale[row]).tolist()
        top = tuple((one, texts[one], chance) for one, chance in zip(order[row].tolist(), chances, strict=True))
        found.append(TokenLogprob(token, texts[token], float(logits[row, token] - scale[row]), top))
    return found
