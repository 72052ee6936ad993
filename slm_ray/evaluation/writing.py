"""Stories that a model writes to be scored: the same beginnings and seeds for every model of a data set.

In: a model, a split. Out: `WrittenStory`s, and beside them the held-out stories' own endings, cut to the same length:
what the scores of people's stories are. The engine of the server writes, on its fastest backend.
"""

import dataclasses
from collections.abc import Iterable, Sequence

from slm_ray.errors import UserError
from slm_ray.evaluation.stories import StoryBlock, story_text
from slm_ray.generation.backend_choice import make_backend
from slm_ray.generation.detokenizer import TextStream
from slm_ray.generation.engine import Engine
from slm_ray.generation.sampling import SamplingParams
from slm_ray.model.decoder import Decoder
from slm_ray.preparation.words import first_words
from slm_ray.tokenization.tokenizer import Tokenizer

FIXED_PROMPTS = (
    "Once upon a time",
    "Once upon a time, there was a little girl named Lily.",
    "One day, a boy named Tim",
    "There was a big dog who",
    "It was a cold night and",
    "Tom and Mia were best friends. They",
    "The old man had a secret:",
    '"Can we go to the park?" asked',
    "In the forest lived a small rabbit that was afraid of",
    "Sara was sad because",
)
SEEDS_OF_FIXED = 2
HELD_OUT_WORDS = 8
"""Words of a held-out story that the model is given."""
SLOTS = 16
"""Stories written at once; fixed, since a matrix product may round by the number of its rows."""
MAX_TOKENS = 256


@dataclasses.dataclass(frozen=True, kw_only=True)
class Prompt:
    """The beginning of a story, and the seed of what follows."""

    text: str
    seed: int
    story_id: str = ""
    """The held-out story that it begins; empty for one of the fixed list."""
    ending: str = ""
    """How that story goes on."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class WrittenStory:
    """A beginning and what was written after it, by a model or by a story's own author."""

    prompt: str
    text: str
    """Without the prompt."""
    tokens: tuple[int, ...]
    """Of `text`, without an end-of-text token."""
    is_ended: bool
    """Whether it came to its end by itself within `MAX_TOKENS`."""
    seed: int = 0
    story_id: str = ""

    @property
    def whole(self) -> str:
        """The prompt and what follows."""
        return self.prompt + self.text


def sampling(seed: int) -> SamplingParams:
    """How stories are written to be scored: the temperature and cut-off that `generate.py` has."""
    return SamplingParams(max_tokens=MAX_TOKENS, temperature=0.7, top_k=50, seed=seed)


def prompts_of(blocks: Iterable[StoryBlock], n_stories: int, count: int, tokenizer: Tokenizer) -> list[Prompt]:
    """Beginnings of `count` held-out stories, evenly spaced over all n_stories, then the fixed list.

    Raises:
        UserError: as the blocks are read, or a text does not come back from its tokens.
    """
    wanted = {number * n_stories // min(count, n_stories) for number in range(min(count, n_stories))}
    found: list[Prompt] = []
    first = 0
    for block in blocks:
        for number in range(len(block)):
            if first + number in wanted:
                text = story_text(block, number, tokenizer)
                beginning = first_words(text, HELD_OUT_WORDS)
                ending = text.removeprefix(beginning)
                found.append(Prompt(text=beginning, seed=len(found), story_id=block.story_ids[number], ending=ending))
        first += len(block)
    fixed = [Prompt(text=text, seed=seed) for text in FIXED_PROMPTS for seed in range(SEEDS_OF_FIXED)]
    return found + fixed


def write_stories(model: Decoder, tokenizer: Tokenizer, prompts: Sequence[Prompt]) -> list[WrittenStory]:
    """Let the model go on with every beginning.

    Raises:
        UserError: a beginning does not fit into the model's context.
    """
    longest = max((len(tokenizer.encode(prompt.text)) for prompt in prompts), default=0)
    if longest >= model.config.seq_len:
        raise UserError(
            f"the context of the model ({model.config.seq_len} tokens) is too short for beginnings of {longest}: "
            "such a model has no card"
        )
    engine = Engine(make_backend(model, SLOTS), tokenizer)
    params = [sampling(prompt.seed) for prompt in prompts]
    completions = engine.generate([prompt.text for prompt in prompts], params)
    return [
        WrittenStory(
            prompt=prompt.text,
            text=completion.text,
            tokens=completion.tokens,
            is_ended=completion.finish_reason == "stop",
            seed=prompt.seed,
            story_id=prompt.story_id,
        )
        for prompt, completion in zip(prompts, completions)
    ]


def text_of(tokens: Sequence[int], prompt: str, tokenizer: Tokenizer) -> str:
    """The text of what was written after a beginning, as the engine gives it."""
    stream = TextStream(tokenizer, tokenizer.encode(prompt))
    return "".join(map(stream.push, tokens)) + stream.flush()


def own_endings(prompts: Sequence[Prompt], tokenizer: Tokenizer) -> list[WrittenStory]:
    """How the held-out stories really go on, cut to as many tokens as a model may write."""
    endings: list[WrittenStory] = []
    for prompt in prompts:
        if not prompt.story_id:
            continue
        tokens = tokenizer.encode(prompt.ending)
        kept = tokens[:MAX_TOKENS]
        endings.append(
            WrittenStory(
                prompt=prompt.text,
                text=tokenizer.decode(kept) if len(kept) < len(tokens) else prompt.ending,
                tokens=tuple(kept),
                is_ended=len(tokens) < MAX_TOKENS,
                story_id=prompt.story_id,
            )
        )
    return endings
