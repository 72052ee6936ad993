"""The fair measure: each story after its own beginning, every token a target once.

In: blocks of stories, a `Scorer`. Out: `StoryLosses`, and the loss by position and by story length. A story begins as
generation begins: the end-of-text token is the first context. One longer than the context is seen in windows that
overlap by half. Sums are exact (`math.fsum`) over stories, so their order does not show.
"""

import dataclasses
import itertools
import math
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import numpy.typing as npt

from slm_ray.errors import UserError
from slm_ray.evaluation.scoring import Nats, Scorer
from slm_ray.evaluation.stories import StoryBlock

STORIES_AT_ONCE = 512
"""Stories whose windows are sorted into batches together."""

Row = dict[str, Any]
"""Plain values for JSON."""


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class StoryLosses:
    """What a model makes of each story of a split."""

    story_ids: tuple[str, ...]
    nats: Nats
    """(n,): summed loss of each story's tokens, its end-of-text token included."""
    n_tokens: npt.NDArray[np.int64]
    """(n,)"""
    n_bytes: npt.NDArray[np.int64]
    """(n,): UTF-8 bytes of each text; the end mark has none."""

    @property
    def total_nats(self) -> float:
        """Of all stories."""
        return math.fsum(self.nats)

    @property
    def bits_per_byte(self) -> float:
        """Total nats / ln 2 / total bytes."""
        return self.total_nats / math.log(2) / int(self.n_bytes.sum())

    @property
    def loss(self) -> float:
        """Nats a token."""
        return self.total_nats / int(self.n_tokens.sum())

    def of(self, chosen: npt.NDArray[np.bool_]) -> "StoryLosses":
        """Those of some stories. chosen: (n,)"""
        return StoryLosses(
            story_ids=tuple(itertools.compress(self.story_ids, chosen)),
            nats=self.nats[chosen],
            n_tokens=self.n_tokens[chosen],
            n_bytes=self.n_bytes[chosen],
        )

    def row(self) -> Row:
        """The counts and losses, as plain values."""
        return {
            "stories": len(self.story_ids),
            "tokens": int(self.n_tokens.sum()),
            "bytes": int(self.n_bytes.sum()),
            "loss": self.loss,
            "bits_per_byte": self.bits_per_byte,
        }


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Measured:
    """The losses of a split, and where in the stories they lie."""

    losses: StoryLosses
    by_position: list[Row]
    """Loss of the tokens at these places of their stories, 0 being the first: from, to, tokens, loss."""
    by_length: list[Row]
    """Loss of the stories of so many tokens: from, to, stories, tokens, bytes, loss, bits_per_byte."""


class InfiniteLossError(UserError):
    """A model was read and its loss is no finite number."""


def measure_stories(scorer: Scorer, blocks: Iterable[StoryBlock], start_id: int) -> Measured:
    """Score every story, each after the token that texts of its tokenizer begin with.

    Raises:
        InfiniteLossError: the model gives a loss that is no finite number.
        UserError: as the blocks are read; a token is not of the model's vocabulary.
    """
    ids: list[str] = []
    parts: list[tuple[Nats, npt.NDArray[np.int64], npt.NDArray[np.int64]]] = []
    positions = _Positions()
    for block in blocks:
        _check_vocabulary(block, scorer.vocab_size)
        for first in range(0, len(block), STORIES_AT_ONCE):
            numbers = range(first, min(first + STORIES_AT_ONCE, len(block)))
            texts = [np.concatenate([[start_id], block.story(number).astype(np.int64)]) for number in numbers]
            found = scorer.nats(texts)
            for number, nats in zip(numbers, found):
                if not np.isfinite(nats).all():
                    raise InfiniteLossError(
                        f"the loss of {block.story_ids[number]} is not finite: the model diverged in training"
                    )
                positions.add(nats)
            parts.append(
                (
                    np.array([math.fsum(nats) for nats in found]),
                    block.n_tokens[numbers.start : numbers.stop],
                    block.n_bytes[numbers.start : numbers.stop],
                )
            )
        ids += block.story_ids
    nats, n_tokens, n_bytes = (np.concatenate(column) for column in zip(*parts))
    losses = StoryLosses(story_ids=tuple(ids), nats=nats, n_tokens=n_tokens, n_bytes=n_bytes)
    return Measured(losses=losses, by_position=positions.rows(), by_length=by_length(losses))


def _check_vocabulary(block: StoryBlock, vocab_size: int) -> None:
    largest = int(block.tokens.max())
    if largest >= vocab_size:
        raise UserError(
            f"the data has the token {largest} and the vocabulary of the model ends at {vocab_size - 1}: "
            "they are not of one another"
        )


def edges() -> Iterator[int]:
    """Where the bins of positions and lengths begin: 0, 1, 2, 4, 8, 16, 32, 48, 64, 96, 128, 192, ..."""
    yield from (0, 1, 2, 4, 8, 16)
    for power in itertools.count(5):
        yield 2**power
        yield 3 * 2 ** (power - 1)


def bins(longest: int) -> list[tuple[int, int]]:
    """First and last number of each bin, up to the one with `longest` in it."""
    firsts = list(itertools.takewhile(lambda edge: edge <= longest, edges()))
    return list(zip(firsts, [*(edge - 1 for edge in firsts[1:]), longest]))


class _Positions:
    """Sums of loss by place in the story, added story after story."""

    def __init__(self) -> None:
        self._nats = np.zeros(0)
        self._counts = np.zeros(0, np.int64)

    def add(self, nats: Nats) -> None:
        missing = len(nats) - len(self._nats)
        if missing > 0:
            self._nats = np.append(self._nats, np.zeros(missing))
            self._counts = np.append(self._counts, np.zeros(missing, np.int64))
        self._nats[: len(nats)] += nats
        self._counts[: len(nats)] += 1

    def rows(self) -> list[Row]:
        rows: list[Row] = []
        for first, last in bins(len(self._nats) - 1):
            n_tokens = int(self._counts[first : last + 1].sum())
            loss = math.fsum(self._nats[first : last + 1]) / n_tokens
            rows.append({"from": first, "to": last, "tokens": n_tokens, "loss": loss})
        return rows


def by_length(losses: StoryLosses) -> list[Row]:
    """The losses of short and long stories; bins without a story are left out."""
    rows: list[Row] = []
    for first, last in bins(int(losses.n_tokens.max())):
        chosen = (first <= losses.n_tokens) & (losses.n_tokens <= last)
        if chosen.any():
            rows.append({"from": first, "to": last} | losses.of(chosen).row())
    return rows
