"""The sample corpus: the same stories forever, sound English, and a thread that can be checked."""

import hashlib
import re
from functools import cache

import pytest

from slm_ray.corpus import plots, scenes
from slm_ray.corpus import words as words
from slm_ray.corpus.consistency import Thread, characters, follows_thread, narration, thread_of
from slm_ray.corpus.dice import Dice
from slm_ray.corpus.grammar import MAX_WORDS, MIN_WORDS, sample_stories

FIRST_100_SHA256 = "bca8e6bc5791e8544a77b014ed604004ef4c65b9790edd0243dcab7d8a6de1d2"
OTHER = {"he": "she", "him": "her", "his": "her", "himself": "herself", "she": "he", "her": "his", "herself": "himself"}


@cache
def twenty_thousand() -> tuple[str, ...]:
    return tuple(sample_stories(0, 20_000))


def stories() -> tuple[str, ...]:
    return twenty_thousand()[:2500]


@cache
def threads() -> tuple[Thread | None, ...]:
    return tuple(thread_of(story) for story in stories())


def test_first_stories_never_change_under_this_revision() -> None:
    text = "\0".join(sample_stories(0, 100))
    assert hashlib.sha256(text.encode()).hexdigest() == FIRST_100_SHA256, "bump SAMPLE_REVISION with the text"


def test_any_range_gives_the_same_story() -> None:
    assert list(sample_stories(40, 60)) == list(stories()[40:60])
    assert list(sample_stories(5, 5)) == []


def test_another_seed_gives_other_stories() -> None:
    assert not set(sample_stories(0, 200, seed=1)) & set(stories())


def test_dice_are_splitmix64() -> None:
    # The first outputs of the reference implementation for seed 0, whose state starts at 0.
    dice = Dice()
    assert [dice._next() for _ in range(2)] == [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4]


def test_every_story_has_100_to_250_words_of_ascii() -> None:
    assert all(MIN_WORDS <= len(story.split()) <= MAX_WORDS for story in stories())
    assert all(story.isascii() for story in stories())


def test_twenty_thousand_stories_are_all_different() -> None:
    assert len({story.casefold() for story in twenty_thousand()}) == 20_000


def test_vocabulary_is_rich() -> None:
    assert len(set(re.findall("[a-z]+", " ".join(stories()).lower()))) > 1300


def test_articles_fit_the_next_word() -> None:
    text = " ".join(stories())
    assert set(re.findall(r"\ba [aeiou]\w*", text, re.IGNORECASE)) == set()
    assert set(re.findall(r"\ban [^aeiou]\w*", text, re.IGNORECASE)) == set()


def test_sentences_begin_with_capitals_and_templates_are_filled() -> None:
    for story in stories():
        assert not re.search(r"[\[\]{}|]|  | [,.!?]|[.!?,]{2}", story), story
        assert all(sentence.lstrip(' "')[0].isupper() for sentence in re.split(r"(?<=[.!?])\s", story)), story
        assert story.count('"') % 2 == 0
        assert story[-1] == "."


def test_some_stories_have_paragraphs_parted_by_one_newline() -> None:
    with_paragraphs = [story for story in stories() if "\n" in story]
    assert 0.4 < len(with_paragraphs) / len(stories()) < 0.6
    assert not any("\n\n" in story or " \n" in story for story in with_paragraphs)


def test_every_story_follows_its_thread() -> None:
    assert [story for story, thread in zip(stories(), threads()) if not (thread and thread.holds)] == []
    assert all(follows_thread(story) for story in stories()[:20])


def test_hero_and_friend_are_of_different_gender_and_one_thing_is_lost() -> None:
    for story, thread in zip(stories(), threads()):
        assert thread and thread.friend and thread.thing, story
        assert thread.friend.pronoun != thread.hero.pronoun


def test_last_sentence_names_the_hero() -> None:
    for story, thread in zip(stories(), threads()):
        assert thread and re.search(rf"\b{thread.hero.name}\b", narration(story)[-1]), story


def test_thread_survives_joined_white_space() -> None:
    assert all(follows_thread(" ".join(story.split())) for story in stories()[:200])


def test_another_name_in_the_last_third_breaks_the_thread() -> None:
    for story in stories()[:200]:
        thread = thread_of(story)
        assert thread and thread.friend
        cut = len(story) // 2
        stranger = next(name for name in characters() if name not in (thread.hero.name, thread.friend.name))
        for other in (stranger, thread.friend.name):
            broken = story[:cut] + story[cut:].replace(thread.hero.name, other)
            assert not follows_thread(broken)


def test_swapped_pronouns_break_the_thread() -> None:
    for story in stories()[:200]:
        swapped = re.sub(r"\b(he|him|his|himself|she|her|herself)\b", lambda word: OTHER[word[0]], story)
        if any(re.search(rf"\b{pronoun}\b", sentence) for sentence in narration(story) for pronoun in OTHER):
            assert not follows_thread(swapped)


def test_another_thing_in_the_second_half_breaks_the_thread() -> None:
    for story in stories()[:200]:
        thread = thread_of(story)
        assert thread and thread.thing
        cut = len(story) // 2
        other = "drum" if thread.thing != "drum" else "kite"
        assert not follows_thread(story[:cut] + story[cut:].replace(thread.thing, other))


BROKEN = (
    "Once upon a time, there was a little girl named Lily. What Rufus liked most was his coin. He lost the coin. "
    "Flossie found it. Rufus hugged the coin.",
    "Tom had a kite. He lost the kite. Soon a boy called Bob cried. Mia found it. Tom took the kite.",
    'Tom had a kite. He lost the kite. "What is it, Bob?" asked Mia. Mia found it. Tom took the kite.',
    "Tom had a kite. He lost the kite. Mia looked up and saw a drum. Tom took the kite home.",
    "Tom had a kite. He lost the kite. Mia looked up and saw it. Tom took the drum and the kite home.",
    "Tom had a pink kite. He lost the kite. Mia looked up and saw the white kite. Tom hugged the kite.",
    "Tom kite",
    "kite Tom",
)
WHOLE = (
    "One Monday, Tom lost a kite. By New Year, Mia found it. Tom hugged the kite.",
    "Tom had a pink kite. He lost the lovely kite. Mia looked up and saw the pink kite. Tom hugged his kite.",
    "Tom lost a kite, and He cried, for he was sad. Mia found it. Tom hugged the kite.",
)


@pytest.mark.parametrize("story", BROKEN)
def test_a_stranger_another_thing_or_two_words_break_the_thread(story: str) -> None:
    """Written by hand; the first one as the demo's model goes on with a beginning that `evaluate.py` gives it."""
    assert not follows_thread(story)


@pytest.mark.parametrize("story", WHOLE)
def test_days_and_words_written_small_as_well_are_no_strangers(story: str) -> None:
    assert follows_thread(story)


def test_thread_reads_the_example_of_its_docstring() -> None:
    thread = thread_of("Tom lost a red kite. Mia shook her head. He cried.")
    assert thread and thread.friend
    assert (thread.hero.name, thread.hero.pronoun, thread.friend.name, thread.thing) == ("Tom", "he", "Mia", "kite")
    assert thread.are_pronouns_kept


def test_story_without_a_known_name_has_no_thread() -> None:
    assert thread_of("The dog ran away.") is None
    assert not follows_thread("")


@pytest.mark.parametrize(
    ("text", "sentences"),
    [
        ('"Stop!" Tom ran.', [" .  Tom ran."]),
        ('"Stop!" said Tom.', ["  said Tom."]),
        ('Tom said, "Go." "Why?" asked Mia. He left.', ["Tom said, .", "  asked Mia.", "He left."]),
    ],
)
def test_speech_ends_a_sentence_only_before_a_new_one(text: str, sentences: list[str]) -> None:
    assert [s.strip(" .") for s in narration(text)] == [s.strip(" .") for s in sentences]


def test_every_thing_has_three_spots_in_every_place() -> None:
    for place in words.PLACES:
        assert all(len(place.spots_for(thing.size)) >= 3 for thing in words.THINGS), place.noun


def test_every_field_of_a_template_is_known() -> None:
    """2,500 stories could miss a rare branch; this reads every template."""
    known = {"H", "F", "he", "him", "his", "himself", "He", "Him", "His", "fhe", "fhim", "fhis", "fhimself", "kind"}
    known |= {"fkind", "ffrom", "trait", "hands", "fhands", "fhand", "bag", "village", "giver", "the_finder"}
    known |= {"The_finder", "creature", "snack", "noun", "thing", "the_place", "at_place", "weather", "now", "time"}
    known |= {"spot", "Spot", "wrong1", "wrong2", "decoy1", "decoy2", "doing1", "doing2", "use", "origin"}
    texts = [text for value in vars(scenes).values() if isinstance(value, tuple) for text in value]
    texts += [text for table in (scenes.ORIGINS, scenes.LOSSES) for many in table.values() for text in many]
    texts += [text for plot in plots.PLOTS for text in (*plot.ideas, *plot.finds, *plot.lessons)]
    used = {field for text in texts for field in re.findall(r"\{(\w+)\}", text)}
    assert used <= known | set(words.POOLS)
    assert all(text.count("[") == text.count("]") for text in texts)
