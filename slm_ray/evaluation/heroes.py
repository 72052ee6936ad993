"""Does a story keep to its hero? A lexical check for any English story.

In: the text of a story. Out: the hero's name, and whether name and pronoun stay to the end. It knows no list of names:
a name is a word that is capitalised within a sentence and never written small. It is a rough measure: what it says of
the held-out stories, written by others, is the mark to hold a model's against. For stories of the sample corpus
`corpus.consistency` knows more.

    "A girl named Lily ran. Lily lost her hat. Then Lily smiled."  ->  Lily (she), name and pronoun kept
"""

import re
from dataclasses import dataclass

from slm_ray.corpus.consistency import narration

_FAMILY = {
    **dict.fromkeys(("he", "him", "his", "himself"), "he"),
    **dict.fromkeys(("she", "her", "hers", "herself"), "she"),
}
_WORD = re.compile(r"[^\W\d_]+")
_NO_NAMES = frozenset(
    (
        "I",
        "God",
        "Mr",
        "Mrs",
        "Ms",
        "Mom",
        "Mommy",
        "Mum",
        "Mummy",
        "Mama",
        "Dad",
        "Daddy",
        "Papa",
        "Grandma",
        "Grandpa",
        "Granny",
        "Christmas",
        "Monday",
        "Tuesday",
        "Wednesday",
        "Thursday",
        "Friday",
        "Saturday",
        "Sunday",
    )
)


@dataclass(frozen=True)
class Hero:
    """The first name of a story, and what becomes of it."""

    name: str
    pronoun: str
    """he or she; empty where no sentence about the hero has one."""
    is_name_kept: bool
    """The name comes again in the last third of the words."""
    is_pronoun_kept: bool
    """The first pronoun after the name is the same in every sentence that names the hero alone."""


def hero_of(story: str) -> Hero | None:
    """The hero of a story; None where nobody has a name."""
    sentences = [_WORD.findall(sentence) for sentence in narration(story)]
    words = _WORD.findall(story)
    names = _names(sentences, words)
    hero = next((word for word in words if word in names), None)
    if hero is None:
        return None
    pronouns = [found for sentence in sentences if (found := _pronoun(sentence, hero, names))]
    ending = words[-(len(words) // 3) :] if len(words) >= 3 else []
    return Hero(
        name=hero,
        pronoun=pronouns[0] if pronouns else "",
        is_name_kept=hero in ending,
        is_pronoun_kept=len(set(pronouns)) <= 1,
    )


def _names(sentences: list[list[str]], words: list[str]) -> frozenset[str]:
    small = {word for word in words if word[0].islower()}
    inside = {word for sentence in sentences for word in sentence[1:]}
    return frozenset(
        word
        for word in inside
        if word[0].isupper() and word[1:].islower() and word.lower() not in small and word not in _NO_NAMES
    )


def _pronoun(sentence: list[str], hero: str, names: frozenset[str]) -> str:
    """The family of the first pronoun after the hero's name, where no other name stands beside it."""
    if hero not in sentence or any(word in names for word in sentence if word != hero):
        return ""
    after = sentence[sentence.index(hero) + 1 :]
    return next((_FAMILY[word.lower()] for word in after if word.lower() in _FAMILY), "")
