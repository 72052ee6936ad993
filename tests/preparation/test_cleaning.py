"""Cleaning, judging, hashing and splitting: pure functions of one text."""

import re
import time

import ftfy
import pytest
from ftfy.badness import BADNESS_RE, MOJIBAKE_CATEGORIES
from hypothesis import given, settings
from hypothesis import strategies as st

from slm_ray.preparation.cleaning import (
    _SUSPECT,
    CleaningRules,
    clean_story,
    examine,
    normalise_quotes,
    other_characters,
    rejection_reason,
    repair_encoding,
)
from slm_ray.preparation.rejections import REASONS
from slm_ray.preparation.splits import assign_split, is_sampled, story_hash

FRACTIONS = (0.02, 0.02)
ANY_LENGTH = CleaningRules(min_chars=0)
KNOWN_TO_FTFY = re.compile(f"[{''.join(MOJIBAKE_CATEGORIES.values())}]")
BROKEN = sorted(
    {chr(number) for number in range(0x80, 0x10000) if KNOWN_TO_FTFY.match(chr(number))}
    | {char for char in BADNESS_RE.pattern if not char.isascii()}
)
LONG_ENOUGH = "Once upon a time there was a small dog who liked to dig in the sand."


def test_all_white_space_becomes_single_spaces():
    assert clean_story(" One.\r\n\r\n Two\t words.\u00a0\u2003End \n") == "One. Two words. End"


@given(st.text(st.sampled_from("ab \n\u00a0"), max_size=40), st.integers(1, 9))
def test_a_giant_is_cleaned_like_any_other(text, part_chars):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("slm_ray.preparation.cleaning.PART_CHARS", part_chars)
        assert clean_story(text) == " ".join(text.split())


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


@pytest.mark.parametrize(
    ("rules", "reason"),
    [
        (CleaningRules(min_chars=0, min_words=4), None),
        (CleaningRules(min_chars=0, min_words=5), "too_few_words"),
        (CleaningRules(min_chars=0, max_other_characters=0.25), None),
        (CleaningRules(min_chars=0, max_other_characters=0.2), "other_characters"),
        (CleaningRules(min_chars=99, min_words=4, max_other_characters=0.0), "too_short"),
    ],
)
def test_filters_of_words_and_characters_have_a_limit_each(rules, reason):
    assert rejection_reason("“да no\nда”… aaaa", rules) == reason


def test_common_punctuation_is_not_other():
    assert other_characters("“It’s – well — done…” she said.") == 0
    assert [other_characters(text) for text in ("да", "dé", "plain")] == [1.0, 0.5, 0.0]


@pytest.mark.parametrize(
    ("broken", "whole"),
    [
        ("donâ€™t", "don’t"),
        ("â€œHi!â€\x9d said Zoë.", "“Hi!” said Zoë."),
        ("ZoÃ« ate a cafÃ© crÃ¨me Ã la carte", "Zoë ate a café crème à la carte"),
        ("Ã¢â‚¬â„¢", "’"),  # twice
        ("“It’s” and donâ€™t in one line", "“It’s” and don’t in one line"),
        ("one lineâ€¦\nand “another”", "one line…\nand “another”"),
        ("í\xa0½í¸\x80", "😀"),  # a pair of surrogates
    ],
)
def test_broken_utf8_is_repaired(broken, whole):
    assert repair_encoding(broken) == whole
    assert examine(broken.encode(), ANY_LENGTH) == (clean_story(whole), None)
    as_it_is = CleaningRules(min_chars=0, repair_encoding=False)
    assert examine(broken.encode(), as_it_is) == (clean_story(broken.replace("\xad", "")), None)


@pytest.mark.parametrize(
    "text", ["Zoë’s “café” — naïve…", "Это «рассказ»: “да”, – сказал он.", "ﬁne &amp; ½ Å 日本 ＡＢ"]
)
def test_text_that_is_not_broken_stays_as_it_is(text):
    assert repair_encoding(text) == text


def test_every_sign_of_broken_text_that_ftfy_knows_is_looked_at():
    """`repair_encoding` asks ftfy about suspicious texts only: here all pairs of the characters that ftfy knows."""
    n_signs = 0
    for one in BROKEN:
        text = "\n".join(f"x{one}{other}x x {one}{other} {one}{other}B" for other in [*BROKEN, "a", " ", "."])
        signs = [match[0] for match in BADNESS_RE.finditer(text)]
        assert [sign for sign in signs if not _SUSPECT.search(sign)] == []
        n_signs += len(signs)
    assert n_signs > 100_000


@given(st.text(st.sampled_from([*BROKEN, *"aZ .,\n\x1a", "日", "й", "\ufffd"]), max_size=12))
@settings(deadline=None)
def test_short_texts_are_repaired_as_ftfy_does_it_and_stay_text(text):
    repaired = repair_encoding(text)
    assert repaired == "\n".join(ftfy.fix_encoding(line) for line in text.split("\n"))
    repaired.encode("utf-8")


@given(st.text(st.characters(codec="utf-8")).filter(lambda text: not text.isascii()))
@settings(deadline=None)
def test_what_is_made_of_any_text_in_the_wrong_encoding_can_be_written(text):
    """Short and odd texts are not always guessed; whatever comes out has no half of a character."""
    repaired = repair_encoding(text.encode("utf-8").decode("latin-1"))
    assert repaired.encode("utf-8").decode("utf-8") == repaired


STORIES = [
    "Zoë’s “café” was naïve… — she said.",
    "Это «рассказ»: “да”, – сказал он.",
    "Der Bär aß Äpfel, größer war keiner.",
    "El niño comió piñas: ¡qué día!",
    "L’été, à l’école où ça va",
    "Ala ma kota, a źrebię śpi.",
    "Küçük bir ördeğin öyküsü: şişman, ığdır",
    "Είναι μια μικρή ιστορία.",
    "日本の猫は小さい。",
    "고양이는 작다",
    "😀 said Mia",
]


@pytest.mark.parametrize("encoding", ["latin-1", "cp1252"])
@pytest.mark.parametrize("text", STORIES)
def test_a_story_read_in_the_wrong_encoding_becomes_text_again(text, encoding):
    try:
        broken = text.encode("utf-8").decode(encoding)
    except UnicodeDecodeError:  # it would not have been read at all
        assert encoding == "cp1252"
        return
    assert broken != text
    assert repair_encoding(broken) == text


@pytest.mark.parametrize("text", ["é" * 10**6, "It’s a day. " * 10**5, "da да " * 10**5, "x" * 10**7])
def test_a_long_story_is_looked_at_in_no_time(text):
    start = time.perf_counter()
    assert repair_encoding(text) == text
    assert time.perf_counter() - start < 5  # ftfy on all of it would take longer, a search that goes back for ever


def test_curly_quotes_are_normalised_when_asked_for():
    curly = "“‘It’s’” „x‚ 5′ 6″ ʼtis a‐b a‑b 1–2 −3 well—no― wait… «é»"
    plain = "\"'It's'\" \"x' 5' 6\" 'tis a-b a-b 1-2 -3 well--no-- wait... «é»"
    assert normalise_quotes(curly) == plain
    assert examine(curly.encode(), ANY_LENGTH) == (curly, None)
    assert examine("donâ€™t".encode(), CleaningRules(min_chars=0, normalise_quotes=True)) == ("don't", None)


@pytest.mark.parametrize(
    ("raw", "text"),
    [
        ("\ufeffA story.", "A story."),  # byte order mark
        ("ï»¿A story.", "A story."),  # the same, broken
        ("A\u200b stor\u00ady\u2060.\ufeff", "A story."),
        ("👨\u200d👩 می\u200cخواهم", "👨\u200d👩 می\u200cخواهم"),
        ("One.\u2028Two.\u2029Three.\x85Four.\x0cFive.", "One.\nTwo.\nThree.\nFour.\nFive."),
    ],
)
def test_invisible_characters_and_rare_line_breaks(raw, text):
    rules = CleaningRules(min_chars=0, keep_paragraphs=True, repair_encoding="\x85" not in raw)
    assert examine(raw.encode(), rules) == (text, None)


@pytest.mark.parametrize(
    ("raw", "reason"),
    [
        ("\ud800 alone".encode("utf-8", "surrogatepass"), "invalid_utf8"),
        (b"a\x00b", "control_characters"),
        ("À\x80 is a NUL in disguise".encode(), "control_characters"),
        ("\ufeff \u200b\u2060\u00a0\n".encode(), "empty"),
        (b"", "empty"),
    ],
)
def test_what_is_not_a_text_has_its_reason(raw, reason):
    assert examine(raw, ANY_LENGTH)[1] == reason


@given(st.binary(), st.builds(CleaningRules, keep_paragraphs=st.booleans(), normalise_quotes=st.booleans()))
@settings(deadline=None)
def test_whatever_is_examined_becomes_text_with_a_known_reason(raw, rules):
    text, reason = examine(raw, rules)
    assert reason is None or reason in REASONS
    text.encode("utf-8")


@given(st.text(st.characters(max_codepoint=127)))
def test_white_space_is_all_that_changes_plain_ascii(text):
    rules = CleaningRules(normalise_quotes=True)
    assert examine(text.encode(), rules)[0] == clean_story(text)


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
