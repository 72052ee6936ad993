"""The heroes of the sample corpus: who they are stays the same, and what they do does not."""

import collections

from slm_ray.corpus import words
from slm_ray.corpus.consistency import Thread, thread_of
from slm_ray.corpus.grammar import sample_stories
from slm_ray.corpus.heroes import THINGS_OF_ONE, heroes


def threads() -> list[Thread]:
    return [thread for thread in map(thread_of, sample_stories(0, 3000)) if thread]


def test_every_name_belongs_to_one_hero_or_one_friend() -> None:
    names = [name for hero in heroes() for name in (hero.name, hero.cast["F"])]
    assert len(names) == len(set(names))
    assert set(names) == {*words.BOYS, *words.GIRLS, *words.HE_ANIMALS, *words.SHE_ANIMALS}


def test_a_story_keeps_to_the_friend_and_the_things_of_its_hero() -> None:
    of = {hero.name: hero for hero in heroes()}
    for thread in threads():
        hero = of[thread.hero.name]
        assert thread.friend and thread.friend.name == hero.cast["F"]
        assert thread.thing in {thing.noun for thing in hero.things}
        assert [len(thing.adjectives) for thing in hero.things] == [1] * THINGS_OF_ONE


def test_every_hero_has_stories_and_loses_each_thing() -> None:
    seen = collections.Counter((thread.hero.name, thread.thing) for thread in threads())
    assert len(seen) == len(heroes()) * THINGS_OF_ONE
    assert min(seen.values()) > 10


def test_a_thing_fits_the_plot_of_its_hero() -> None:
    for hero in heroes():
        assert {thing.size for thing in hero.things} <= set(hero.plot.sizes)
        assert hero.cast["trait"] in hero.plot.traits
