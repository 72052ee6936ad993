"""Draws among thousands of tokens: exact, at the cost of a draw among all, and the same alone as in a batch."""

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from slm_ray.generation import sampling
from slm_ray.generation.logprobs import among_likeliest
from slm_ray.generation.sampling import SamplingParams, draw

VOCAB_SIZE = 1200
COSTLY: list[dict[str, Any]] = [
    {"top_k": 0, "top_p": 0.999999, "temperature": 2.0},
    {"top_k": 0, "top_p": 0.9},
    {"top_k": 0, "top_p": 0.4, "temperature": 100.0},
    {"top_k": 0, "top_p": 1 - 1e-16, "temperature": 5.0},
    {"top_k": 0, "top_p": 0.95, "min_p": 0.2, "temperature": 3.0},
    {"top_k": 1100},
    {"top_k": VOCAB_SIZE - 1, "top_p": 0.9},
    {"top_k": 1100, "top_p": 0.5, "temperature": 20.0},
    {"top_k": 1100, "min_p": 0.3, "temperature": 3.0},
]


def costly(**options: Any) -> SamplingParams:
    return SamplingParams(**{"temperature": 1.0, **options})


def chances(logits: np.ndarray, params: SamplingParams) -> np.ndarray:
    """The probability of each token, in float64, by sorting."""
    order = np.argsort(-logits, kind="stable")
    weights = np.exp((logits[order].astype(np.float64) - logits.max()) / params.temperature)
    weights[params.top_k or len(logits) :] = 0
    if params.top_p < 1:
        weights[weights.cumsum() - weights >= params.top_p * weights.sum()] = 0
    weights[weights < params.min_p] = 0
    found = np.zeros(len(logits))
    found[order] = weights / weights.sum()
    return found


@pytest.mark.parametrize("options", COSTLY, ids=str)
def test_tokens_come_as_often_as_they_are_likely(options: dict[str, Any]) -> None:
    generator = np.random.default_rng(0)
    logits, params, count = generator.normal(0, 1, VOCAB_SIZE).astype(np.float32), costly(**options), 10_000
    logits[5] = -np.inf
    drawn = draw(np.broadcast_to(logits, (count, VOCAB_SIZE)), [params] * count, generator.random(count).tolist())
    expected = count * chances(logits, params)
    found = np.bincount(drawn, minlength=VOCAB_SIZE)
    assert not found[expected == 0].any()
    some = expected > 0
    degrees = some.sum() - 1
    distance = ((found[some] - expected[some]) ** 2 / expected[some]).sum()  # chi-square, of this many degrees
    assert abs(distance - degrees) < 4 * np.sqrt(2 * degrees)


@pytest.mark.parametrize(
    "options", [*COSTLY, {}, {"top_k": 512}, {"top_k": 2000}, {"top_k": 2001}, {"top_k": 0}], ids=str
)
def test_no_vocabulary_is_sorted(options: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = [0]
    for name in ("argsort", "sort", "partition", "argpartition"):
        plain = getattr(np, name)

        def counted(array: np.ndarray, *rest: Any, plain: Any = plain, **more: Any) -> np.ndarray:
            sizes.append(array.shape[-1])
            return plain(array, *rest, **more)

        monkeypatch.setattr(np, name, counted)
    generator = np.random.default_rng(0)
    logits = generator.normal(0, 3, (8, 50_257)).astype(np.float32)
    sized = options | ({"top_k": 50_256} if options.get("top_k") == VOCAB_SIZE - 1 else {})
    draw(logits, [costly(**sized)] * 8, generator.random(8).tolist())
    assert max(sizes) <= (5 * sized["top_k"] if 1000 < sized.get("top_k", 50) <= 2000 else 4096)


EDGES = st.builds(
    costly,
    top_k=st.sampled_from([0, 1, 513, 1000, 1001, VOCAB_SIZE - 1, VOCAB_SIZE, VOCAB_SIZE + 1]),
    top_p=st.sampled_from([5e-324, 1e-9, 0.3, 0.9, 0.999999, 1 - 1e-16, 1.0]),
    min_p=st.sampled_from([0.0, 1e-9, 0.5, 1.0]),
    temperature=st.sampled_from([1e-40, 0.1, 1.0, 100.0]),
)
UNIFORMS = st.sampled_from([0.0, 2**-53, 0.5, 1 - 2**-53]) | st.floats(0, 1, exclude_max=True)


@settings(max_examples=80, deadline=None)
@given(st.lists(st.tuples(EDGES, UNIFORMS), min_size=1, max_size=6), st.sampled_from(["all", "few", "none", "-inf"]))
def test_rows_are_drawn_as_each_alone_and_among_what_is_left(
    rows: list[tuple[SamplingParams, float]], ties: str
) -> None:
    logits = np.random.default_rng(len(rows)).normal(0, 2, (len(rows), VOCAB_SIZE)).astype(np.float32)
    if ties == "all":
        logits[:] = 0.5
    elif ties == "few":
        logits = logits.round()
    elif ties == "-inf":
        logits[:, 1:1120] = -np.inf
    params, uniforms = [own for own, _ in rows], [uniform for _, uniform in rows]
    drawn = draw(logits, params, uniforms)
    for row, (own, uniform, token) in enumerate(zip(params, uniforms, drawn)):
        assert draw(logits[row : row + 1], [own], [uniform]) == [token]
        # As far as sums of fp32 numbers go: a reach that is a little higher
        near = SamplingParams(temperature=own.temperature, top_k=own.top_k, top_p=min(own.top_p + 1e-6, 1))
        assert chances(logits[row], near)[token] > 0
        assert logits[row, token] - logits[row].max() >= own.temperature * np.log(max(own.min_p, 1e-300)) - 1e-3


@settings(max_examples=200, deadline=None)
@given(
    st.lists(st.sampled_from([-np.inf, -3.0, -0.0, 0.0, 1e-40, 2.0, 2.0000002, 3e38]), min_size=1, max_size=30),
    st.integers(1, 30),
    st.sampled_from([1, 400]),
)
def test_the_likeliest_are_those_of_a_stable_sort(values: list[float], count: int, times: int) -> None:
    row = np.array(values * times, dtype=np.float32)
    count = min(count * times, len(row))
    expected = np.argsort(-row, kind="stable")[:count]
    assert np.flatnonzero(among_likeliest(row, count)).tolist() == sorted(expected.tolist())


@pytest.mark.parametrize(
    ("vocab_size", "most"), [(1200, 1000), (8000, 1000), (32_000, 1280), (50_257, 2000), (151_936, 2000)]
)
def test_as_many_are_put_in_order_as_take_no_longer_than_looking_at_all(
    vocab_size: int, most: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As measured with 8,000 and with 50,257 tokens."""
    looked_at: list[int] = []
    plain = sampling.among_likeliest
    monkeypatch.setattr(sampling, "among_likeliest", lambda row, count: (looked_at.append(count), plain(row, count))[1])
    logits = np.random.default_rng(0).normal(0, 3, (1, vocab_size)).astype(np.float32)
    for top_k in (513, most, most + 1):
        draw(logits, [costly(top_k=top_k)], [0.5])
    assert looked_at == [most + 1]


def test_seeds_write_what_they_wrote_before() -> None:
    """Settings in use, and top_p where a few of the tokens reach it."""
    generator = np.random.default_rng(7)
    logits, uniforms = generator.normal(0, 3, (6, 4096)).astype(np.float32), generator.random(6).tolist()
    written = {
        str(options): draw(logits, [SamplingParams(**options)] * 6, uniforms)
        for options in ({}, {"top_p": 0.9}, {"top_k": 0, "top_p": 0.9}, {"top_k": 0}, {"top_k": 0, "min_p": 0.1},
                        {"top_k": 600, "temperature": 2.0}, {"top_k": 1000, "temperature": 2.0, "top_p": 0.9})
    }  # fmt: skip
    assert written == GOLDEN


GOLDEN = {
    "{}": [2821, 561, 2287, 3567, 2168, 1115],
    "{'top_p': 0.9}": [1508, 561, 2287, 3567, 3847, 1115],
    "{'top_k': 0, 'top_p': 0.9}": [1456, 561, 2287, 3567, 2947, 1115],
    "{'top_k': 0}": [3086, 561, 560, 681, 3244, 1115],
    "{'top_k': 0, 'min_p': 0.1}": [3086, 561, 1701, 982, 3244, 1115],
    "{'top_k': 600, 'temperature': 2.0}": [2808, 2244, 543, 3485, 3555, 2897],
    "{'top_k': 1000, 'temperature': 2.0, 'top_p': 0.9}": [2772, 2592, 543, 3038, 2496, 652],
}
