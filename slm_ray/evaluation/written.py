"""What a model writes and how that scores, beside people's endings of the same stories.

In: a model, a split for the beginnings, the training split for what is copied. Out: the stories and both scores, as
plain values.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

from slm_ray.evaluation.measurement import Data, Subject
from slm_ray.evaluation.scores import StoryScores, score_stories
from slm_ray.evaluation.writing import MAX_TOKENS, WrittenStory, own_endings, prompts_of, sampling, write_stories


@dataclasses.dataclass(frozen=True, kw_only=True)
class Written:
    """Stories and their scores."""

    stories: list[WrittenStory]
    scores: StoryScores
    own_endings: StoryScores
    """Of the held-out stories that the beginnings are from, as they really go on."""

    def to_record(self) -> dict[str, Any]:
        """Plain values for JSON, the stories left out."""
        params = sampling(0)
        return {
            "sampling": {"temperature": params.temperature, "top_k": params.top_k, "max_tokens": MAX_TOKENS},
            "scores": self.scores.to_record(),
            "own_endings": self.own_endings.to_record(),
        }


def write_and_score(found: Subject, data: Data, n_beginnings: int) -> Written:
    """Let a model go on with the beginnings of so many held-out stories and with the fixed list, and score it.

    Raises:
        UserError: the data has no training stories, a shard is damaged, or the context is too short for a beginning.
    """
    rows = data.manifest.splits[data.split].rows
    prompts = prompts_of(data.stories(), rows, n_beginnings, found.tokenizer)
    return score(write_stories(found.model, found.tokenizer, prompts), found, data, n_beginnings)


def score(stories: Sequence[WrittenStory], found: Subject, data: Data, n_beginnings: int) -> Written:
    """Score stories that were written for the beginnings of a split. Raises: as `write_and_score`."""
    rows = data.manifest.splits[data.split].rows
    endings = own_endings(prompts_of(data.stories(), rows, n_beginnings, found.tokenizer), found.tokenizer)
    scores, own = score_stories(
        [stories, endings],
        data.stories("train"),
        found.tokenizer,
        is_sample_corpus=data.is_sample_corpus,
    )
    return Written(stories=list(stories), scores=scores, own_endings=own)
