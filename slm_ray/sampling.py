"""How the next token is drawn from the model's logits.

In: logits of the rows of a batch, and for each row its `SamplingParams` and one uniform random number. Out: one token a
row. `engine` calls it at every step. A row's draw depends on its own logits, settings and number alone, never on its
neighbours, and the random numbers come from a generator of the request's own: so the same seed gives the same story,
alone or in company (as far as fp32 goes: a matrix product may round differently in a larger batch, by about 1e-6).
"""

import dataclasses
import math
import random
from collections.abc import Callable, Collection, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

MAX_TEMPERATURE = 100.0
MIN_PENALTY, MAX_PENALTY = 0.1, 10.0
MAX_SEED = 2**63 - 1
MAX_STOPS = 16
MAX_STOP_LENGTH = 256
"""Characters of a stop string."""
MAX_LOGPROBS = 20


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
    """Give the log-probability of every written token, and this many of the likeliest (0 to 20) beside it."""
    prompt_logprobs: bool = False
    """Give these of the prompt's tokens too."""

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
    logits: Tensor,
    params: Sequence[SamplingParams],
    uniforms: Sequence[float],
    seen: Sequence[Collection[int]] | None = None,
) -> list[int]:
    """One token for each row, by inverting the cumulative distribution of what its settings leave.

    logits: (B, vocab_size) in fp32 on the CPU. uniforms: B numbers in [0, 1), ignored where the temperature is 0.
    seen: the tokens that each row's repetition_penalty weighs down. The penalty comes first, then the temperature, then
    top_k, then top_p, which counts the probabilities that these leave.
    """
    values: Array = logits.numpy()  # (B, vocab_size)
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
            ids = np.fromiter(set(tokens), dtype=np.int64)
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
    """Without top_k and top_p nothing has to be sorted."""
    drawn: list[int] = _invert(_weights(values, values.max(axis=1, keepdims=True), params), uniforms).tolist()
    return drawn


def _draw_of_sorted(values: Array, params: Sequence[SamplingParams], uniforms: Sequence[float]) -> list[int]:
    order = np.argsort(-values, axis=1, kind="stable")
    return _draw_in_order(values, order, params, uniforms)


def _draw_of_likeliest(values: Array, params: Sequence[SamplingParams], uniforms: Sequence[float]) -> list[int]:
    widest = max(own.top_k for own in params)
    some = np.sort(np.argpartition(values, -widest, axis=1)[:, -widest:], axis=1)  # (b, widest) tokens
    rank = np.argsort(-np.take_along_axis(values, some, axis=1), axis=1, kind="stable")
    return _draw_in_order(values, np.take_along_axis(some, rank, axis=1), params, uniforms)


def _draw_in_order(
    values: Array, order: Array, params: Sequence[SamplingParams], uniforms: Sequence[float]
) -> list[int]:
    """Draw among the first top_k of `order`, (b, K) tokens, likeliest first, as far as top_p reaches."""
    best = np.take_along_axis(values, order, axis=1)  # (b, K)
    top_k = _column([own.top_k or values.shape[1] for own in params])
    weights = _weights(best, best[:, :1], params) * (np.arange(best.shape[1]) < top_k)
    top_p = _column([own.top_p for own in params])
    total = weights.cumsum(axis=1)
    weights *= (total - weights < top_p * total[:, -1:]) | (top_p == 1)
    chosen = _invert(weights, uniforms)
    drawn: list[int] = np.take_along_axis(order, chosen[:, None], axis=1)[:, 0].tolist()
    return drawn


def _weights(values: Array, largest: Array, params: Sequence[SamplingParams]) -> Array:
    """Probabilities after the temperature, not normalised: (b, K) in float64. The largest is 1."""
    with np.errstate(over="ignore", under="ignore"):  # a tiny temperature makes all but the largest 0
        weights: Array = np.exp((values.astype(np.float64) - largest) / _column([own.temperature for own in params]))
    return weights


def _invert(weights: Array, uniforms: Sequence[float]) -> Array:
    """Column of each row where the cumulative weight passes its share of the sum: (b,)."""
    total = weights.cumsum(axis=1)
    # Rounding may carry a target up to the sum itself: stay below it, on what has any weight.
    target = np.minimum(_column(uniforms) * total[:, -1:], np.nextafter(total[:, -1:], 0))
    chosen: Array = (total <= target).sum(axis=1)
    return chosen


def _column(values: Sequence[float]) -> Array:
    return np.array(values, dtype=np.float64)[:, None]
