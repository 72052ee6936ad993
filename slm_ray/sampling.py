"""How the next token is drawn from the model's logits.

In: logits of the rows of a batch, and for each row its `SamplingParams` and one uniform random number. Out: one token a
row. `engine` calls it at every step. A row's draw depends on its own logits, settings and number alone, never on its
neighbours, and the random numbers come from a generator of the request's own: so the same seed gives the same story,
alone or in company (as far as fp32 goes: a matrix product may round differently in a larger batch, by about 1e-6).
"""

import dataclasses
import math
import random
from collections.abc import Sequence

import torch
from torch import Tensor

MAX_TEMPERATURE = 100.0
MAX_SEED = 2**63 - 1


@dataclasses.dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """How one story is written.

    Raises:
        ValueError: a value is out of its range or of the wrong kind.
    """

    max_tokens: int = 50
    """Most tokens to write, at least 1; the story may end before by itself."""
    temperature: float = 0.7
    """Divides the logits, 0 to 100: below 1 bolder choices are rarer; 0 always takes the likeliest token."""
    top_k: int = 50
    """Draw among this many likeliest tokens; 0 draws among all."""
    top_p: float = 1.0
    """Draw among the likeliest tokens that together reach this probability, above 0 to 1; 1 draws among all."""
    seed: int | None = None
    """Seed of the draws, 0 to 2**63 - 1: the same seed writes the same story. None takes a fresh one."""

    def __post_init__(self) -> None:
        _check_integer("max_tokens", self.max_tokens, 1)
        _check_integer("top_k", self.top_k, 0)
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


def _check_integer(name: str, value: object, low: int, high: int | None = None) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise ValueError(f"{name} ({value!r}) must be an integer")
    if value < low or (high is not None and value > high):
        raise ValueError(f"{name} ({value}) must be at least {low}" + (f" and at most {high}" if high else ""))


def _check_number(name: str, value: object) -> None:
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if not is_number or (isinstance(value, float) and not math.isfinite(value)):
        raise ValueError(f"{name} ({value!r}) must be a finite number")


def draw(logits: Tensor, params: Sequence[SamplingParams], uniforms: Sequence[float]) -> list[int]:
    """One token for each row, by inverting the cumulative distribution of what its settings leave.

    logits: (B, vocab_size). uniforms: B numbers in [0, 1), ignored where the temperature is 0.
    top_k is applied before top_p, and top_p to the probabilities after temperature and top_k.
    """
    if all(row.temperature == 0 for row in params):
        greedy: list[int] = logits.argmax(dim=-1).tolist()
        return greedy
    top_k, candidates = _candidates(logits.shape[-1], params)
    best, tokens = logits.float().topk(candidates, dim=-1)  # (B, K) each, likeliest first
    weights = _weights(best.double(), top_k.to(best.device), params)  # (B, K)
    total = weights.cumsum(dim=-1)  # (B, K)
    target = _column(uniforms, best.device) * total[:, -1:]  # (B, 1)
    chosen = torch.searchsorted(total, target, right=True)  # (B, 1)
    # Rounding may carry a target up to the sum itself: stay within what has any probability.
    last = ((weights > 0).sum(dim=-1, keepdim=True) - 1).clamp(min=0)
    drawn: list[int] = tokens.gather(1, torch.minimum(chosen, last))[:, 0].tolist()
    return drawn


def _candidates(vocab_size: int, params: Sequence[SamplingParams]) -> tuple[Tensor, int]:
    """How many tokens each row may choose from, (B, 1), and the largest of these numbers."""
    counts = [_row_candidates(vocab_size, row) for row in params]
    return torch.tensor(counts)[:, None], max(counts)


def _row_candidates(vocab_size: int, params: SamplingParams) -> int:
    if params.temperature == 0:
        return 1
    return min(params.top_k or vocab_size, vocab_size)


def _weights(best: Tensor, top_k: Tensor, params: Sequence[SamplingParams]) -> Tensor:
    """Unnormalised probabilities of the candidates, (B, K), 0 where top_k or top_p rule one out."""
    temperature = _column([row.temperature or 1.0 for row in params], best.device)  # (B, 1)
    weights = ((best - best[:, :1]) / temperature).exp()  # the first is 1
    weights = weights * (torch.arange(best.shape[1], device=best.device) < top_k)
    top_p = _column([row.top_p for row in params], best.device)  # (B, 1)
    total = weights.cumsum(dim=-1)  # (B, K)
    before = total - weights
    return weights * ((before < top_p * total[:, -1:]) | (top_p == 1))


def _column(values: Sequence[float], device: torch.device) -> Tensor:
    return torch.tensor(values, dtype=torch.float64, device=device)[:, None]
