"""Does a story keep to its hero? The check for the sample corpus and for a model that learned it.

In: the text of one story, written by `grammar` or by a model. Out: who its hero is and whether name, pronoun, thing
and cast stay the same to the end. It decides by one rule, which the grammar obeys (`scenes`): a sentence in
which the friend's name comes before the hero's name and before any pronoun speaks of the friend; every other
sentence speaks of the hero. Quoted speech is left out.

    "Tom lost a red kite. Mia shook her head. He cried."  ->  hero Tom (he), friend Mia (she), every pronoun fits
"""

import functools
import re
from dataclasses import dataclass
from typing import Literal

from slm_ray.corpus import words

THREAD_CHECK = 2
"""Counts the versions of this check: up by one with every change of what passes it. Cards of before name none."""
Pronoun = Literal["he", "she"]

_FAMILY: dict[str, Pronoun] = {
    **dict.fromkeys(("he", "him", "his", "himself"), "he"),
    **dict.fromkeys(("she", "her", "hers", "herself"), "she"),
}
_NO_NAMES = frozenset(("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday", "New", "Year"))
"""Written large by the corpus within a sentence, and nobody's name."""
_QUOTE = re.compile(r'"[^"]*"')
_SENTENCE_END = re.compile(r"(?<=[.!?])\s+")
_WORD = re.compile(r"[A-Za-z]+")
_LARGE_WITHIN = re.compile(r"(?:(?<=[a-z] )|(?<=[a-z], ))[A-Z][a-z]+")


@dataclass(frozen=True)
class Character:
    """A hero or a friend, known by name; each name of the corpus has one gender."""

    name: str
    pronoun: Pronoun


@dataclass(frozen=True)
class Thread:
    """What holds a story together, and which of it does hold."""

    hero: Character
    friend: Character | None
    thing: str | None
    is_name_kept: bool  # the hero's name comes again in the last third of the words
    are_pronouns_kept: bool  # every pronoun outside quotes fits the one its sentence speaks of
    is_thing_kept: bool  # the lost thing comes again in the last third, no other one is named, and a red one stays red
    is_cast_kept: bool  # nobody but the hero and one friend is ever named, by a name of the corpus or by another one

    @property
    def holds(self) -> bool:
        """All of it at once."""
        return self.is_name_kept and self.are_pronouns_kept and self.is_thing_kept and self.is_cast_kept


def follows_thread(story: str) -> bool:
    """True if the story has a known hero and keeps name, pronoun, thing and cast to its end."""
    thread = thread_of(story)
    return thread is not None and thread.holds


def thread_of(story: str) -> Thread | None:
    """The story's thread, or None if no name of the corpus occurs in it.

    The hero is the first known name, the friend the second, the thing the first known noun for a thing. Nothing is
    asked of places.
    """
    spoken = _WORD.findall(story)
    cast = list(dict.fromkeys(word for word in spoken if word in characters()))
    if not cast:
        return None
    hero = characters()[cast[0]]
    friend = characters()[cast[1]] if len(cast) > 1 else None
    nouns = _thing_pattern().findall(story)
    ending = " ".join(spoken[len(spoken) - len(spoken) // 3 :])
    return Thread(
        hero=hero,
        friend=friend,
        thing=nouns[0] if nouns else None,
        is_name_kept=hero.name in ending.split(),
        are_pronouns_kept=all(_fits(sentence, hero, friend) for sentence in narration(story)),
        is_thing_kept=len(set(nouns)) == 1
        and nouns[0] in _thing_pattern().findall(ending)
        and len(_qualities(story, nouns[0])) <= 1,
        is_cast_kept=len(cast) <= 2 and not _strangers(story, spoken),
    )


def _qualities(story: str, noun: str) -> set[str]:
    """What the story calls the thing by an adjective that the corpus has for things: "red" in "a red kite"."""
    return set(re.findall(rf"\b([a-z-]+) {noun}\b", story)) & _adjectives()


def _strangers(story: str, spoken: list[str]) -> set[str]:
    """Names that the corpus does not have: words written large within a sentence, and never small in the story."""
    small = {word for word in spoken if word.islower()}
    large = set(_LARGE_WITHIN.findall(story)) - characters().keys() - _NO_NAMES
    return {word for word in large if word.lower() not in small}


def narration(story: str) -> list[str]:
    """The sentences of a story with quoted speech taken out.

    `"Stop!" Tom ran.` gives two sentences, `"Stop!" said Tom.` one: speech ends a sentence only where it has an end
    mark of its own and a capital letter or more speech follows.
    """
    unquoted = _QUOTE.sub(lambda quote: _mark_left_by(quote[0], story[quote.end() :]), story)
    return [sentence for sentence in _SENTENCE_END.split(unquoted) if _WORD.search(sentence)]


def _mark_left_by(quote: str, following: str) -> str:
    ends_itself = quote[-2:-1] in (".", "!", "?")
    begins_anew = following.lstrip()[:1].isupper() or following.lstrip()[:1] == '"'
    return ". " if ends_itself and begins_anew else " "


def _fits(sentence: str, hero: Character, friend: Character | None) -> bool:
    """True if all pronouns of the sentence belong to the one it speaks of."""
    spoken = _WORD.findall(sentence)
    pronouns = {_FAMILY[word.lower()] for word in spoken if word.lower() in _FAMILY}
    leaders = (word for word in spoken if word in characters() or word.lower() in _FAMILY)
    is_about_friend = friend is not None and next(leaders, None) == friend.name
    owner = friend if is_about_friend and friend is not None else hero
    return pronouns <= {owner.pronoun}


@functools.cache
def characters() -> dict[str, Character]:
    """Every name of the corpus."""
    by_pronoun: dict[Pronoun, tuple[str, ...]] = {
        "he": words.BOYS + words.HE_ANIMALS,
        "she": words.GIRLS + words.SHE_ANIMALS,
    }
    return {name: Character(name, pronoun) for pronoun, names in by_pronoun.items() for name in names}


@functools.cache
def _adjectives() -> set[str]:
    return {adjective for thing in words.THINGS for adjective in thing.adjectives}


@functools.cache
def _thing_pattern() -> re.Pattern[str]:
    nouns = sorted((thing.noun for thing in words.THINGS), key=len, reverse=True)
    return re.compile(rf"\b(?:{'|'.join(nouns)})\b")
