"""Several data sets by weights: each in its own order, each sample once, shares exact in every block."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from slm_ray.config.schema import IGNORED_TARGET
from slm_ray.dataset import samples as of_samples
from slm_ray.dataset.batches import TrainBatches
from slm_ray.dataset.manifest import BLOCK, shared_out
from slm_ray.dataset.mixture import MixedSamples, located
from slm_ray.dataset.packing import Packing
from slm_ray.dataset.samples import DRAWN_AT_ONCE, SAMPLES, permutation
from tests.dataset.test_packing import stream

weights_of_several = st.lists(st.floats(0.01, 5), min_size=2, max_size=4)


@given(weights_of_several, st.integers(1, 10**6))
def test_shares_add_up_and_are_as_near_as_whole_numbers_can_be(weights: list[float], whole: int) -> None:
    shares = shared_out(weights, whole)
    assert sum(shares) == whole
    for share, weight in zip(shares, weights, strict=True):
        assert abs(share - weight / sum(weights) * whole) < 1.001


def test_the_example_of_shares() -> None:
    assert shared_out([2, 1], 10) == [7, 3]


def test_weights_whose_sum_is_no_number_are_shared_out() -> None:
    assert shared_out([1e308, 1e308], 10) == [5, 5] and shared_out([1.5e308, 5e307, 1e-300], 8) == [6, 2, 0]


@settings(max_examples=20)
@given(weights_of_several, st.integers(0, 2**62), st.integers(0, 5))
def test_every_block_has_the_next_samples_of_each_once(weights: list[float], seed: int, block: int) -> None:
    quotas = shared_out(weights, BLOCK)
    which, own = located(np.arange(block * BLOCK, (block + 1) * BLOCK), quotas, seed)
    for number, quota in enumerate(quotas):
        assert sorted(own[which == number].tolist()) == list(range(block * quota, (block + 1) * quota))


def mixed(packing: str, seed: int) -> MixedSamples:
    streams = [stream([5, 9, 3, 8, 2, 7]), stream([4, 4, 12])]
    parts = tuple(SAMPLES[packing](one, 6, seed) for one in streams)  # type: ignore[index]
    return MixedSamples(("a", "b"), parts, (7_000, 3_000), seed)


@settings(max_examples=30)
@given(st.sampled_from(["windows", "stories"]), st.integers(0, 2**40), st.integers(1, 4), st.integers(0, 5000))
def test_ranks_together_see_the_same_samples_whatever_their_number(
    packing: str, seed: int, workers: int, step: int
) -> None:
    samples = mixed(packing, seed)
    whole = TrainBatches(samples=samples, batch_size=12, rank=0, world_size=1)
    ranks = [TrainBatches(samples=samples, batch_size=12, rank=rank, world_size=workers) for rank in range(workers)]
    expected, parts = whole.at(step), [rank.at(step) for rank in ranks]
    for name in ("inputs", "targets"):
        assert np.concatenate([getattr(part, name) for part in parts]).tolist() == getattr(expected, name).tolist()
    assert {part.n_targets for part in parts} == {int((expected.targets != IGNORED_TARGET).sum())}


def test_each_row_is_that_of_its_own_data_set() -> None:
    samples, numbers = mixed("stories", 3), np.arange(40)
    which, own = located(numbers, samples.quotas, 3)
    rows = samples.rows(numbers)
    assert rows.places is not None
    for place, (number, one) in enumerate(zip(which.tolist(), own.tolist(), strict=True)):
        alone = samples.parts[number].rows(np.array([one]))
        assert alone.places is not None
        assert rows.inputs[place].tolist() == alone.inputs[0].tolist()
        assert rows.places[place].tolist() == alone.places[0].tolist()


@pytest.mark.parametrize("stories", [[40_000, 300, 90_000], [7, 40_000]])
def test_windows_of_each_part_are_put_in_order_once_an_epoch(
    stories: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[tuple[int, ...]] = []
    monkeypatch.setattr(of_samples, "permutation", lambda *given: made.append(given) or permutation(*given))
    parts = tuple(SAMPLES["windows"](stream([n]), 1, 0) for n in stories)
    samples = MixedSamples(tuple("abc"[: len(stories)]), parts, tuple(shared_out([1] * len(stories), BLOCK)), 0)
    for step in range(2 * BLOCK // 256):
        samples.rows(np.arange(step * 256, (step + 1) * 256))
    assert len(made) == len({*made})


def test_a_small_part_of_whole_stories_is_drawn_once(monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[int] = []
    original = Packing.pieces
    monkeypatch.setattr(Packing, "pieces", lambda one, *given: drawn.append(1) or original(one, *given))
    parts = tuple(SAMPLES["stories"](stream([5] * n), 6, 0) for n in (3, 4_000))
    samples = MixedSamples(("a", "b"), parts, (BLOCK // 2, BLOCK // 2), 0)
    for step in range(BLOCK // 256):
        numbers = np.arange(step * 256, (step + 1) * 256)
        samples.rows(numbers)
        samples.n_targets(numbers)
    assert len(drawn) == 2 * -(-BLOCK // 2 // DRAWN_AT_ONCE)


def test_it_says_what_each_part_is() -> None:
    assert mixed("windows", 0).describe().startswith("samples: 70.00% of a (5 windows of 6 tokens an epoch")


def test_the_order_is_the_same_today_and_tomorrow() -> None:
    which, own = located(np.arange(8), [7_000, 3_000], 5)
    assert [which.tolist(), own.tolist()] == GOLDEN


@pytest.mark.parametrize("quotas", [[BLOCK], [BLOCK - 1, 1]])
def test_a_share_may_be_all_or_one(quotas: list[int]) -> None:
    which, own = located(np.arange(BLOCK), quotas, 0)
    assert np.bincount(which).tolist() == quotas and own.max() == max(quotas) - 1


GOLDEN = [[0, 0, 1, 0, 0, 0, 1, 0], [6529, 5931, 453, 1888, 1401, 4528, 439, 6180]]
