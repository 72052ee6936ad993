"""MinHash against the exact similarity, and which story of a group stays."""

import random

import numpy as np
import pyarrow as pa
import pytest
from apache_beam import Create, Pipeline
from apache_beam.testing.util import assert_that
from hypothesis import given, settings
from hypothesis import strategies as st

from pipelines.transforms import FindNearDuplicates
from slm_ray.errors import UserError
from slm_ray.preparation import near_duplicates
from slm_ray.preparation.near_duplicates import (
    N_HASHES,
    N_NEIGHBOURS,
    band_shape,
    bands,
    candidates,
    find_near_duplicates,
    lowest_of_group,
    sign_rows,
    signatures,
    similar_kept,
    similarity,
)
from slm_ray.sources.input_files import InputFile, InputRange
from slm_ray.sources.plain_text import PlainText
from slm_ray.sources.reading import Item

WORDS = [*"abcdefghijklmnopqrst"]
THRESHOLD = 0.8


def story(rng: random.Random, n_words: int = 150) -> str:
    return " ".join(rng.choices(WORDS, k=n_words))


def changed(rng: random.Random, text: str, n_changes: int) -> str:
    words = text.split()
    for place in rng.sample(range(len(words)), n_changes):
        words[place] = f"new{rng.randrange(10**6)}"
    return " ".join(words)


def shingles(text: str) -> set[tuple[str, ...]]:
    words = text.lower().split()
    return {tuple(words[first : first + 5]) for first in range(max(1, len(words) - 4))}


def jaccard(one: str, other: str) -> float:
    a, b = shingles(one), shingles(other)
    return len(a & b) / len(a | b)


def pairs(seed: int, n_pairs: int) -> list[tuple[str, str]]:
    """A story and a copy with 0 to 9 words changed: similarities from 0.5 to 1."""
    rng = random.Random(seed)
    stories = [story(rng) for _ in range(n_pairs)]
    return [(text, changed(rng, text, number % 10)) for number, text in enumerate(stories)]


def is_found(texts: list[str], threshold: float = THRESHOLD) -> list[bool]:
    first = lowest_of_group(signatures(pa.array(texts, pa.string())), threshold)
    return (first != np.arange(len(texts))).tolist()


def make_item(texts: list[str | None], number: int = 0, split: str | None = None) -> Item:
    """A cleaned range; None stands for a rejected story."""
    file = InputFile(format=PlainText(), name="a", path="a", split=split)
    part = InputRange(number=number, file=file, first_row=0, n_rows=len(texts))
    reasons = [None if text is not None else "too_short" for text in texts]
    columns = {
        "text": pa.array([text or "Hm." for text in texts], pa.large_string()),
        "reason": pa.array(reasons, pa.string()),
    }
    return part, pa.RecordBatch.from_pydict(columns)


def dropped(items: list[Item], threshold: float = THRESHOLD) -> dict[int, list[int]]:
    signed = [signed for item in items for _, signed in sign_rows(item)]
    return {number: rows.tolist() for number, rows in find_near_duplicates((0, signed), threshold)}


def test_of_a_chain_only_those_leave_that_are_similar_to_one_that_stays() -> None:
    words = [f"word{number}" for number in range(1_500)]
    texts = [
        " ".join(words[start : start + 200]) for start in range(0, 1_200, 4)
    ]  # each 4 words on from the one before
    found = signatures(pa.array(texts, pa.string()))
    group = lowest_of_group(found, THRESHOLD)
    kept = similar_kept(found, group, THRESHOLD)
    everyone = np.arange(len(texts))
    assert (group == 0).all()
    assert 20 < len(np.unique(kept)) < 80
    assert (kept[kept] == kept).all()
    assert (kept <= everyone).all()
    assert (similarity(found, found[kept]) >= THRESHOLD).all()
    stay = np.flatnonzero(kept == everyone)
    for one in stay:  # no two that stay are similar
        others = stay[stay != one]
        assert (similarity(found[others], np.repeat(found[one : one + 1], len(others), axis=0)) < THRESHOLD).all()


def test_of_several_groups_each_has_its_own_that_stay() -> None:
    rng = random.Random(5)
    originals = [story(rng) for _ in range(6)]
    texts = originals + [changed(rng, text, 2) for text in originals] + [story(rng)]
    found = signatures(pa.array(texts, pa.string()))
    kept = similar_kept(found, lowest_of_group(found, THRESHOLD), THRESHOLD)
    assert kept.tolist() == [*range(6), *range(6), 12]


def test_the_estimate_is_near_the_exact_similarity():
    made = pairs(seed=1, n_pairs=300)
    exact = np.array([jaccard(one, other) for one, other in made])
    found = signatures(pa.array([text for pair in made for text in pair]))
    errors = similarity(found[::2], found[1::2]) - exact
    assert abs(errors.mean()) < 0.01
    assert errors.std() < 1.2 * np.sqrt(np.mean(exact * (1 - exact)) / N_HASHES)
    assert abs(similarity(found[:-2:2], found[2::2])).mean() < 0.02  # different stories


@pytest.mark.parametrize("threshold", [0.5, 0.7, 0.8, 0.9])
def test_clear_cases_are_told_apart(threshold):
    made = [pair for seed in (2, 3) for pair in pairs(seed, 300)]
    found = is_found([text for pair in made for text in pair], threshold)[1::2]
    exact = [jaccard(one, other) for one, other in made]
    above = [hit for hit, value in zip(found, exact) if value >= min(threshold + 0.1, 1.0)]
    assert len(above) >= 60
    assert sum(above) >= 0.99 * len(above)
    below = [hit for hit, value in zip(found, exact) if value <= threshold - 0.15]
    assert sum(below) == 0


def test_the_first_stories_are_never_dropped():
    made = pairs(seed=4, n_pairs=200)
    assert not any(is_found([text for pair in made for text in pair])[::2])


@given(st.lists(st.text("aB \n.é’", max_size=40).map(lambda text: " ".join(text.split())), max_size=12))
@settings(deadline=None)
def test_signatures_depend_on_each_text_alone(texts):
    whole = signatures(pa.array(texts, pa.string()))
    alone = [signatures(pa.array([text], pa.large_string()))[0] for text in texts]
    assert whole.tolist() == [row.tolist() for row in alone]
    padded = pa.array(["before", *texts, "after"], pa.string())
    assert signatures(padded.slice(1, len(texts))).tolist() == whole.tolist()


@given(st.lists(st.sampled_from(["a", "b", "c"]), min_size=1, max_size=20))
@settings(deadline=None)
def test_texts_of_the_same_shingles_have_the_same_signature(words):
    text = " ".join(words)
    same = [text, text.upper(), text.replace(" ", "\n")]
    assert len({row.tobytes() for row in signatures(pa.array(same))}) == 1


def test_signatures_stay_what_they_were():
    """Another NumPy or another machine must drop the same stories."""
    text = "Once upon a time there was a little girl named Lily. She loved the sun."
    assert signatures(pa.array([text]))[0, :16].tobytes().hex() == "180c9a46213fa3edb8eada1929dc9aaf"


def test_short_texts_are_compared_as_a_whole():
    texts = ["Hello there.", "hello there.", "Hello you.", "", "", "one two three four", "one two three four five"]
    assert is_found(texts) == [False, True, False, False, True, False, False]


def test_no_texts_are_no_signatures():
    assert signatures(pa.array([], pa.string())).shape == (0, N_HASHES)
    assert list(sign_rows(make_item([None, None]))) == []


def test_chains_become_one_group():
    rng = random.Random(5)
    chain = [story(rng)]
    for _ in range(24):
        chain.append(changed(rng, chain[-1], 1))
    assert jaccard(chain[0], chain[-1]) < 0.5
    assert is_found(chain) == [False] + [True] * 24
    rng.shuffle(chain)
    assert is_found(chain) == [False] + [True] * 24


def test_neither_order_nor_bundling_change_what_is_dropped():
    rng = random.Random(6)
    texts: list[str | None] = [text for pair in pairs(seed=6, n_pairs=60) for text in pair]
    rng.shuffle(texts)
    items = [make_item([*texts[first : first + 20], None], number=first // 20) for first in range(0, 120, 20)]
    expected = dropped(items)
    assert sum(map(len, expected.values())) > 20
    for _ in range(5):
        rng.shuffle(items)
        assert dropped(items) == expected


def test_the_lowest_position_stays_and_validation_comes_first():
    text = story(random.Random(7))
    late, early = make_item([text], number=2), make_item(["Another one.", text], number=1)
    assert dropped([late, early]) == {2: [0]}
    assert dropped([early, late, make_item([text], number=9, split="validation")]) == {1: [1], 2: [0]}


def test_a_rejected_row_takes_no_part():
    text = story(random.Random(8))
    assert dropped([make_item([None, text, None, text])]) == {0: [3]}


def test_a_bucket_of_50_000_form_letters_is_not_compared_in_pairs():
    rng = np.random.default_rng(9)
    letters = np.tile(rng.integers(0, 256, N_HASHES, np.uint8), (50_000, 1))
    letters[np.arange(50_000), rng.integers(0, N_HASHES, 50_000)] = 0
    assert not lowest_of_group(letters, THRESHOLD).any()


def test_a_bucket_of_50_000_stories_with_one_band_in_common_stays():
    stories = np.random.default_rng(10).integers(0, 256, (50_000, N_HASHES), np.uint8)
    stories[:, :8] = 7
    assert (lowest_of_group(stories, THRESHOLD) == np.arange(50_000)).all()


@given(st.lists(st.integers(0, 3), max_size=40))
def test_candidates_are_the_neighbours_of_each_bucket(keys):
    found = [(int(a), int(b)) for one, other in candidates(np.array(keys, np.uint64)) for a, b in zip(one, other)]
    buckets = [[place for place, key in enumerate(keys) if key == bucket] for bucket in range(4)]
    expected = [
        (bucket[high], bucket[low])
        for bucket in buckets
        for high in range(len(bucket))
        for low in range(max(0, high - N_NEIGHBOURS), high)
    ]
    assert sorted(found) == sorted(expected)


@pytest.mark.parametrize("threshold", [0.1, 0.5, 0.8, 0.95, 1.0])
def test_bands_rise_just_below_the_threshold(threshold):
    n_bands, n_rows = band_shape(threshold)
    assert n_bands * n_rows <= N_HASHES
    assert 1 - (1 - threshold**n_rows) ** n_bands >= 0.9
    assert len(list(bands(np.zeros((3, N_HASHES), np.uint8), threshold))) == n_bands


def test_the_default_shape_is_the_documented_one():
    assert band_shape(0.8) == (16, 8)


@pytest.mark.parametrize("threshold", [0.0, 1.1, float("nan")])
def test_a_threshold_that_is_no_similarity_is_refused(threshold):
    with pytest.raises(UserError, match=r"near_duplicates \(.*\) must be a similarity from 0.1 to 1"):
        band_shape(threshold)


def test_find_near_duplicates_across_ranges():
    rng = random.Random(11)
    texts = [story(rng) for _ in range(6)]
    items = [
        make_item([changed(rng, texts[0], 1), texts[1], None, changed(rng, texts[2], 1)], number=1),
        make_item(texts[:2], number=0),
        make_item([texts[2], *texts[3:]], number=7, split="validation"),
    ]

    def check(found):
        assert {number: sorted(np.concatenate(list(rows)).tolist()) for number, rows in found} == {1: [0, 1, 3]}

    with Pipeline(runner="FnApiRunner") as pipeline:
        assert_that(pipeline | Create(items) | FindNearDuplicates(THRESHOLD), check)


def test_what_is_signed_at_once_is_bounded_by_its_bytes(monkeypatch):
    """Each character of Chinese is a word, and its arrays take 100 times its bytes."""
    texts = pa.array([f"{number}" + "小猫在花园里" * 100 for number in range(8)])
    whole, taken, shingles = near_duplicates.signatures(texts), [], near_duplicates._shingles

    def count(content, borders):
        taken.append(len(content))
        return shingles(content, borders)

    monkeypatch.setattr(near_duplicates, "_shingles", count)
    monkeypatch.setattr(near_duplicates, "_BYTES_AT_ONCE", 4000)
    assert (near_duplicates.signatures(texts) == whole).all()
    assert len(taken) == 4 and max(taken) <= 4000
