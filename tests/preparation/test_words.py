"""What a word is where no space says it; text with spaces is counted as ever."""

import random

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from slm_ray.preparation import near_duplicates
from slm_ray.preparation.cleaning import CleaningRules, examine
from slm_ray.preparation.words import UNSPACED, count_words, first_words, unspaced_starts

LETTERS = st.text(st.sampled_from("aé .,д日本。、ねカタｶไกมาខက𠀀😀\u0f40") | st.characters(exclude_categories=["Cs"]))


@given(LETTERS)
def test_the_bytes_where_a_word_begins_are_those_of_its_characters(text):
    content = text.encode()
    found = [content[first:last].decode() for first, last in zip(*unspaced_starts(np.frombuffer(content, np.uint8)))]
    assert found == UNSPACED.findall(text)


@given(st.text(st.sampled_from("aB 'é.д-—١\n")))
def test_text_with_spaces_is_divided_by_them_alone(text):
    assert count_words(text) == len(text.split())


def test_a_story_without_spaces_has_words_enough():
    story = "小猫在河边找到了一只红色的小船，大家都非常高兴。" * 4
    assert count_words(story) == 4 * 22
    assert examine(story.encode(), CleaningRules(min_words=10)) == (story, None)
    assert examine(story.encode(), CleaningRules(min_words=100))[1] == "too_few_words"


def chinese(rng: random.Random, n: int) -> str:
    return "".join(chr(rng.randrange(0x4E00, 0x9FA5)) for _ in range(n)) + "。"


@pytest.mark.parametrize("size", [2**20, 500])
def test_a_story_without_spaces_that_nearly_repeats_another_is_found(monkeypatch, size):
    """Words of a story were counted by its spaces: one shingle, the whole, which any change makes another."""
    monkeypatch.setattr(near_duplicates, "_BYTES_AT_ONCE", size)
    rng = random.Random(4)
    first = chinese(rng, 300)
    texts = [first, first[:100] + "新的" + first[102:], chinese(rng, 300), "Tom met 小猫 again"]
    signed = near_duplicates.signatures(pa.array(texts, pa.large_string()))
    assert near_duplicates.similarity(signed[:1], signed[1:2])[0] > 0.85
    assert near_duplicates.similarity(signed[:1], signed[2:3])[0] < 0.2
    for text, signature in zip(texts, signed, strict=True):  # whatever stands beside it
        assert (near_duplicates.signatures(pa.array([text], pa.large_string()))[0] == signature).all()


@pytest.mark.parametrize(
    ("text", "count", "expected"),
    [
        ("One  two three", 2, "One  two"),
        ("One\n\ntwo three", 2, "One\n\ntwo"),
        ("One", 8, "One"),
        ("小猫。Tom ran", 2, "小猫"),
        ("小猫。Tom ran", 3, "小猫。Tom"),
        ("", 3, ""),
    ],
)
def test_the_first_words_end_where_a_word_ends(text: str, count: int, expected: str) -> None:
    assert first_words(text, count) == expected
