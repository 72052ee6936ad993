"""Copied spans are exact: those of a search of every text in every story."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from slm_ray.evaluation import copied_spans
from slm_ray.evaluation.copied_spans import GRAM, Copied, CopiedSpans
from slm_ray.evaluation.stories import StoryBlock

END = 0
stories = st.lists(st.lists(st.integers(1, 2), max_size=30), max_size=6)


def block_of(texts: list[list[int]]) -> StoryBlock:
    with_end = [[*text, END] for text in texts]
    return StoryBlock(
        story_ids=[str(number) for number in range(len(texts))],
        tokens=np.array([token for text in with_end for token in text], np.uint16),
        ends=np.concatenate([[0], np.cumsum([len(text) for text in with_end])]).astype(np.int64),
        n_bytes=np.ones(len(texts), np.int64),
    )


def stands_in(part: list[int], training: list[list[int]]) -> bool:
    return any(story[at : at + len(part)] == part for story in training for at in range(len(story)))


def brute_force(text: list[int], training: list[list[int]]) -> Copied:
    """Every span of the text is looked for at every place of every story."""
    grams = [text[at : at + GRAM] for at in range(len(text) - GRAM + 1)]
    spans = [
        (stop - start, start)
        for start in range(len(text))
        for stop in range(start + GRAM, len(text) + 1)
        if stands_in(text[start:stop], training)
    ]
    longest = max((length for length, _ in spans), default=0)
    return Copied(
        n_grams=len(grams),
        n_found=sum(stands_in(gram, training) for gram in grams),
        longest=longest,
        start=min((start for length, start in spans if length == longest), default=0),
    )


@settings(max_examples=150)
@given(written=stories, training=stories)
def test_they_are_those_of_brute_force(written: list[list[int]], training: list[list[int]]) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(copied_spans, "PIECE_TOKENS", 20)
        spans = CopiedSpans(written)
        if training:
            spans.add(block_of(training[:3]))
            spans.add(block_of(training[3:]))
    assert spans.results() == [brute_force(text, training) for text in written]


def test_a_hash_proves_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """With a hash that looks at the first two tokens alone, wrong hits are many and all are found out."""

    def poor(windows: "np.ndarray[tuple[int, int], np.dtype[np.int64]]", multiplier: np.uint64) -> object:
        return (windows[:, 0].astype(np.uint64) * np.uint64(3) + windows[:, 1].astype(np.uint64)) << np.uint64(50)

    monkeypatch.setattr(copied_spans, "_hash", poor)
    random = np.random.default_rng(0)
    training = random.integers(1, 5, (40, 60)).tolist()
    text = [1, 2, *training[3][10:25], 3, 3]
    spans = CopiedSpans([text[:9]])
    spans.add(block_of(training))
    assert spans.results() == [brute_force(text[:9], training)]


def test_two_grams_of_one_hash_take_another_multiplier(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(copied_spans, "_MULTIPLIERS", (0, copied_spans._MULTIPLIERS[0]))
    text = list(range(1, 40))
    spans = CopiedSpans([text])
    spans.add(block_of([text[5:30]]))
    assert spans.results() == [Copied(n_grams=32, n_found=18, longest=25, start=5)]


def test_no_span_goes_over_the_end_of_a_story() -> None:
    spans = CopiedSpans([[1, 2, 3, 4, 5, 6, 7, 8, 9, 10]])
    spans.add(block_of([[1, 2, 3, 4, 5], [6, 7, 8, 9, 10]]))
    assert spans.results() == [Copied(n_grams=3, n_found=0, longest=0, start=0)]


def test_short_texts_and_none_at_all() -> None:
    for texts in ([], [[]], [[1, 2, 3]]):
        spans = CopiedSpans(texts)
        spans.add(block_of([[1, 2, 3] * 10]))
        assert spans.results() == [Copied(n_grams=0, n_found=0, longest=0, start=0) for _ in texts]


def test_no_span_goes_from_one_text_into_the_next() -> None:
    spans = CopiedSpans([[1, 2, 3, 4, 5, 6, 7, 8], [2, 3, 4, 5, 6, 7, 8, 9]])
    spans.add(block_of([[1, 2, 3, 4, 5, 6, 7, 8, 9]]))
    assert [found.longest for found in spans.results()] == [8, 8]


def test_a_span_is_not_taken_up_again_after_a_break() -> None:
    spans = CopiedSpans([[2, *[1] * 7, 3], [1] * 8])
    spans.add(block_of([[2, *[1] * 8, 3]]))
    assert [found.longest for found in spans.results()] == [8, 8]
