"""Whole stories in samples: each once an epoch, none left out, as tightly as best fit packs them."""

from collections import Counter
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st

from slm_ray.config.schema import IGNORED_TARGET
from slm_ray.dataset.batches import TrainBatches
from slm_ray.dataset.packing import Packing, Pieces, StoryIndex, best_fit
from slm_ray.dataset.samples import PIECES_AT_ONCE, PIECES_KEPT, StorySamples
from slm_ray.dataset.stream import TokenStream

END = 0
Lengths = list[int]
lengths_of_stories = st.lists(st.integers(1, 60), min_size=1, max_size=40)


def ends(lengths: Lengths) -> npt.NDArray[np.int64]:
    return np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)


def stream(lengths: Lengths) -> TokenStream:
    """Stories in which every token but the end mark tells its own place, from 1 on."""
    borders = ends(lengths)
    tokens = np.arange(1, borders[-1] + 1, dtype=np.uint16)
    tokens[borders[1:] - 1] = END
    return TokenStream.of_split(tokens, 7, END, borders)


def batches(lengths: Lengths, seq_len: int, batch_size: int, seed: int = 0, workers: int = 1) -> list[TrainBatches]:
    shape = {"seq_len": seq_len, "batch_size": batch_size, "seed": seed, "world_size": workers}
    return [TrainBatches.of_stream(stream(lengths), rank=rank, packing="stories", **shape) for rank in range(workers)]


def plain_best_fit(pieces: Lengths, seq_len: int) -> Lengths:
    """Room left in each sample, when one piece is placed after another."""
    rooms: Lengths = []
    for piece in sorted(pieces, reverse=True):
        fitting = [place for place, room in enumerate(rooms) if room >= piece]
        if fitting:
            rooms[min(fitting, key=rooms.__getitem__)] -= piece
        else:
            rooms.append(seq_len - piece)
    return sorted(rooms)


@given(st.data(), st.integers(1, 24))
def test_it_packs_as_best_fit_does_one_piece_after_another(data: st.DataObject, seq_len: int) -> None:
    pieces = data.draw(st.lists(st.integers(1, seq_len), min_size=1, max_size=60))
    found = best_fit(Counter(pieces), seq_len)
    assert sorted(seq_len - sum(pattern) for count, pattern in found for _ in range(count)) == plain_best_fit(
        pieces, seq_len
    )
    placed: Counter[int] = Counter()
    for count, pattern in found:
        for piece in pattern:
            placed[piece] += count
    assert placed == Counter(pieces)


def test_the_example_of_best_fit() -> None:
    assert sorted(best_fit({5: 2, 3: 3}, 8)) == [(1, [3]), (2, [5, 3])]


@given(lengths_of_stories, st.integers(2, 30), st.integers(0, 2**62), st.integers(0, 3))
def test_every_token_of_every_story_is_in_one_sample_of_an_epoch(
    lengths: Lengths, seq_len: int, seed: int, epoch: int
) -> None:
    packing = Packing(StoryIndex.of_ends(ends(lengths)), seq_len)
    numbers = packing.numbers(np.arange(packing.n_samples), seed, epoch)
    pieces = packing.pieces(numbers, seed, epoch)
    seen = np.zeros(sum(lengths), np.int64)
    fills = np.zeros(packing.n_samples, np.int64)
    for sample, story, start, length in zip(pieces.sample, pieces.story, pieces.start, pieces.length, strict=True):
        assert start + length <= lengths[story]
        assert start % seq_len == 0  # cut at whole contexts alone
        assert length == min(seq_len, lengths[story] - start)
        first = ends(lengths)[story] + start
        seen[first : first + length] += 1
        fills[sample] += length
    assert (seen == 1).all()
    assert (fills <= seq_len).all() and fills.tolist() == packing.fills(numbers).tolist()
    assert packing.n_tokens == sum(lengths)
    assert packing.n_cut_stories == sum(length > seq_len for length in lengths)


@given(lengths_of_stories, st.integers(2, 30), st.integers(1, 3), st.integers(1, 4), st.integers(0, 2**40))
def test_an_epoch_of_steps_trains_on_every_token_once_whatever_the_number_of_workers(
    lengths: Lengths, seq_len: int, share: int, workers: int, seed: int
) -> None:
    alone, *_ = batches(lengths, seq_len, share * workers, seed)
    ranks = batches(lengths, seq_len, share * workers, seed, workers)
    n_samples = alone.samples.n_samples
    targets, taken = [], 0
    for step in range(-(-2 * n_samples // (share * workers))):
        whole, parts = alone.at(step), [rank.at(step) for rank in ranks]
        for name in ("inputs", "targets", "places"):
            assert np.concatenate([getattr(part, name) for part in parts]).tolist() == getattr(whole, name).tolist()
        assert {part.n_targets for part in parts} == {int((whole.targets != IGNORED_TARGET).sum())}
        for row in whole.targets:
            if taken < 2 * n_samples:
                targets.append(row[row != IGNORED_TARGET].tolist())
            taken += 1
    tokens = stream(lengths).tokens[1:].tolist()
    for epoch in (targets[:n_samples], targets[n_samples:]):
        assert sorted(token for row in epoch for token in row) == sorted(tokens)


@given(lengths_of_stories, st.integers(2, 30), st.integers(0, 2**40))
def test_inputs_are_what_stands_before_each_target_in_its_own_story(lengths: Lengths, seq_len: int, seed: int) -> None:
    samples, tokens = StorySamples(stream(lengths), seq_len, seed), stream(lengths).tokens
    rows = samples.rows(np.arange(samples.n_samples))
    assert rows.places is not None
    for inputs, targets, places in zip(rows.inputs, rows.targets, rows.places):
        assert places[0] == 0 and ((np.diff(places) == 1) | (places[1:] == 0)).all()
        for place, (before, target) in enumerate(zip(inputs.tolist(), targets.tolist())):
            if target not in (IGNORED_TARGET, END):
                assert before == tokens[target - 1]  # a token tells its own place
            if place and target != IGNORED_TARGET and places[place]:
                assert before == targets[place - 1]


def test_what_is_cut_and_left_empty_is_told() -> None:
    packing = Packing(StoryIndex.of_ends(ends([9, 5, 3, 3])), 8)
    assert packing.describe() == (
        "samples: 4 whole stories in 3 samples of 8 tokens an epoch; 1 longer ones go on in another sample; "
        "16.67% of all places are left empty"
    )


def test_two_epochs_bring_other_stories_together() -> None:
    packing = Packing(StoryIndex.of_ends(ends([5] * 40 + [3] * 40)), 8)
    together = []
    for epoch in range(2):
        pieces = packing.pieces(np.arange(packing.n_samples), 0, epoch)
        together.append({frozenset(pieces.story[pieces.sample == sample].tolist()) for sample in range(40)})
    assert len(together[0] & together[1]) < 10


def test_a_story_that_goes_on_stands_before_those_that_begin() -> None:
    pieces = Packing(StoryIndex.of_ends(ends([11, 5])), 8).pieces(np.arange(2), 0, 0)
    rest = int(pieces.sample[pieces.start == 8][0])
    assert pieces.start[pieces.sample == rest].tolist() == [8, 0]
    assert pieces.start[pieces.sample != rest].tolist() == [0]


def test_the_order_is_the_same_today_and_tomorrow() -> None:
    pieces = Packing(StoryIndex.of_ends(ends([3, 9, 4, 2, 5, 1, 7])), 6)
    numbers = pieces.numbers(np.arange(pieces.n_samples), 3, 1)
    found = pieces.pieces(numbers, 3, 1)
    assert [numbers.tolist(), found.story.tolist(), found.start.tolist()] == GOLDEN


@given(lengths_of_stories, st.integers(2, 30), st.integers(0, 2**62))
def test_samples_of_several_epochs_are_found_together_as_each_alone(lengths: Lengths, seq_len: int, seed: int) -> None:
    packing = Packing(StoryIndex.of_ends(ends(lengths)), seq_len)
    epochs, places = np.divmod(np.arange(3 * packing.n_samples), packing.n_samples)
    numbers = packing.numbers(places, seed, epochs)
    found = packing.pieces(numbers, seed, epochs)
    for epoch in range(3):
        alone = packing.numbers(np.arange(packing.n_samples), seed, epoch)
        assert numbers[epochs == epoch].tolist() == alone.tolist()
        pieces, its = packing.pieces(alone, seed, epoch), epochs[found.sample] == epoch
        for name in ("story", "start", "length"):
            assert getattr(found, name)[its].tolist() == getattr(pieces, name).tolist()


@pytest.mark.parametrize("n_stories", [1, 2])
def test_as_few_stories_as_one_are_packed(n_stories: int) -> None:
    packing = Packing(StoryIndex.of_ends(ends([1] * n_stories)), 128)
    assert (packing.n_samples, packing.n_tokens) == (1, n_stories)


@pytest.mark.parametrize(("n_stories", "seq_len"), [(4_000, 1_000), (9_000, 60_000), (3, 1_000)])
def test_however_many_pieces_a_sample_has_few_are_in_memory(
    n_stories: int, seq_len: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn: list[int] = []
    original = Packing.pieces

    def recorded(packing: Packing, *given: Any) -> Pieces:
        found = original(packing, *given)
        drawn.append(len(found.sample))
        return found

    monkeypatch.setattr(Packing, "pieces", recorded)
    samples = StorySamples(stream([2] * n_stories), seq_len, 0)
    numbers = np.arange(samples.n_samples)
    targets = samples.rows(numbers).targets
    assert sorted(targets[targets != IGNORED_TARGET].tolist()) == sorted(stream([2] * n_stories).tokens[1:].tolist())
    assert samples.n_targets(numbers) == 2 * n_stories
    kept = samples._drawn.cache_info().maxsize
    assert max(drawn) <= PIECES_AT_ONCE and kept is not None and kept * max(drawn) <= PIECES_KEPT


GOLDEN = [[5, 3, 1, 2, 4, 0], [6, 2, 3, 1, 1, 0, 4, 5, 6], [6, 0, 0, 0, 6, 0, 0, 0, 0]]
