"""The heroes of the sample corpus, as of a series of picture books: each one's friend, home, trait and things.

In: the word lists. Out: 36 heroes, the same forever. What they do is drawn anew for each story; who they are is not.
So each sentence of a story says something of its hero, and a small model learns within a million tokens to keep to
one: with heroes drawn together anew for every story it learned each sentence, and none of whom it spoke.
"""

import dataclasses
import functools

from slm_ray.corpus import words
from slm_ray.corpus.dice import Dice
from slm_ray.corpus.plots import PLOTS, Plot

THINGS_OF_ONE = 2
_KEY = 0x4E0  # of the dice that made them; another one makes other heroes

_PRONOUNS = {
    "he": {"he": "he", "him": "him", "his": "his", "himself": "himself"},
    "she": {"he": "she", "him": "her", "his": "her", "himself": "herself"},
}


@dataclasses.dataclass(frozen=True)
class Hero:
    """One of whom stories are told."""

    name: str
    is_animal: bool
    plot: Plot
    things: tuple[words.Thing, ...]  # one of which is lost in a story
    cast: dict[str, str]  # the fields of templates that stay the same in all stories


@functools.cache
def heroes() -> tuple[Hero, ...]:
    """All of them: two children to an animal, half of them girls. A friend is nobody else's and no hero."""
    casts = (
        *_pairs(words.BOYS, words.GIRLS, is_animal=False),
        *_pairs(words.HE_ANIMALS, words.SHE_ANIMALS, is_animal=True),
    )
    return tuple(_hero(number, *cast) for number, cast in enumerate(casts))


def _pairs(
    he_names: tuple[str, ...], she_names: tuple[str, ...], *, is_animal: bool
) -> list[tuple[str, str, bool, bool]]:
    """Hero, friend, whether the hero is "he", and whether both are animals: every name once."""
    half = len(he_names) // 2
    return [
        *((he, she, True, is_animal) for he, she in zip(he_names[:half], she_names[half:], strict=True)),
        *((she, he, False, is_animal) for she, he in zip(she_names[:half], he_names[half:], strict=True)),
    ]


def _hero(number: int, name: str, friend: str, is_he: bool, is_animal: bool) -> Hero:
    dice, plot = Dice(_KEY, number), PLOTS[number % len(PLOTS)]
    his, friends = (_PRONOUNS["he"], _PRONOUNS["she"])[:: 1 if is_he else -1]
    kinds = dice.sample(words.ANIMAL_KINDS, 2) if is_animal else ["boy", "girl"][:: 1 if is_he else -1]
    cast = {
        **his,
        **{word.capitalize(): pronoun.capitalize() for word, pronoun in his.items()},
        **{f"f{word}": pronoun for word, pronoun in friends.items()},
        "H": name,
        "F": friend,
        "kind": kinds[0],
        "fkind": kinds[1],
        "ffrom": f"the {kinds[1]}" if is_animal else dice.pick(words.FRIEND_HOMES),
        "trait": dice.pick(plot.traits),
        "hands": "paws" if is_animal else "hands",
        "fhands": "paws" if is_animal else "hands",
        "fhand": "paw" if is_animal else "hand",
        "bag": "bag" if is_animal else "pocket",
        "village": dice.pick(words.HOMES[is_animal]),
        "giver": dice.pick(words.GIVERS),
    }
    things = dice.sample([thing for thing in words.THINGS if thing.size in plot.sizes], THINGS_OF_ONE)
    return Hero(name, is_animal, plot, tuple(_as_owned(thing, dice) for thing in things), cast)


def _as_owned(thing: words.Thing, dice: Dice) -> words.Thing:
    """The thing with the one adjective that its owner's has in every story."""
    return dataclasses.replace(thing, adjectives=(dice.pick(thing.adjectives),))
