"""Cleaning, judging, hashing and splitting: pure functions of one text."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from slm_ray.text import (
    CleaningRules,
    assign_split,
    clean_story,
    examine,
    is_sampled,
    rejection_reason,
    story_hash,
)

FRACTIONS = (0.02, 0.02)
LONG_ENOUGH = "Once upon a time there was a small dog who liked to dig in the sand."


def test_all_white_space_becomes_single_spaces():
    assert clean_story(" One.\r\n\r\n Two\t words.\u00a0\u2003End \n") == "One. Two words. End"


def test_paragraphs_are_kept_as_single_line_breaks():
    assert clean_story(" One.\r\n\r\n\n Two  words.\n", keep_paragraphs=True) == "One.\nTwo words."


@given(st.text(), st.booleans())
def test_cleaning_a_clean_story_changes_nothing(text, keep_paragraphs):
    once = clean_story(text, keep_paragraphs)
    assert clean_story(once, keep_paragraphs) == once


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (LONG_ENOUGH, None),
        ("", "empty"),
        ("Too short.", "too_short"),
        (LONG_ENOUGH * 400, "too_long"),
        (LONG_ENOUGH + "\x00", "control_characters"),
        (LONG_ENOUGH + " It said <|endoftext|> and ran.", None),
    ],
)
def test_each_unfit_story_has_its_reason(text, reason):
    assert rejection_reason(text) == reason


def test_the_limits_themselves_are_accepted():
    rules = CleaningRules(min_chars=5, max_chars=5)
    assert [rejection_reason("a" * n, rules) for n in (4, 5, 6)] == ["too_short", None, "too_long"]


def test_bytes_that_are_not_utf8_are_rejected_and_shown():
    assert examine(b"caf\xe9", CleaningRules()) == ("caf\ufffd", "invalid_utf8")


@given(st.text())
def test_copies_that_differ_in_white_space_and_ascii_case_share_hash_and_split(text):
    copy = "\n\n  ".join(f" {text} ".split(" ")).replace("a", "A")
    assert story_hash(copy) == story_hash(text)
    assert assign_split(copy, FRACTIONS) == assign_split(text, FRACTIONS)


@given(st.lists(st.text(), unique=True), st.randoms())
def test_splits_do_not_depend_on_order(texts, random):
    splits = {text: assign_split(text, FRACTIONS) for text in texts}
    random.shuffle(texts)
    assert {text: assign_split(text, FRACTIONS) for text in texts} == splits


def test_splits_have_the_shares_asked_for():
    splits = [assign_split(f"story {number}", (0.1, 0.2)) for number in range(5000)]
    assert splits.count("validation") == pytest.approx(500, abs=70)
    assert splits.count("test") == pytest.approx(1000, abs=100)


def test_nothing_is_split_off_at_fraction_zero():
    assert {assign_split(f"story {number}", (0.0, 0.0)) for number in range(200)} == {"train"}


def test_sample_and_split_use_different_bits():
    digests = [story_hash(f"story {number}") for number in range(4000)]
    sampled = [digest for digest in digests if is_sampled(digest, 0.25)]
    assert len(sampled) == pytest.approx(1000, abs=120)
    validation = [digest for digest in sampled if int.from_bytes(digest[:8]) < 2**63]
    assert len(validation) == pytest.approx(len(sampled) / 2, abs=80)


def test_hashes_stay_what_they_were():
    assert story_hash("Once  upon\na TIME").hex() == "c8981b6ed121be8a09034862226a19f2"
