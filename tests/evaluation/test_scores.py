"""Scores of texts whose scores one can count by hand."""

import pytest

from slm_ray.corpus.grammar import sample_stories
from slm_ray.corpus.instructions import with_instruction
from slm_ray.evaluation.heroes import Hero, hero_of
from slm_ray.evaluation.scores import score_stories, words_of
from slm_ray.evaluation.writing import WrittenStory
from slm_ray.tokenization.tokenizer import Tokenizer
from tests.evaluation.test_copied_spans import block_of

TOLD = "A girl named Lily ran. Lily lost her hat. Ben came. He saw it. Then Lily smiled and she sang."


@pytest.mark.parametrize(
    ("story", "expected"),
    [
        (TOLD, Hero("Lily", "she", True, True)),
        (TOLD.replace("lost her", "lost his"), Hero("Lily", "he", True, False)),
        (TOLD.replace("Then Lily smiled", "Then Ben smiled"), Hero("Lily", "she", False, True)),
        ('One day Tom sat. "I like her hat," Tom said. Tom ate his soup.', Hero("Tom", "he", True, True)),
        ("One day Tom met Mia and she laughed. Tom ate his soup.", Hero("Tom", "he", True, True)),
        ("The dog ran home. It was late. The dog slept.", None),
        ("On Monday Mom said that I may go. Then Mom slept.", None),
        ("", None),
    ],
)
def test_a_hero_is_found_and_followed(story: str, expected: Hero | None) -> None:
    assert hero_of(story) == expected


def test_words_are_runs_of_letters_and_single_characters_of_scripts_without_spaces() -> None:
    assert words_of("Don't stop, Tim's dog! 42 é") == ["don't", "stop", "tim's", "dog", "é"]
    assert words_of("小猫ran") == ["小", "猫", "ran"]


def written(tokenizer: Tokenizer, text: str, *, is_ended: bool = True) -> WrittenStory:
    return WrittenStory(prompt="Once", text=text, tokens=tuple(tokenizer.encode(text)), is_ended=is_ended)


def test_scores_are_counted_over_all_stories_of_a_group(tiny_tokenizer: Tokenizer) -> None:
    group = [
        written(tiny_tokenizer, " a b a b a b"),
        written(tiny_tokenizer, " a c", is_ended=False),
    ]
    training = block_of([tiny_tokenizer.encode("Once a b came.")])
    (got,) = score_stories([group], [training], tiny_tokenizer)
    assert (got.stories, got.words) == (2, 8)
    assert got.distinct_1 == 3 / 8
    assert got.distinct_2 == 3 / 6
    assert got.distinct_3 == 2 / 4
    assert got.repeated_4_grams == 1 / 3
    assert got.ended == 1 / 2
    assert (got.with_hero, got.hero_kept, got.corpus_thread) == (0, None, None)
    assert got.unknown_words == 1 / 8 and got.unknown_examples == ("c",)


def test_the_copied_text_is_shown_and_groups_stand_apart(tiny_tokenizer: Tokenizer) -> None:
    stories = list(sample_stories(0, 3))
    training = block_of([tiny_tokenizer.encode(story) for story in stories])
    copy = [written(tiny_tokenizer, stories[1][20:120])]
    fresh = [written(tiny_tokenizer, " xylophone quark")]
    got, other = score_stories([copy, fresh], [training], tiny_tokenizer, is_sample_corpus=True)
    assert got.copied_8_grams is not None and got.copied_8_grams > 0.5
    assert got.longest_copy_tokens >= 8 and got.longest_copy in stories[1]
    assert (other.copied_8_grams or 0) == 0 and other.longest_copy_tokens == 0 and other.longest_copy == ""
    assert other.unknown_words == 1.0
    assert got.corpus_thread is not None


def test_an_instruction_before_a_story_of_the_corpus_is_no_part_of_its_thread(tiny_tokenizer: Tokenizer) -> None:
    """One that repeats a sentence may begin with the friend's name."""
    told = [with_instruction(story, number.to_bytes(8)) for number, story in enumerate(sample_stories(0, 100))]
    group = [WrittenStory(prompt="", text=text, tokens=(1,), is_ended=True) for text in told]
    (got,) = score_stories([group], [block_of([[1, 2]])], tiny_tokenizer, is_sample_corpus=True)
    assert got.corpus_thread == 1.0


def test_nothing_written_has_no_shares(tiny_tokenizer: Tokenizer) -> None:
    (got,) = score_stories([[]], [block_of([[1, 2]])], tiny_tokenizer)
    assert (got.stories, got.words, got.distinct_1, got.ended, got.copied_8_grams) == (0, 0, None, None, None)
