"""Permutations that are never held."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from slm_ray.dataset.scattering import key_of, scattered


@given(st.integers(1, 600), st.integers(0, 2**62), st.integers(0, 50))
def test_every_place_is_reached_once(size: int, seed: int, epoch: int) -> None:
    assert sorted(scattered(np.arange(size), size, key_of(seed, epoch)).tolist()) == list(range(size))


@given(st.lists(st.integers(1, 40), min_size=1, max_size=8), st.integers(0, 2**40))
def test_domains_of_several_sizes_do_not_mix(sizes: list[int], seed: int) -> None:
    kinds = np.repeat(np.arange(len(sizes)), sizes)
    places = np.concatenate([np.arange(size) for size in sizes])
    found = scattered(places, np.array(sizes)[kinds], key_of(seed, kinds))
    for kind, size in enumerate(sizes):
        assert sorted(found[kinds == kind].tolist()) == list(range(size))
        assert found[kinds == kind].tolist() == scattered(np.arange(size), size, key_of(seed, kind)).tolist()


def test_it_is_the_same_today_and_tomorrow_and_follows_its_key() -> None:
    assert scattered(np.arange(10), 10, key_of(0, 0)).tolist() == GOLDEN
    assert scattered(np.arange(10), 10, key_of(0, 1)).tolist() != GOLDEN
    assert scattered(np.arange(10), 10, key_of(1, 0)).tolist() != GOLDEN


def test_a_large_domain_is_never_held() -> None:
    found = scattered(np.array([0, 10**15]), 10**15 + 1, key_of(7))
    assert found.tolist() != [0, 10**15] and (found >= 0).all() and (found <= 10**15).all()


GOLDEN = [3, 6, 9, 5, 4, 1, 7, 2, 0, 8]
