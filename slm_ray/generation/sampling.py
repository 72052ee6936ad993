"""How the next token is drawn from the model's logits.

In: logits of the rows of a batch, and for each row its `SamplingParams` and one uniform random number. Out: one token a
row. `engine.py` calls it at every step. A row's draw depends on its own logits, settings and number alone, never on its
neighbours, and each request has its own generator of random numbers: so the same seed writes the same story, alone or
in a batch (as far as fp32 goes: a matrix multiplication may round differently in a larger batch, by about 1e-6).
"""

import dataclasses
import math
import random
from collections.abc import Callable, Collection, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

MAX_TEMPERATURE = 100.0
MIN_PENALTY, MAX_PENALTY = 0.1, 10.0
MAX_SEED = 2**63 - 1
MAX_STOPS = 16
MAX_STOP_LENGTH = 256
"""Characters of a stop string."""
MAX_LOGPROBS = 20
_STRETCH = 64
"""Tokens that are summed up before one of them is looked for."""
_PROBABLY_ENOUGH = 256
"""Tokens that as a rule reach top_p together."""
_FEW = 4
"""Rows up to which each is better looked at by itself."""
_COLDEST = 1e-30
"""Temperature below which nothing changes any more, and fp32 still has room."""

Array = NDArray[Any]
_Draw = Callable[[Array, Sequence["SamplingParams"], Sequence[float]], list[int]]


@dataclasses.dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """How one story is written.

    Raises:
        ValueError: a value is out of its range or of the wrong kind.
    """

    max_tokens: int = 50
    """Most tokens to write, at least 1; the story may end before by itself. 0 only measures, with prompt_logprobs."""
    temperature: float = 0.7
    """Divides the logits, 0 to 100: below 1 bolder choices are rarer; 0 always takes the likeliest token."""
    top_k: int = 50
    """Draw among this many likeliest tokens; 0 draws among all."""
    top_p: float = 1.0
    """Draw among the likeliest tokens that together reach this probability, above 0 to 1; 1 draws among all."""
    seed: int | None = None
    """Seed of the draws, 0 to 2**63 - 1: the same seed writes the same story. None takes a fresh one."""
    repetition_penalty: float = 1.0
    """Weighs down tokens of the prompt and of what is written, 0.1 to 10: positive logits are divided by it."""
    stop: tuple[str, ...] = ()
    """Texts that end the story where they begin: up to 16, of 1 to 256 characters."""
    logprobs: int | None = None
    """Return the log-probability of every written token, and this many of the likeliest (0 to 20) beside it."""
    prompt_logprobs: bool = False
    """Return these of the prompt's tokens too."""

    def __post_init__(self) -> None:
        _check_integer("max_tokens", self.max_tokens, 0 if self.prompt_logprobs else 1)
        _check_integer("top_k", self.top_k, 0)
        if self.logprobs is not None:
            _check_integer("logprobs", self.logprobs, 0, MAX_LOGPROBS)
        _check_stops(self.stop)
        _check_number("repetition_penalty", self.repetition_penalty)
        if not MIN_PENALTY <= self.repetition_penalty <= MAX_PENALTY:
            raise ValueError(
                f"repetition_penalty ({self.repetition_penalty}) must be between {MIN_PENALTY:g} and {MAX_PENALTY:g}"
            )
        if self.seed is not None:
            _check_integer("seed", self.seed, 0, MAX_SEED)
        _check_number("temperature", self.temperature)
        _check_number("top_p", self.top_p)
        if not 0 <= self.temperature <= MAX_TEMPERATURE:
            raise ValueError(f"temperature ({self.temperature}) must be between 0 and {MAX_TEMPERATURE:g}")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p ({self.top_p}) must be above 0 and at most 1")

    def random(self) -> random.Random:
        """A generator of this story's random numbers, at its beginning."""
        return random.Random(self.seed)


def _check_stops(stops: tuple[str, ...]) -> None:
    if len(stops) > MAX_STOPS:
        raise ValueError(f"stop has {len(stops)} texts: at most {MAX_STOPS} are allowed")
    if any(not 0 < len(stop) <= MAX_STOP_LENGTH for stop in stops):
        raise ValueError(f"stop must hold texts of 1 to {MAX_STOP_LENGTH} characters")


def _check_integer(name: str, value: object, low: int, high: int | None = None) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise ValueError(f"{name} ({value!r}) must be an integer")
    if value < low or (high is not None and value > high):
        raise ValueError(f"{name} ({value}) must be at least {low}" + (f" and at most {high}" if high else ""))


def _check_number(name: str, value: object) -> None:
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if not is_number or (isinstance(value, float) and not math.isfinite(value)):
        raise ValueError(f"{name} ({value!r}) must be a finite number")


def draw(
    logits: Array,
    params: Sequence[SamplingParams],
    uniforms: Sequence[float],
    seen: Sequence[Collection[int]] | None = None,
) -> list[int]:
    """One token for each row, by inverting the cumulative distribution of what its settings leave.

    logits: (B, vocab_size) in fp32. uniforms: B numbers in [0, 1), ignored where the temperature is 0.
    seen: the tokens that each row's repetition_penalty weighs down. The penalty comes first, then the temperature, then
    top_k, then top_p, which counts the probabilities that these leave.
    """
    values = logits
    if seen is not None and any(row.repetition_penalty != 1 for row in params):
        values = _penalised(values, params, seen)
    tokens = [0] * len(params)
    for kind, rows in _by_kind(params, values.shape[1]).items():
        some = values if len(rows) == len(params) else values[rows]  # (b, vocab_size)
        for row, token in zip(rows, kind(some, [params[row] for row in rows], [uniforms[row] for row in rows])):
            tokens[row] = token
    return tokens


def _penalised(values: Array, params: Sequence[SamplingParams], seen: Sequence[Collection[int]]) -> Array:
    """Source: Keskar et al., "CTRL" (arXiv:1909.05858), section 4.1, with negative logits multiplied."""
    values = values.copy()
    for row, own, tokens in zip(values, params, seen, strict=True):
        if own.repetition_penalty != 1 and tokens:
            ids = np.fromiter(tokens, dtype=np.int64)
            row[ids] = np.where(row[ids] > 0, row[ids] / own.repetition_penalty, row[ids] * own.repetition_penalty)
    return values


def _by_kind(params: Sequence[SamplingParams], vocab_size: int) -> "dict[_Draw, list[int]]":
    """Rows by the cheapest way to draw for them. It depends on a row's own settings alone: so does its draw."""
    kinds: dict[_Draw, list[int]] = {}
    for row, own in enumerate(params):
        if own.temperature == 0:
            kind: _Draw = _draw_greedily
        elif 0 < own.top_k < vocab_size:
            kind = _draw_of_likeliest
        else:
            kind = _draw_of_all if own.top_p == 1 else _draw_of_sorted
        kinds.setdefault(kind, []).append(row)
    return kinds


def _draw_greedily(values: Array, _: Sequence[SamplingParams], _uniforms: Sequence[float]) -> list[int]:
    greedy: list[int] = values.argmax(axis=1).tolist()
    return greedy


def _draw_of_all(values: Array, params: Sequence[SamplingParams], uniforms: Sequence[float]) -> list[int]:
    """Without top_k and top_p nothing has to be sorted: find the stretch of tokens, then the token in it."""
    weights = _rough_weights(values, params)
    starts, rows = np.arange(0, values.shape[1], _STRETCH), np.arange(len(values))
    sums = np.add.reduceat(weights, starts, axis=1).astype(np.float64)  # (b, stretches)
    total = sums.cumsum(axis=1)
    target = _target(total, np.array(uniforms))
    stretch = _column_at(total, target)
    columns = starts[stretch][:, None] + np.arange(_STRETCH)  # (b, _STRETCH), the last stretch may be shorter
    inside = weights[rows[:, None], np.minimum(columns, values.shape[1] - 1)].astype(np.float64)
    inside[columns >= values.shape[1]] = 0
    before = total[rows, stretch] - sums[rows, stretch]
    total = inside.cumsum(axis=1)
    within = _column_at(total, np.minimum(target - before, np.nextafter(total[:, -1], 0)))
    drawn: list[int] = columns[rows, within].tolist()
    return drawn


def _draw_of_sorted(values: Array, params: Sequence[SamplingParams], uniforms: Sequence[float]) -> list[int]:
    """top_p alone: as a rule a few of the tokens reach it. Where they do not, more are sorted."""
    reach = _rough_weights(values, params).sum(axis=1, dtype=np.float64) * [own.top_p for own in params]  # (b,)
    drawn, left, count = [0] * len(params), list(range(len(params))), _PROBABLY_ENOUGH
    while left:
        own, count = [params[row] for row in left], min(count, values.shape[1])
        order, best = likeliest(values[left], count)
        weights = _weights(best, own)
        tokens = _draw_up_to(reach[left], weights, order, [uniforms[row] for row in left])
        is_enough = (weights.sum(axis=1) >= reach[left]) | (count == values.shape[1])
        for row, token, enough in zip(left, tokens, is_enough):
            drawn[row] = token if enough else -1
        left, count = [row for row in left if drawn[row] < 0], 4 * count
    return drawn


def _draw_of_likeliest(values: Array, params: Sequence[SamplingParams], uniforms: Sequence[float]) -> list[int]:
    widest, narrowest = max(own.top_k for own in params), min(own.top_k for own in params)
    order, best = likeliest(values, widest)
    weights = _weights(best, params)
    if narrowest < widest:
        weights *= np.arange(widest) < _column([own.top_k for own in params])
    if all(own.top_p == 1 for own in params):
        return _draw_up_to(None, weights, order, uniforms)
    top_p = np.array([own.top_p for own in params])
    reach = np.where(top_p == 1, np.inf, top_p * weights.cumsum(axis=1)[:, -1])
    return _draw_up_to(reach, weights, order, uniforms)


def _draw_up_to(reach: Array | None, weights: Array, order: Array, uniforms: Sequence[float]) -> list[int]:
    """Draw among the first tokens of `order` whose weights together reach (b,). order, weights: (b, K)."""
    total = weights.cumsum(axis=1)
    if reach is not None:
        total = (weights * (total - weights < reach[:, None])).cumsum(axis=1)
    chosen = _column_at(total, _target(total, np.array(uniforms)))
    drawn: list[int] = order[np.arange(len(order)), chosen].tolist()
    return drawn


def likeliest(values: Array, count: int) -> tuple[Array, Array]:
    """The `count` likeliest tokens of each row, likeliest first, and their logits: both (b, count).

    Of equal ones the first comes first. Sorting whole rows would take longer than the model.
    """
    if len(values) <= _FEW:
        found = [_likeliest_of_row(row, count) for row in values]
        return np.stack([one for one, _ in found]), np.stack([one for _, one in found])
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


def _likeliest_of_row(row: Array, count: int) -> tuple[Array, Array]:
    """The same for one row, (vocab_size,): cheaper where there are few of them."""
    bound = np.partition(row, len(row) - count)[len(row) - count]
    some = np.flatnonzero(row >= bound)
    best = row[some]
    order = np.argsort(-best, kind="stable")[:count]
    return some[order], best[order]


def _weights(best: Array, params: Sequence[SamplingParams]) -> Array:
    """Probabilities after the temperature, not normalised, of logits that begin with the largest: (b, K)."""
    with np.errstate(over="ignore", under="ignore"):  # a tiny temperature makes all but the largest 0
        weights: Array = np.exp((best.astype(np.float64) - best[:, :1]) / _column([own.temperature for own in params]))
    return weights


def _rough_weights(values: Array, params: Sequence[SamplingParams]) -> Array:
    """The same of whole rows in any order, to a few parts in 10 million, several times as fast: (b, vocab_size)."""
    temperature = _column([max(own.temperature, _COLDEST) for own in params]).astype(values.dtype)
    with np.errstate(over="ignore", under="ignore"):
        weights: Array = np.exp((values - values.max(axis=1, keepdims=True)) / temperature)
    return weights


def _target(total: Array, uniforms: Array) -> Array:
    """The point that each uniform number stands for in cumulative weights (b, K): (b,).

    Rounding may carry it up to the sum itself: it stays below, on what has any weight.
    """
    target: Array = np.minimum(uniforms * total[:, -1], np.nextafter(total[:, -1], 0))
    return target


def _column_at(total: Array, target: Array) -> Array:
    """Column of each row where the cumulative weight passes its target: (b,)."""
    column: Array = (total <= target[:, None]).sum(axis=1)
    return column


def _column(values: Sequence[float]) -> Array:
    return np.array(values, dtype=np.float64)[:, None]
