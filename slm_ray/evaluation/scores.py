"""Scores of written stories, computed without any outside service, the same anywhere.

In: stories that a model wrote, and the training stories. Out: how varied they are, how often they repeat themselves,
how many end and keep to their hero, which words no training story has, how much is copied. The same scores of the
held-out stories' own endings stand beside them.
"""

import dataclasses
import re
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from slm_ray.corpus.consistency import follows_thread
from slm_ray.corpus.instructions import without_instruction
from slm_ray.evaluation.copied_spans import Copied, CopiedSpans
from slm_ray.evaluation.heroes import hero_of
from slm_ray.evaluation.stories import StoryBlock
from slm_ray.evaluation.writing import WrittenStory
from slm_ray.preparation.words import UNSPACED
from slm_ray.tokenization.tokenizer import Tokenizer

REPEATED = 4
"""Words of an n-gram that is looked for again in the same story."""
SHOWN_WORDS = 20
_ALONE = UNSPACED.pattern
_LETTER = rf"[^\W\d_{_ALONE[1:-1]}]"
_WORD = re.compile(rf"{_ALONE}|{_LETTER}+(?:['’]{_LETTER}+)*")


@dataclasses.dataclass(frozen=True, kw_only=True)
class StoryScores:
    """Scores of some stories together. A share is from 0 to 1; one of nothing is none."""

    stories: int
    words: int
    """Of what was written after the beginnings."""
    distinct_1: float | None
    """Different words over all words (Li et al., arXiv:1510.03055)."""
    distinct_2: float | None
    """The same of pairs of words."""
    distinct_3: float | None
    repeated_4_grams: float | None
    """Share of the 4-grams of words that stood in the same story before (Welleck et al., arXiv:1908.04319)."""
    ended: float | None
    """Share of stories that came to their end by themselves."""
    with_hero: float | None
    """Share of stories in which somebody has a name."""
    hero_kept: float | None
    """Of these, the share whose first name comes again in the last third."""
    pronoun_kept: float | None
    """Of those with a pronoun for the hero, the share that never changes it."""
    corpus_thread: float | None
    """Share that passes the sample corpus's own check; of models of that corpus alone."""
    unknown_words: float | None
    """Share of the words that no training story has."""
    unknown_examples: tuple[str, ...]
    """The first of them."""
    copied_8_grams: float | None
    """Share of the 8-grams of tokens that stand in a training story."""
    longest_copy_tokens: int
    """Longest span of tokens that stands in a training story, of 8 or more."""
    longest_copy: str
    """Its text."""
    mean_longest_copy_tokens: float | None
    """Mean over the stories of the longest span of each."""

    def to_record(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return dataclasses.asdict(self) | {"unknown_examples": list(self.unknown_examples)}


def words_of(text: str) -> list[str]:
    """The words of a text in small letters; a character of a script without spaces is a word by itself."""
    return _WORD.findall(text.lower())


def score_stories(
    groups: Sequence[Sequence[WrittenStory]],
    training: Iterable[StoryBlock],
    tokenizer: Tokenizer,
    *,
    is_sample_corpus: bool = False,
) -> list[StoryScores]:
    """Scores of each group of stories, with one pass over the training stories for all of them.

    tokenizer: of the training stories, and of the written tokens. is_sample_corpus: whether the training stories are
    those of the embedded corpus, whose own check then applies.
    """
    everything = [story for group in groups for story in group]
    spans = CopiedSpans([story.tokens for story in everything])
    unseen = {word for story in everything for word in words_of(story.text)}
    for block in training:
        spans.add(block)
        unseen -= _words_of_block(block, tokenizer) if unseen else set()
    copied = iter(spans.results())
    return [
        _scores(group, [next(copied) for _ in group], unseen, tokenizer, is_sample_corpus=is_sample_corpus)
        for group in groups
    ]


def _words_of_block(block: StoryBlock, tokenizer: Tokenizer) -> set[str]:
    texts = (tokenizer.decode(block.story(number).tolist()) for number in range(len(block)))
    return set(words_of("\n".join(texts)))


def _scores(
    group: Sequence[WrittenStory],
    copied: Sequence[Copied],
    unseen: set[str],
    tokenizer: Tokenizer,
    *,
    is_sample_corpus: bool,
) -> StoryScores:
    words = [words_of(story.text) for story in group]
    heroes = [hero for story in group if (hero := hero_of(story.whole)) is not None]
    with_pronoun = [hero for hero in heroes if hero.pronoun]
    unknown = [word for one in words for word in one if word in unseen]
    n_words = sum(map(len, words))
    best = max(range(len(group)), key=lambda number: copied[number].longest, default=None)
    repeats = [_repeats(one) for one in words]
    return StoryScores(
        stories=len(group),
        words=n_words,
        distinct_1=_distinct(words, 1),
        distinct_2=_distinct(words, 2),
        distinct_3=_distinct(words, 3),
        repeated_4_grams=_share(sum(again for again, _ in repeats), sum(count for _, count in repeats)),
        ended=_share(sum(story.is_ended for story in group), len(group)),
        with_hero=_share(len(heroes), len(group)),
        hero_kept=_share(sum(hero.is_name_kept for hero in heroes), len(heroes)),
        pronoun_kept=_share(sum(hero.is_pronoun_kept for hero in with_pronoun), len(with_pronoun)),
        corpus_thread=_share(sum(follows_thread(without_instruction(story.whole)) for story in group), len(group))
        if is_sample_corpus
        else None,
        unknown_words=_share(len(unknown), n_words),
        unknown_examples=tuple(dict.fromkeys(unknown))[:SHOWN_WORDS],
        copied_8_grams=_share(sum(one.n_found for one in copied), sum(one.n_grams for one in copied)),
        longest_copy_tokens=copied[best].longest if best is not None else 0,
        longest_copy=_span(group[best], copied[best], tokenizer) if best is not None else "",
        mean_longest_copy_tokens=_share(sum(one.longest for one in copied), len(copied)),
    )


def _span(story: WrittenStory, copied: Copied, tokenizer: Tokenizer) -> str:
    return tokenizer.decode(story.tokens[copied.start : copied.start + copied.longest])


def _share(part: int, whole: int) -> float | None:
    return part / whole if whole else None


def _n_grams(words: Sequence[str], n: int) -> Iterator[tuple[str, ...]]:
    return zip(*(words[first:] for first in range(n)))


def _distinct(texts: Sequence[Sequence[str]], n: int) -> float | None:
    grams = [gram for words in texts for gram in _n_grams(words, n)]
    return _share(len(set(grams)), len(grams))


def _repeats(words: Sequence[str]) -> tuple[int, int]:
    """N-grams of one story that stood in it before, and all of them."""
    grams = list(_n_grams(words, REPEATED))
    return len(grams) - len(set(grams)), len(grams)
