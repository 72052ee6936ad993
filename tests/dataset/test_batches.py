"""The order contract: which tokens each step and rank sees."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from slm_ray.config.schema import IGNORED_TARGET
from slm_ray.dataset.batches import TrainBatches, evaluation_batches
from slm_ray.dataset.samples import SampleOrder, permutation
from slm_ray.dataset.stream import TokenStream
from slm_ray.errors import UserError


def stream(n_targets: int) -> TokenStream:
    """An end-of-text token 0, then the tokens 1, 2, 3, ..., so that a token tells its own place."""
    return TokenStream.of_split(np.arange(1, n_targets + 1, dtype=np.uint16), n_targets, 0)


def batches(n_targets: int, rank: int = 0, world_size: int = 1, seed: int = 0) -> TrainBatches:
    return TrainBatches.of_stream(
        stream(n_targets), seq_len=4, batch_size=6, seed=seed, rank=rank, world_size=world_size
    )


@given(st.integers(1, 500), st.integers(0, 2**40), st.integers(0, 50))
def test_an_epoch_is_a_permutation(n_samples: int, seed: int, epoch: int) -> None:
    assert sorted(permutation(n_samples, seed, epoch).tolist()) == list(range(n_samples))


def test_order_is_the_same_today_and_tomorrow() -> None:
    assert permutation(10, 0, 0).tolist() == GOLDEN_ORDER
    assert permutation(10, 0, 1).tolist() != GOLDEN_ORDER
    assert permutation(10, 1, 0).tolist() != GOLDEN_ORDER


@given(st.integers(1, 40), st.integers(1, 12), st.integers(0, 30))
def test_steps_cover_each_epoch_exactly_once(n_samples: int, batch_size: int, seed: int) -> None:
    order = SampleOrder(n_samples=n_samples, batch_size=batch_size, seed=seed)
    drawn = np.concatenate([order.samples(step) for step in range(2 * n_samples)])
    epochs = drawn[: 2 * n_samples].reshape(2, n_samples)
    assert [sorted(epoch) for epoch in epochs.tolist()] == [list(range(n_samples))] * 2


@pytest.mark.parametrize("world_size", [1, 2, 3, 6])
def test_ranks_together_see_the_same_samples_whatever_their_number(world_size: int) -> None:
    for step in (0, 3, 7):
        shares = [batches(100, rank, world_size).at(step).inputs for rank in range(world_size)]
        assert np.concatenate(shares).tolist() == batches(100).at(step).inputs.tolist()


def test_targets_are_the_inputs_one_token_later() -> None:
    found = batches(100).at(5)
    assert found.inputs.shape == found.targets.shape == (6, 4)
    assert (found.targets == found.inputs + 1).all()


def test_an_epoch_trains_on_every_token_once() -> None:
    one = batches(4 * 18)
    targets = np.concatenate([one.at(step).targets.ravel() for step in range(3)])
    assert sorted(targets.tolist()) == list(range(1, 4 * 18 + 1))


def test_the_first_token_is_predicted_from_an_end_mark() -> None:
    first = next(iter(evaluation_batches(stream(8), seq_len=4, batch_size=1)))
    assert first[0].tolist() == [[0, 1, 2, 3]]
    assert first[1].tolist() == [[1, 2, 3, 4]]


@given(st.integers(1, 200), st.integers(1, 9), st.integers(1, 5), st.integers(1, 4))
def test_evaluation_covers_every_target_once_over_all_ranks(
    n_targets: int, seq_len: int, batch_size: int, world_size: int
) -> None:
    seen = [
        targets[targets != IGNORED_TARGET]
        for rank in range(world_size)
        for _, targets in evaluation_batches(
            stream(n_targets), seq_len=seq_len, batch_size=batch_size, rank=rank, world_size=world_size
        )
    ]
    assert sorted(np.concatenate(seen).tolist()) == list(range(1, n_targets + 1))


def test_a_split_too_small_for_one_sample_is_refused() -> None:
    with pytest.raises(UserError, match="has 3 tokens, and one sample needs 4"):
        batches(3)


GOLDEN_ORDER = [7, 0, 8, 2, 3, 1, 6, 9, 4, 5]
