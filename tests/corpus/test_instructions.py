"""Instructions that their stories fulfil, and templates that give the server's prompts."""

import hashlib
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from slm_ray.corpus import instructions
from slm_ray.corpus.grammar import sample_stories
from slm_ray.corpus.instructions import STORY_MARK, features, instruction_of, instruction_prompt, sentences
from slm_ray.corpus.lexicon import find_words
from slm_ray.runs import checkpoint
from slm_ray.runs.train_state import TrainState
from slm_ray.tokenization.tokenizer import END_OF_TEXT, Tokenizer
from tests.support.tiny_model import talkative_model

STORIES = list(sample_stories(0, 150))
STORY = (
    'Tom wanted to share his red kite. "Come and play!" he said to the big dog. The dog was very happy. '
    "Mr. Hill saw them. In the end, Tom learned a lesson about friends."
)


def digest(text: str) -> bytes:
    return hashlib.blake2b(text.encode(), digest_size=16).digest()


def parts(instruction: str) -> dict[str, str]:
    *lines, last = instruction.removesuffix("\n").split("\n")
    assert last == "Story:"
    return dict(line.split(": ", 1) for line in lines)


def test_every_story_fulfils_its_instruction() -> None:
    seen: set[str] = set()
    for story in STORIES:
        found = parts(instruction_of(story, digest(story)))
        seen |= found.keys()
        flat = " ".join(story.split())
        assert all(word in flat for word in found.get("Words", flat[:1]).split(", "))
        assert set(found.get("Features", "Dialogue").split(", ")) <= {"Dialogue", "MoralValue"}
        assert flat.startswith(found.get("First sentence", "")) and flat.startswith(found.get("Summary", ""))
        assert found.get("Random sentence", flat) in flat
    assert seen == {"Words", "Features", "First sentence", "Random sentence", "Summary"}


def test_an_instruction_is_the_same_for_ever() -> None:
    """A change here changes data sets: `INSTRUCTION_FORMAT` counts up with it."""
    written = "".join(instructions.with_instruction(story, digest(story)) for story in (*STORIES, STORY))
    assert instructions.INSTRUCTION_FORMAT == 2
    assert hashlib.sha256(written.encode()).hexdigest()[:16] == "3caf92746236984e"
    assert instruction_of(STORY, bytes([2]) * 16) == "First sentence: Tom wanted to share his red kite.\nStory:\n"


def test_words_are_a_verb_a_noun_and_an_adjective() -> None:
    found = find_words(STORY)
    assert (found.verbs, found.nouns, found.adjectives) == (
        ["share"],
        ["kite", "dog", "lesson"],
        ["happy", "red", "big"],
    )
    assert find_words("The dog barks. The cat ran. She did not swim in the deep blue sea.")[:3] == (
        ["swim"],
        ["cat", "sea"],
        ["deep", "blue"],
    )
    german = find_words("Es war einmal ein kleiner Hund, der wollte gerne spielen.")
    assert german.others == ["einmal", "kleiner", "wollte", "gerne", "spielen"] and not german.verbs


def test_features_are_those_that_the_text_shows() -> None:
    assert features(STORY) == ["Dialogue", "MoralValue"]
    assert features('He had a "thing" and no words.') == []
    assert features("「こんにちは」と言いました。") == ["Dialogue"]


@pytest.mark.parametrize(
    "story",
    [
        'The "big" dog ran. The "old" dog sat down.',
        'She had a 5" stick, and he, a 7" one. It was 9" long, or 10".',
        'He said: "big dog" and ran. They called it "sun", she said.',
        "Le «chat» dort. Il aime le «lait», et dort.",
        "「犬」が走る。「猫」も走る。",
        "“Big” dogs, “old” dogs.",
    ],
)
def test_words_between_quotations_are_no_dialogue(story: str) -> None:
    assert features(story) == []


@pytest.mark.parametrize(
    "story",
    [
        'The "big" dog ran. "Sit down!" said Tom.',
        'A 5" stick. "Look," said Mia. It was 7" long.',
        '("Come," he said.)',
        'He said—"Come!"',
        '"One day.\n"Another day." he said.',
        "« Viens jouer ! » dit Tom.",
        "“Come.”",
        "「おいで。」",
    ],
)
def test_speech_is_dialogue(story: str) -> None:
    assert features(story) == ["Dialogue"]


def test_a_moral_is_a_lesson_that_was_learned() -> None:
    for told in (
        "Tom learned a lesson.",
        "Mia learned a very important lesson: share.",
        "It taught them a valuable lesson.",
        "The moral of the story is to share.",
        "He learnt the lesson.",
    ):
        assert features(told) == ["MoralValue"], told
    for told in (
        "Tom learned that the shop was closed.",
        "She taught a piano lesson.",
        "Tom learned his piano lesson.",
        "He never learned a lesson.",
        "They did not learn a lesson.",
        "The teacher taught a lesson on birds.",
        "His moral is low.",
    ):
        assert features(told) == [], told


def test_sentences_end_where_a_story_goes_on() -> None:
    assert sentences('"Stop!" said Tom.\nMr. Fox ran. Why? 今日は。明日も。') == [
        '"Stop!" said Tom.',
        "Mr. Fox ran.",
        "Why?",
        "今日は。",
        "明日も。",
    ]


@given(st.text(max_size=60), st.binary(min_size=8, max_size=16))
def test_a_story_too_short_for_a_part_goes_without(story: str, key: bytes) -> None:
    instruction = instruction_of(story, key)
    assert instruction.endswith(STORY_MARK) and instruction.count("\n") == instruction.rstrip("\n").count("\n") + 1
    assert instruction == instruction_of(story, key)
    assert instruction_of("Hi.", key) == STORY_MARK


def test_a_prompt_begins_the_tokens_of_its_text(tiny_tokenizer: Tokenizer) -> None:
    for story in STORIES[:20]:
        prompt = instruction_of(story, digest(story))
        assert instruction_prompt(prompt.removesuffix(STORY_MARK)) == prompt
        ids = tiny_tokenizer.encode(prompt)
        assert tiny_tokenizer.encode(prompt + story)[: len(ids)] == ids


def test_words_become_an_instruction() -> None:
    assert instructions.words_instruction([" kite ", "", "red  ball\n", " "]) == "Words: kite, red ball"
    assert instructions.words_instruction([]) == ""
    assert instruction_prompt(" ") == STORY_MARK


@pytest.fixture(scope="module", params=[instructions.STORY_TEMPLATE, instructions.INSTRUCTION_TEMPLATE])
def exported(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer: Tokenizer):  # type: ignore[no-untyped-def]
    folder = tmp_path_factory.mktemp("model") / "saved"
    state = TrainState(step=1, samples_seen=1, seed=0, world_size=1, data_fingerprint="", config={}, metrics=None)
    checkpoint.save(folder, talkative_model(tiny_tokenizer), tiny_tokenizer, state, {}, request.param)
    return folder, request.param


def test_transformers_makes_the_prompt_of_the_server(exported: Any, tiny_tokenizer: Tokenizer) -> None:
    from transformers import AutoTokenizer

    folder, template = exported
    opened = AutoTokenizer.from_pretrained(folder / checkpoint.MODEL)
    is_instructed = template == instructions.INSTRUCTION_TEMPLATE
    assert checkpoint.has_instructions(folder) == is_instructed
    for text in ("Words: kite, tree", " Once upon\na time {{ 7 }} ", "", "  \n", "<b>'&\""):
        messages = [{"role": "system", "content": "Be short."}, {"role": "user", "content": "Before."}]
        messages += [{"role": "assistant", "content": "No."}, {"role": "user", "content": text}]
        prompt = instruction_prompt(text) if is_instructed else text
        assert opened.apply_chat_template(messages, tokenize=False, add_generation_prompt=True) == END_OF_TEXT + prompt
        parts = [{"type": "text", "text": text}, {"type": "text", "text": "kite"}]
        joined = instruction_prompt(f"{text}\nkite") if is_instructed else f"{text}\nkite"
        asked = [{"role": "user", "content": parts}]
        assert opened.apply_chat_template(asked, tokenize=False) == END_OF_TEXT + joined
        ids = opened.apply_chat_template(messages, return_dict=False)
        assert ids == [tiny_tokenizer.eos_id, *tiny_tokenizer.encode(prompt)]


def test_a_checkpoint_without_a_template_still_verifies_and_has_no_instructions(exported: Any, tmp_path: Path) -> None:
    import shutil

    older = tmp_path / "older"
    shutil.copytree(exported[0], older)
    (older / checkpoint.MODEL / instructions.CHAT_TEMPLATE).unlink()
    (older / checkpoint.MARKER).unlink()
    checkpoint.commit_partial(older, tmp_path / "committed")
    assert checkpoint.Checkpoint.open(tmp_path / "committed").state.step == 1
    assert not checkpoint.has_instructions(tmp_path / "committed")
