"""What a request's settings make of single tokens' logits before one is drawn: biases, and penalties of those that were
there.

In: logits of the rows of a batch, and for each row its `TokenWeights`, or None. Out: logits to draw from. `engine.py`
calls it at every step; a batch in which no row asks for any of it costs nothing. Log-probabilities are those of the
logits before it.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from slm_ray.generation.sampling import SamplingParams

Array = NDArray[Any]
_ROOM = 64
"""Tokens that there is room for at first."""


class TokenWeights:
    """The biases of a request, and the tokens that its penalties weigh down: each once, with how often it was written.

    `token_weights` makes it. The end-of-text token before a story is none of them.
    """

    def __init__(self, params: SamplingParams, prompt_ids: Sequence[int]) -> None:
        self.repetition = params.repetition_penalty
        self.presence = params.presence_penalty
        self.frequency = params.frequency_penalty
        self.bias_ids = np.array([token for token, _ in params.logit_bias], dtype=np.int64)
        self.biases = np.array([bias for _, bias in params.logit_bias], dtype=np.float32)
        self._places = {token: place for place, token in enumerate(dict.fromkeys(prompt_ids))}
        self._ids = np.array([*self._places, *[0] * _ROOM], dtype=np.int64)
        self._counts = np.zeros(len(self._ids), dtype=np.float32)

    def add(self, token: int) -> None:
        """Note a written token."""
        place = self._places.setdefault(token, len(self._places))
        if place == len(self._ids):
            self._ids, self._counts = np.resize(self._ids, 2 * place), np.resize(self._counts, 2 * place)
            self._counts[place:] = 0
        self._ids[place] = token
        self._counts[place] += 1

    @property
    def ids(self) -> Array:
        """Tokens of the prompt and of what is written, each once: (M,)."""
        return self._ids[: len(self._places)]

    @property
    def counts(self) -> Array:
        """How often each of them was written: (M,), 0 for those that stand in the prompt alone."""
        return self._counts[: len(self._places)]


def token_weights(params: SamplingParams, prompt_ids: Sequence[int]) -> TokenWeights | None:
    """Those of a request at its beginning; None where its settings leave every token's logit as it is."""
    is_plain = (params.repetition_penalty, params.presence_penalty, params.frequency_penalty) == (1, 0, 0)
    return None if is_plain and not params.logit_bias else TokenWeights(params, prompt_ids)


def weighed(logits: Array, weights: Sequence[TokenWeights | None]) -> Array:
    """Logits to draw from, (B, vocab_size): the same array where no row has any weights, else a copy.

    The bias comes first, then the repetition penalty (Keskar et al., "CTRL", arXiv:1909.05858, section 4.1, with
    negative logits multiplied), then presence and frequency: logit - frequency x count - presence x (count > 0), count
    being how often the token was written.
    """
    rows = [(row, own) for row, own in enumerate(weights) if own is not None]
    if not rows:
        return logits
    values = logits.copy()
    biased = [(row, own) for row, own in rows if len(own.bias_ids)]
    if biased:
        at = _places(biased, [own.bias_ids for _, own in biased])
        values[at] += np.concatenate([own.biases for _, own in biased])
    repeated = [(row, own) for row, own in rows if own.repetition != 1]
    if repeated:
        at = _places(repeated, [own.ids for _, own in repeated])
        penalty = _spread([own.repetition for _, own in repeated], [own.ids for _, own in repeated])
        values[at] = np.where(values[at] > 0, values[at] / penalty, values[at] * penalty)
    counted = [(row, own) for row, own in rows if own.presence or own.frequency]
    if counted:
        ids, counts = [own.ids for _, own in counted], np.concatenate([own.counts for _, own in counted])
        frequency = _spread([own.frequency for _, own in counted], ids)
        presence = _spread([own.presence for _, own in counted], ids)
        values[_places(counted, ids)] -= frequency * counts + presence * (counts > 0)
    return values


def _places(rows: Sequence[tuple[int, TokenWeights]], ids: Sequence[Array]) -> tuple[Array, Array]:
    """Row and column of every token of some rows: both (sum of M,)."""
    return np.repeat([row for row, _ in rows], [len(own) for own in ids]), np.concatenate(ids)


def _spread(values: Sequence[float], ids: Sequence[Array]) -> Array:
    """The value of each row for every token of it: (sum of M,)."""
    return np.repeat(np.array(values, dtype=np.float32), [len(own) for own in ids])
