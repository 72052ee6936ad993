"""The same beginnings and seeds write the same stories."""

from pathlib import Path

import numpy as np
import pytest

from slm_ray.dataset.manifest import load_manifest
from slm_ray.errors import UserError
from slm_ray.evaluation.stories import StoryBlock, read_stories
from slm_ray.evaluation.writing import (
    FIXED_PROMPTS,
    HELD_OUT_WORDS,
    MAX_TOKENS,
    SEEDS_OF_FIXED,
    Prompt,
    own_endings,
    prompts_of,
    write_stories,
)
from slm_ray.tokenization.tokenizer import Tokenizer
from slm_ray.tokenization.training import train_bpe
from tests.support.tiny_model import talkative_model


@pytest.fixture
def prompts(tiny_data: Path, tiny_tokenizer: Tokenizer) -> list[Prompt]:
    return prompts_of(read_stories(str(tiny_data), "train", load_manifest(tiny_data)), 110, 4, tiny_tokenizer)


def test_beginnings_are_spread_over_the_split_and_followed_by_the_fixed_list(prompts: list[Prompt]) -> None:
    assert [prompt.story_id for prompt in prompts[:4]] == ["sample#0", "sample#27", "sample#55", "sample#82"]
    assert all(len(prompt.text.split()) == HELD_OUT_WORDS for prompt in prompts[:4])
    assert [prompt.text for prompt in prompts[4::SEEDS_OF_FIXED]] == list(FIXED_PROMPTS)
    assert len({(prompt.text, prompt.seed) for prompt in prompts}) == len(prompts)


def test_more_beginnings_than_stories_are_all_stories(tiny_data: Path, tiny_tokenizer: Tokenizer) -> None:
    found = prompts_of(read_stories(str(tiny_data), "validation", load_manifest(tiny_data)), 10, 40, tiny_tokenizer)
    assert sum(bool(prompt.story_id) for prompt in found) == 10


def test_stories_are_the_same_each_time(prompts: list[Prompt], tiny_tokenizer: Tokenizer) -> None:
    model = talkative_model(tiny_tokenizer)
    once, again = (write_stories(model, tiny_tokenizer, prompts) for _ in range(2))
    assert once == again
    assert [story.prompt for story in once] == [prompt.text for prompt in prompts]
    assert all(len(story.tokens) <= MAX_TOKENS for story in once)


def test_own_endings_are_those_of_the_held_out_stories(prompts: list[Prompt], tiny_tokenizer: Tokenizer) -> None:
    endings = own_endings(prompts, tiny_tokenizer)
    assert [ending.story_id for ending in endings] == [prompt.story_id for prompt in prompts[:4]]
    for ending, prompt in zip(endings, prompts):
        assert prompt.ending.startswith(ending.text)
        assert ending.is_ended == (ending.text == prompt.ending)
        assert tiny_tokenizer.decode(ending.tokens) == ending.text


def test_a_context_too_short_for_a_beginning_is_said(prompts: list[Prompt], tiny_tokenizer: Tokenizer) -> None:
    with pytest.raises(UserError, match=r"context of the model \(8 tokens\) is too short"):
        write_stories(talkative_model(tiny_tokenizer, seq_len=8), tiny_tokenizer, prompts)


def test_a_story_without_spaces_has_a_beginning_and_an_ending() -> None:
    story = "小猫去了公园。它看见一只狗。它们一起玩。" * 20
    tokenizer = train_bpe([story], vocab_size=257)
    ids = [*tokenizer.encode(story), tokenizer.eos_id]
    block = StoryBlock(
        story_ids=["a#0"],
        tokens=np.array(ids, np.uint16),
        ends=np.array([0, len(ids)]),
        n_bytes=np.array([len(story.encode())]),
    )
    prompt = prompts_of([block], 1, 1, tokenizer)[0]
    assert prompt.text == "小猫去了公园。它看" and prompt.text + prompt.ending == story
