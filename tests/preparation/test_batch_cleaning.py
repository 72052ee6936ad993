"""Batches are cleaned exactly as single stories are."""

import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from slm_ray.preparation import batch_cleaning
from slm_ray.preparation.batch_cleaning import clean_texts
from slm_ray.preparation.cleaning import CleaningRules, examine
from slm_ray.preparation.splits import story_hash

CHARACTERS = "aB' .\n\t\r\x0b\x0c\x1c\x1f\x00\x07é’\u2028\u00a0\u200b\ufeffâ€™"
RULES = st.builds(
    CleaningRules,
    keep_paragraphs=st.booleans(),
    min_chars=st.integers(0, 3),
    max_chars=st.integers(4, 9),
    min_words=st.integers(0, 2),
    normalise_quotes=st.booleans(),
    max_other_characters=st.sampled_from([0.0, 0.5, 1.0]),
)
STORIES = st.lists(
    st.text(st.sampled_from(CHARACTERS), max_size=12).map(str.encode) | st.binary(max_size=6), max_size=9
)


def expected(raw: list[bytes], rules: CleaningRules) -> list[tuple[str, str | None, bytes | None]]:
    found = [examine(story, rules) for story in raw]
    return [(text, reason, story_hash(text) if reason is None else None) for text, reason in found]


def batched(raw: list[bytes], rules: CleaningRules) -> list[tuple[str, str | None, bytes | None]]:
    padded = pa.array([b"before", *raw, b"after"], pa.large_binary())  # a slice, as of a larger batch
    found = clean_texts(padded.slice(1, len(raw)), rules)
    return list(zip(found.texts.to_pylist(), found.reasons.to_pylist(), found.hashes.to_pylist()))


@given(STORIES, RULES)
def test_any_batch_gives_what_its_stories_give(raw, rules):
    assert batched(raw, rules) == expected(raw, rules)


@given(st.lists(st.text(st.sampled_from("aB' .\n\t\r\x0b"), max_size=12).map(str.encode), min_size=1), RULES)
def test_any_plain_batch_gives_what_its_stories_give(raw, rules):
    assert batched(raw, rules) == expected(raw, rules)


PIECES = [*batch_cleaning.COMMON, *"aB \n", "é", "â", "€", "™", "œ", "‚", "−", "Ò", "Γ", "Œ"]


@given(
    st.lists(
        st.text(st.sampled_from(PIECES), max_size=12).map(str.encode)
        | st.lists(st.sampled_from([b"\xe2", b"\x80", b"\x99", b"\x9c", b"\x82", b"\xe2\x80", b"a"]), max_size=6).map(
            b"".join
        ),
        max_size=9,
    ),
    RULES,
)
def test_any_batch_with_curly_quotes_and_parts_of_them_gives_what_its_stories_give(raw, rules):
    assert batched(raw, rules) == expected(raw, rules)


def test_stories_whose_only_signs_beyond_ascii_are_common_are_cleaned_together(monkeypatch):
    monkeypatch.setattr(batch_cleaning, "_examined", lambda *_: pytest.fail("one story after the other"))
    raw = [f"“Hello” – it’s {sign} me, said TOM… again and again".encode() for sign in batch_cleaning.COMMON]
    assert batched(raw, CleaningRules(min_chars=1)) == expected(raw, CleaningRules(min_chars=1))


@pytest.mark.parametrize("keep_paragraphs", [False, True])
def test_a_very_large_batch_is_cleaned_alike(monkeypatch, keep_paragraphs):
    monkeypatch.setattr(batch_cleaning, "MAX_BATCH_BYTES", 10)
    rules = CleaningRules(min_chars=1, keep_paragraphs=keep_paragraphs)
    raw = [b" One.\n\nTwo  words. ", b"Three."]
    assert batched(raw, rules) == expected(raw, rules)
