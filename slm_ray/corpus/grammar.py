"""The embedded sample corpus: short children's stories from a seeded grammar, for offline demos and tests.

In: a range of story numbers and a seed. Out: their texts. It stands where a downloaded data set would (`--source
sample`). A story is about one of the `heroes`, who loses a thing and finds it with a friend's help; `consistency` can
check that a text keeps to its hero. The words and sentences are in `words`, `scenes` and `plots`.

Story number i is a pure function of (seed, i), whose choices `dice` makes.
"""

import functools
import itertools
import re
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from slm_ray.corpus import scenes, words
from slm_ray.corpus.dice import Dice
from slm_ray.corpus.heroes import Hero, heroes
from slm_ray.corpus.plots import Plot

SAMPLE_REVISION = "3"
"""Names this text. Bump it, and the digest in `tests/corpus/test_grammar.py`, whenever any story changes."""

MIN_WORDS, MAX_WORDS = 100, 250
MAX_GAP_WORDS = 60
"""The hero is named again after at most so many words, so that any 128 tokens say whom the story is about."""


def sample_stories(start: int, stop: int, seed: int = 0) -> Iterator[str]:
    """Stories number `start` to `stop - 1`, each `MIN_WORDS` to `MAX_WORDS` words of ASCII text.

    Any range gives the same story i. About half of the stories have paragraphs, parted by a single newline.
    """
    return (compose_story(number, seed) for number in range(start, stop))


def compose_story(number: int, seed: int = 0) -> str:
    """Story `number`; a draft that is too short or long, or silent about its hero for too long, is drawn again."""
    drafts = (_draft(Dice(seed, number, attempt)) for attempt in itertools.count())
    return next(text for hero, text in drafts if _is_sound(text, hero))


def _is_sound(text: str, hero: str) -> bool:
    silences = [len(between.split()) for between in text.split(hero)]
    return MIN_WORDS <= len(text.split()) <= MAX_WORDS and max(silences) <= MAX_GAP_WORDS


# --- templates: `[a|b]` is a choice, `{name}` a field or a pool -------------------------------------------------


class Field(NamedTuple):
    """`{name}` in a template: a word of the story's cast, or a fresh draw from a pool."""

    name: str


class Choice(NamedTuple):
    """`[a|b]` in a template."""

    options: tuple["Node", ...]


Node = tuple[str | Field | Choice, ...]

_TOKEN = re.compile(r"([\[\]|])|\{(\w+)\}|([^\[\]|{}]+)")


@functools.cache
def _parse(template: str) -> Node:
    """`"a [b|{c}]"` -> `("a ", Choice((("b",), (Field("c"),))))`; choices may nest."""
    stack: list[list[list[str | Field | Choice]]] = [[[]]]
    for mark, field, text in _TOKEN.findall(template):
        if mark == "[":
            stack.append([[]])
        elif mark == "|":
            stack[-1].append([])
        elif mark == "]":
            options = stack.pop()
            stack[-1][-1].append(Choice(tuple(tuple(option) for option in options)))
        else:
            stack[-1][-1].append(Field(field) if field else text)
    assert len(stack) == 1, f"unbalanced brackets in {template!r}"
    return tuple(stack[0][0])


def _expand(node: Node, cast: dict[str, str], dice: Dice) -> str:
    parts = []
    for part in node:
        if isinstance(part, str):
            parts.append(part)
        elif isinstance(part, Choice):
            parts.append(_expand(dice.pick(part.options), cast, dice))
        else:
            parts.append(cast[part.name] if part.name in cast else dice.pick(words.POOLS[part.name]))
    return "".join(parts)


# "an umbrella", but "a useful tool": the exceptions that the word lists could meet.
_ARTICLE = re.compile(r"\b([Aa]) (?=[aeiou])(?!us|uni|one\b|eu)")


def _with_articles(text: str) -> str:
    return _ARTICLE.sub(r"\1n ", text)


# --- one story --------------------------------------------------------------------------------------------------


class Teller:
    """Turns templates into sentences about one cast."""

    def __init__(self, dice: Dice, cast: dict[str, str]) -> None:
        self.dice = dice
        self.cast = cast
        self._detail = dice.pick((0, 40, 100))  # some storytellers are brief, some are not

    def tell(self, templates: Sequence[str]) -> str:
        """One of the templates, with all its choices made."""
        return _expand(_parse(self.dice.pick(templates)), self.cast, self.dice)

    def maybe(self, percent: int, templates: Sequence[str]) -> list[str]:
        """The same in `percent` of 100 detailed stories, else nothing."""
        return [self.tell(templates)] if self.dice.chance(percent * self._detail // 100) else []


def _draft(dice: Dice) -> tuple[str, str]:
    """The hero's name, and a story of any length."""
    hero = dice.pick(heroes())
    thing = dice.pick(hero.things)
    teller = Teller(dice, dict(hero.cast))
    teller.cast.update(_choose_others(dice, hero))
    teller.cast.update(_choose_scene(dice, thing, is_animal=hero.is_animal))
    teller.cast["use"] = teller.tell((thing.use,))
    teller.cast["origin"] = " ".join(teller.maybe(90, scenes.ORIGINS[thing.origin]))

    begin = dice.pick((_classic, _classic, _outing_first, _loss_first))
    paragraphs = [
        *begin(teller, thing, [teller.tell(scenes.COMPANIONS)] if hero.plot.friend_from_start else []),
        *_search_and_find(teller, hero.plot),
        [*teller.maybe(35, scenes.TREATS), teller.tell(hero.plot.lessons), teller.tell(scenes.ENDINGS)],
    ]
    between = "\n" if dice.chance(50) else " "
    text = between.join(" ".join(" ".join(paragraph).split()) for paragraph in paragraphs)
    return hero.name, _with_articles(text)


def _classic(teller: Teller, thing: words.Thing, companion: list[str]) -> list[list[str]]:
    tell = teller.tell
    return [
        [tell(scenes.OPENINGS), tell(scenes.BELONGINGS)],
        [tell(scenes.OUTINGS), *companion, tell(scenes.LOSSES[thing.size])],
    ]


def _outing_first(teller: Teller, thing: words.Thing, companion: list[str]) -> list[list[str]]:
    tell = teller.tell
    return [
        [tell(scenes.OUTINGS_FIRST), tell(scenes.INTRODUCTIONS), *teller.maybe(100, scenes.KNOWN_BELONGINGS)],
        [*companion, *teller.maybe(80, scenes.DOINGS), tell(scenes.LOSSES[thing.size])],
    ]


def _loss_first(teller: Teller, thing: words.Thing, companion: list[str]) -> list[list[str]]:
    tell = teller.tell
    del thing  # how it was lost is not told
    return [[tell(scenes.CRIES), *teller.maybe(100, scenes.KNOWN_BELONGINGS)], [tell(scenes.FLASHBACKS), *companion]]


def _search_and_find(teller: Teller, plot: Plot) -> list[list[str]]:
    """The search, with a change of the weather before the friend, after the friend, at the find, or not at all."""
    turn_at = teller.dice.pick((0, 1, 2, 3))
    turn = [[teller.cast["turn"]] if turn_at == moment else [] for moment in range(3)]
    answer = [] if plot.is_hard_to_tell else teller.maybe(80, scenes.ANSWERS)
    meeting = [] if plot.friend_from_start else [teller.tell(scenes.MEETINGS), *answer]
    search = teller.maybe(100, scenes.SEARCHES) or [teller.tell(scenes.SHORT_SEARCHES)]
    search = [*teller.maybe(75, scenes.FEELINGS), *search]
    return [
        [*search, *turn[0], *meeting, *turn[1], teller.tell(plot.ideas)],
        [*turn[2], teller.tell(plot.finds), *teller.maybe(60, scenes.JOYS)],
    ]


def _choose_others(dice: Dice, hero: Hero) -> dict[str, str]:
    """Who else is met, and what is eaten at the end."""
    finder = dice.pick(words.FINDERS[hero.is_animal])
    return {
        "the_finder": f"the {finder}",
        "The_finder": f"The {finder}",
        "creature": dice.pick(words.CREATURES),
        "snack": dice.pick(words.SNACKS),
    }


def _choose_scene(dice: Dice, thing: words.Thing, *, is_animal: bool) -> dict[str, str]:
    """The thing, the place with one true and two wrong spots that could hold it, and the weather there."""
    place = dice.pick([place for place in words.PLACES if ("a" if is_animal else "k") in place.who])
    weather = dice.pick([weather for weather in words.WEATHERS if weather.winter == place.winter])
    spot, wrong1, wrong2 = dice.sample(place.spots_for(thing.size), 3)
    doing1, doing2 = dice.sample(place.doings, 2)
    decoy1, decoy2 = dice.sample(words.DECOYS[place.winter], 2)
    return {
        "noun": thing.noun,
        "thing": f"{dice.pick(thing.adjectives)} {thing.noun}",
        "the_place": f"the {place.noun}",
        "at_place": f"{place.prefix} the {place.noun}",
        "weather": weather.adjective,
        "now": dice.pick(weather.now),
        "turn": dice.pick(weather.turn),
        "time": dice.pick(words.TIMES),
        "spot": spot,
        "Spot": spot.capitalize(),
        "wrong1": wrong1,
        "wrong2": wrong2,
        "decoy1": decoy1,
        "decoy2": decoy2,
        "doing1": doing1,
        "doing2": doing2,
    }
