"""Standard errors by story, and differences of two models on the same stories."""

import dataclasses
import math

import numpy as np
import pytest

from slm_ray.errors import UserError
from slm_ray.evaluation.comparison import (
    bits_per_byte_error,
    compare,
    loss_error,
    ratio_standard_error,
    t_quantile,
)
from slm_ray.evaluation.losses import StoryLosses


def losses(n: int, seed: int = 0, rate: float = 0.5) -> StoryLosses:
    random = np.random.default_rng(seed)
    n_bytes = random.integers(200, 2000, n)
    return StoryLosses(
        story_ids=tuple(f"story#{number}" for number in range(n)),
        nats=n_bytes * random.normal(rate, 0.05, n),
        n_tokens=n_bytes // 4,
        n_bytes=n_bytes,
    )


def test_the_standard_error_is_the_spread_over_samples_of_stories() -> None:
    population = losses(100_000)
    error = bits_per_byte_error(
        dataclasses.replace(
            population,
            story_ids=population.story_ids[:400],
            nats=population.nats[:400],
            n_tokens=population.n_tokens[:400],
            n_bytes=population.n_bytes[:400],
        )
    )
    bits, n_bytes = population.nats.reshape(-1, 400) / math.log(2), population.n_bytes.reshape(-1, 400)
    spread = (bits.sum(1) / n_bytes.sum(1)).std(ddof=1)
    assert error == pytest.approx(spread, rel=0.15)


def test_a_mean_of_equal_weights_has_the_textbook_error() -> None:
    values = np.array([1.0, 2.0, 4.0, 9.0])
    expected = values.std(ddof=1) / math.sqrt(4)
    assert ratio_standard_error(values, np.ones(4, np.int64)) == pytest.approx(expected, rel=1e-12)


def test_one_story_says_nothing_of_others() -> None:
    one = losses(1)
    assert math.isinf(bits_per_byte_error(one)) and math.isinf(loss_error(one))
    found = compare(one, losses(1))
    assert found.mean == 0 and math.isinf(found.standard_error) and (found.low, found.high) == (-math.inf, math.inf)


def test_pairing_takes_out_what_stories_have_in_common() -> None:
    first = losses(400)
    better = dataclasses.replace(first, nats=first.nats * 0.999)
    found = compare(better, first)
    assert found.mean == pytest.approx(-0.001 * first.bits_per_byte)
    assert found.high < 0
    assert found.standard_error < 0.01 * bits_per_byte_error(first)
    assert found.n_stories == 400
    turned = compare(first, better)
    assert (turned.mean, turned.low, turned.high) == pytest.approx((-found.mean, -found.high, -found.low))


def test_the_interval_holds_the_truth_95_times_in_100() -> None:
    held = 0
    for seed in range(400):
        first = losses(30, seed)
        noise = np.random.default_rng(10_000 + seed).normal(0.01, 0.03, 30)
        second = dataclasses.replace(first, nats=first.nats - noise * first.n_bytes)
        found = compare(first, second)
        held += found.low <= 0.01 / math.log(2) <= found.high
    assert 365 <= held <= 392


def test_the_order_of_the_stories_does_not_matter() -> None:
    first, second = losses(50), losses(50)
    second = dataclasses.replace(second, nats=second.nats + 1)
    place = np.random.default_rng(0).permutation(50)
    shuffled = StoryLosses(
        story_ids=tuple(second.story_ids[number] for number in place),
        nats=second.nats[place],
        n_tokens=second.n_tokens[place],
        n_bytes=second.n_bytes[place],
    )
    assert compare(first, shuffled) == compare(first, second)


def test_other_stories_are_refused() -> None:
    first = losses(5)
    with pytest.raises(UserError, match="same stories"):
        compare(first, losses(6))
    with pytest.raises(UserError, match="as story#0"):
        compare(first, dataclasses.replace(first, story_ids=("other", *first.story_ids[1:])))
    with pytest.raises(UserError, match="text of story#2 is another"):
        compare(first, dataclasses.replace(first, n_bytes=first.n_bytes + np.eye(5, dtype=int)[2]))
    with pytest.raises(UserError, match="one id"):
        compare(first, dataclasses.replace(first, story_ids=("story#1", *first.story_ids[1:])))


@pytest.mark.parametrize(("freedom", "expected"), [(1, 12.706), (2, 4.303), (3, 3.182), (10, 2.228), (423, 1.9656)])
def test_quantiles_are_those_of_the_tables(freedom: int, expected: float) -> None:
    assert t_quantile(freedom) == pytest.approx(expected, rel=2e-3)
