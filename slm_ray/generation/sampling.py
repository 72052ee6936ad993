"""How the next token is drawn from the model's logits.

In: logits of the rows of a batch, and for each row its `SamplingParams` and one uniform random number. Out: one token a
row. `engine.py` calls it at every step. A row's draw depends on its own logits, settings and number alone, never on its
neighbours, and each request has its own generator of random numbers: so the same seed writes the same story, alone or
in a batch (as far as fp32 goes: a matrix multiplication may round differently in a larger batch, by about 1e-6).
"""

import dataclasses
import math
import random
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from slm_ray.generation.logprobs import among_likeliest, likeliest

MAX_TEMPERATURE = 100.0
MIN_PENALTY, MAX_PENALTY = 0.1, 10.0
MAX_TOKEN_PENALTY = 2.0
"""Of presence_penalty and frequency_penalty; they may be as far below 0."""
MAX_BIAS, MAX_BIASED = 100.0, 1024
"""Size of a bias, and tokens that may have one."""
MAX_SEED = 2**63 - 1
MAX_STOPS = 16
MAX_STOP_LENGTH = 256
"""Characters of a stop string."""
MAX_LOGPROBS = 20
_RANGES = {
    "temperature": (0, MAX_TEMPERATURE),
    "top_p": (0, 1),
    "min_p": (0, 1),
    "repetition_penalty": (MIN_PENALTY, MAX_PENALTY),
    "presence_penalty": (-MAX_TOKEN_PENALTY, MAX_TOKEN_PENALTY),
    "frequency_penalty": (-MAX_TOKEN_PENALTY, MAX_TOKEN_PENALTY),
}
_STRETCH = 64
"""Tokens that are summed up before one of them is looked for."""
_PROBABLY_ENOUGH = 256
"""Tokens that as a rule reach top_p together."""
_FEW, _FEW_OF_MANY = 1000, 2000
"""The largest top_k whose tokens are sorted, with up to 25,000 tokens and with 50,000 and more: so many take as long as
looking at all, in batches of 8 to 64."""
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
    min_p: float = 0.0
    """Draw among tokens that are at least this times as likely as the likeliest, 0 to 1; 0 draws among all."""
    seed: int | None = None
    """Seed of the draws, 0 to 2**63 - 1: the same seed writes the same story. None takes a fresh one."""
    repetition_penalty: float = 1.0
    """Weighs down tokens of the prompt and of what is written, 0.1 to 10: positive logits are divided by it."""
    presence_penalty: float = 0.0
    """Is taken from the logit of every token that was written, -2 to 2."""
    frequency_penalty: float = 0.0
    """Is taken from the logit of a token for each time that it was written, -2 to 2."""
    logit_bias: tuple[tuple[int, float], ...] = ()
    """Tokens, each with what is added to its logit, -100 to 100: up to 1,024 of them, each once."""
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
        _check_biases(self.logit_bias)
        if self.seed is not None:
            _check_integer("seed", self.seed, 0, MAX_SEED)
        for name, (low, high) in _RANGES.items():
            _check_number(name, getattr(self, name), low, high)
        if self.top_p == 0:
            raise ValueError("top_p (0) must be above 0")

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


def _check_number(name: str, value: object, low: float, high: float) -> None:
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if not is_number or (isinstance(value, float) and not math.isfinite(value)):
        raise ValueError(f"{name} ({value!r}) must be a finite number")
    if not low <= value <= high:  # type: ignore[operator]  # it is a number
        raise ValueError(f"{name} ({value}) must be between {low:g} and {high:g}")


def _check_biases(biases: tuple[tuple[int, float], ...]) -> None:
    if len(biases) > MAX_BIASED:
        raise ValueError(f"logit_bias has {len(biases)} tokens: at most {MAX_BIASED} are allowed")
    for token, bias in biases:
        _check_integer("logit_bias: token", token, 0)
        _check_number(f"logit_bias of token {token}", bias, -MAX_BIAS, MAX_BIAS)
    if len(dict(biases)) < len(biases):
        raise ValueError("logit_bias names a token twice")


def draw(logits: Array, params: Sequence[SamplingParams], uniforms: Sequence[float]) -> list[int]:
    """One token for each row, by inverting the cumulative distribution of what its settings leave.

    logits: (B, vocab_size) in fp32, as `token_weights.weighed` gives them. uniforms: B numbers in [0, 1), ignored where
    the temperature is 0. The temperature comes first, then top_k, then top_p, which counts the probabilities that this
    leaves, then min_p.
    """
    tokens = [0] * len(params)
    for kind, rows in _by_kind(params, logits.shape[1]).items():
        some = logits if len(rows) == len(params) else logits[rows]  # (b, vocab_size)
        for row, token in zip(rows, kind(some, [params[row] for row in rows], [uniforms[row] for row in rows])):
            tokens[row] = token
    return tokens


def _by_kind(params: Sequence[SamplingParams], vocab_size: int) -> "dict[_Draw, list[int]]":
    """Rows by the cheapest way to draw for them. It depends on a row's own settings alone: so does its draw."""
    kinds: dict[_Draw, list[int]] = {}
    few = min(max(_FEW, vocab_size // 25), _FEW_OF_MANY)
    for row, own in enumerate(params):
        if own.temperature == 0:
            kind: _Draw = _draw_greedily
        elif 0 < own.top_k < vocab_size:
            kind = _draw_of_likeliest if own.top_k <= few else _draw_of_many
        else:
            kind = _draw_of_all if own.top_p == 1 else _draw_up_to_top_p
        kinds.setdefault(kind, []).append(row)
    return kinds


def _draw_greedily(values: Array, _: Sequence[SamplingParams], _uniforms: Sequence[float]) -> list[int]:
    greedy: list[int] = values.argmax(axis=1).tolist()
    return greedy


def _draw_of_all(values: Array, params: Sequence[SamplingParams], uniforms: Sequence[float]) -> list[int]:
    """Without top_k and top_p nothing has to be sorted."""
    weights = _likely_enough(_rough_weights(values, params), params)
    return [_pick(*row) for row in zip(weights, _stretch_sums(weights), uniforms, strict=True)]


def _draw_up_to_top_p(values: Array, params: Sequence[SamplingParams], uniforms: Sequence[float]) -> list[int]:
    """top_p alone: as a rule a few of the tokens reach it, and are sorted. Where they do not, none are."""
    weights, count = _rough_weights(values, params), min(_PROBABLY_ENOUGH, values.shape[1])
    reach = weights.sum(axis=1, dtype=np.float64) * [own.top_p for own in params]  # (b,)
    order, best = likeliest(values, count)
    few = _weights(best, params)
    drawn = _draw_up_to(reach, few, order, params, uniforms)
    if count < values.shape[1]:
        for row in np.flatnonzero(few.sum(axis=1) < reach).tolist():
            drawn[row] = _draw_by_rejection(values[row], weights[row], reach[row], params[row], uniforms[row])
    return drawn


def _draw_of_many(values: Array, params: Sequence[SamplingParams], uniforms: Sequence[float]) -> list[int]:
    """A top_k of so many that sorting them would take longer than the model."""
    drawn = []
    for row, own, left, uniform in zip(values, params, _rough_weights(values, params), uniforms, strict=True):
        left *= among_likeliest(row, own.top_k)
        reach = np.inf if own.top_p == 1 else own.top_p * left.sum(dtype=np.float64)
        drawn.append(_draw_by_rejection(row, left, reach, own, uniform))
    return drawn


def _draw_by_rejection(values: Array, weights: Array, reach: float, params: SamplingParams, uniform: float) -> int:
    """Draw among the likeliest tokens of a row whose weights together reach so much: values, weights: (vocab_size,).

    Nothing is sorted. A token drawn among all is one of them unless those that are likelier reach it without it. If
    they do, they hold all that is looked for, and the next is drawn among them, with a number that follows from the
    first: 1 - ln(top_p) draws on average. Source: "sorting-free" sampling, flashinfer.ai/2025/03/10/sampling.html.
    """
    left, following = _likely_enough(weights[None], [params])[0], random.Random(int(uniform * 2**53))
    while True:
        token = _pick(left, _stretch_sums(left[None])[0], uniform)
        if reach == np.inf:
            return token
        likelier = values > values[token]
        likelier[:token] = values[:token] >= values[token]  # of equal ones, those before it
        left *= likelier
        if not left.sum() >= reach:
            return token
        uniform = following.random()


def _stretch_sums(weights: Array) -> Array:
    """The sum of each stretch of tokens: (b, stretches)."""
    sums: Array = np.add.reduceat(weights, np.arange(0, weights.shape[1], _STRETCH), axis=1).astype(np.float64)
    return sums


def _pick(weights: Array, sums: Array, uniform: float) -> int:
    """A token of a row by its weight, in the order of ids: find its stretch, then the token in it.

    weights: (vocab_size,). sums: (stretches,).
    """
    total = sums.cumsum()
    target = min(uniform * total[-1], math.nextafter(total[-1], 0))
    stretch = np.count_nonzero(total <= target)
    start, before = _STRETCH * stretch, total[stretch] - sums[stretch]
    inside = weights[start : start + _STRETCH].cumsum(dtype=np.float64)
    within = max(min(target - before, math.nextafter(inside[-1], 0)), 0)
    return int(start + np.count_nonzero(inside <= within))


def _draw_of_likeliest(values: Array, params: Sequence[SamplingParams], uniforms: Sequence[float]) -> list[int]:
    widest, narrowest = max(own.top_k for own in params), min(own.top_k for own in params)
    order, best = likeliest(values, widest)
    weights = _weights(best, params)
    if narrowest < widest:
        weights *= np.arange(widest) < _column([own.top_k for own in params])
    if all(own.top_p == 1 for own in params):
        return _draw_up_to(None, weights, order, params, uniforms)
    top_p = np.array([own.top_p for own in params])
    reach = np.where(top_p == 1, np.inf, top_p * weights.cumsum(axis=1)[:, -1])
    return _draw_up_to(reach, weights, order, params, uniforms)


def _draw_up_to(
    reach: Array | None, weights: Array, order: Array, params: Sequence[SamplingParams], uniforms: Sequence[float]
) -> list[int]:
    """Draw among the first tokens of `order` whose weights together reach (b,). order, weights: (b, K)."""
    left = weights
    if reach is not None:
        left = weights * (weights.cumsum(axis=1) - weights < reach[:, None])
    total = _likely_enough(left, params).cumsum(axis=1)
    # Rounding may carry a point up to the sum itself: it stays below, on what has any weight.
    target = np.minimum(np.array(uniforms) * total[:, -1], np.nextafter(total[:, -1], 0))
    chosen = (total <= target[:, None]).sum(axis=1)
    drawn: list[int] = order[np.arange(len(order)), chosen].tolist()
    return drawn


def _likely_enough(weights: Array, params: Sequence[SamplingParams]) -> Array:
    """Weights, of which the largest of a row is 1, without those below its min_p. Source: arXiv:2407.01082."""
    if all(own.min_p == 0 for own in params):
        return weights
    kept: Array = weights * (weights >= _column([own.min_p for own in params]))
    return kept


def _weights(best: Array, params: Sequence[SamplingParams]) -> Array:
    """Probabilities after the temperature, not normalised, of logits that begin with the largest: (b, K)."""
    with np.errstate(over="ignore", under="ignore"):  # a tiny temperature makes all but the largest 0
        weights: Array = np.exp((best.astype(np.float64) - best[:, :1]) / _column([own.temperature for own in params]))
    return weights


def _rough_weights(values: Array, params: Sequence[SamplingParams]) -> Array:
    """The same of whole rows in any order, to a few parts in 10 million, several times as fast: (b, vocab_size)."""
    temperature = _column([max(own.temperature, _COLDEST) for own in params]).astype(values.dtype)
    with np.errstate(over="ignore", under="ignore"):
        weights: Array = values - values.max(axis=1, keepdims=True)
        weights /= temperature
        return np.exp(weights, out=weights)


def _column(values: Sequence[float]) -> Array:
    return np.array(values, dtype=np.float64)[:, None]
