"""How likely the model itself held a token: the logarithm of its probability, before any sampling setting.

In: logits. Out: `TokenLogprob`s. The engine asks for them where a request does; `sampling.py` draws among what
`likeliest` finds.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from slm_ray.tokenization.tokenizer import Tokenizer

Array = NDArray[Any]
_SOME = 4096
"""Logits that are soon put in order."""
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


def likeliest(values: Array, count: int) -> tuple[Array, Array]:
    """The `count` likeliest tokens of each row, likeliest first, and their logits: both (b, count).

    Of equal ones the first comes first. Sorting whole rows would take longer than the model.
    """
    rows, vocab_size = values.shape
    # 1. The maximum of each of at least `count` groups of tokens.
    size = max(vocab_size // (4 * count), 1)
    groups = vocab_size // size
    largest = values[:, : groups * size].reshape(rows, size, groups).max(axis=1)  # (b, groups)
    # 2. A bound that at least `count` tokens reach: the count-th largest of these maxima.
    bound = np.partition(largest, groups - count, axis=1)[:, groups - count]  # (b,)
    # 3. The few tokens that reach it, with their place among those of their row.
    row, token = np.divmod(np.flatnonzero(values >= bound[:, None]), vocab_size)  # (M,)
    counts = np.bincount(row, minlength=rows)  # (b,)
    place = np.arange(len(row)) - (counts.cumsum() - counts)[row]  # (M,)
    # 4. A table of them, (b, most of a row), filled up with logits of -inf.
    tokens = np.zeros((rows, counts.max()), dtype=np.int64)
    logits = np.full(tokens.shape, -np.inf, dtype=values.dtype)
    tokens[row, place], logits[row, place] = token, values[row, token]
    # 5. Each row of the table in order, cut to `count`.
    order = (np.arange(rows)[:, None], np.argsort(-logits, axis=1, kind="stable")[:, :count])
    return tokens[order], logits[order]


def among_likeliest(row: Array, count: int) -> Array:
    """Which tokens of a row (vocab_size,) are its `count` likeliest, of equal ones the first. Nothing is sorted."""
    bound = _nth_largest(row, count)
    among: Array = row > bound
    among[np.flatnonzero(row == bound)[: count - np.count_nonzero(among)]] = True
    return among


def _nth_largest(row: Array, count: int) -> np.float32:
    """The logit that `count` of a row reach, by halving the range that holds it until it holds few."""
    low, high = _place(row.min()), _place(row.max()) + 1
    at_low, at_high = len(row), 0  # logits that reach them
    while at_low - at_high > _SOME and high - low > 1:
        middle = (low + high) // 2
        reached = int(np.count_nonzero(row >= _number(middle)))
        if reached >= count:
            low, at_low = middle, reached
        else:
            high, at_high = middle, reached
    if high - low == 1:
        return _number(low)
    some = row[(row >= _number(low)) & ~(row >= _number(high))]
    found: np.float32 = np.partition(some, at_low - count)[at_low - count]
    return found


def _place(number: np.float32) -> int:
    """The place of an fp32 number in the order of all of them; 0 is that of 0."""
    bits = int(np.float32(number).view(np.int32))
    return bits if bits >= 0 else -(bits & 0x7FFFFFFF)


def _number(place: int) -> np.float32:
    """The fp32 number at a place."""
    number: np.float32 = np.uint32(place if place >= 0 else 0x80000000 - place).view(np.float32)
    return number
