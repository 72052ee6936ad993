"""Draws follow the softmax of what the settings leave; settings out of range are refused."""

import numpy as np
import pytest
import torch
from transformers.generation.logits_process import (
    LogitsProcessorList,
    MinPLogitsWarper,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from slm_ray.generation.sampling import SamplingParams, draw


def frequencies(logits: list[float], params: SamplingParams, count: int = 4000) -> list[float]:
    uniforms = [(index + 0.5) / count for index in range(count)]  # a grid: the exact distribution, no luck
    tokens = draw(np.array([logits] * count, dtype=np.float32), [params] * count, uniforms)
    return [tokens.count(token) / count for token in range(len(logits))]


LOGITS = [1.0, 3.0, 0.0, 2.0, -1.0]


@pytest.mark.parametrize(
    "params, allowed",
    [
        ({"top_k": 0}, [0, 1, 2, 3, 4]),
        ({"top_k": 0, "temperature": 0.5}, [0, 1, 2, 3, 4]),
        ({"top_k": 2, "temperature": 3.0}, [1, 3]),
        ({"top_k": 2}, [1, 3]),
        ({"top_k": 99}, [0, 1, 2, 3, 4]),
        ({"top_k": 0, "top_p": 0.7}, [1, 3]),  # 0.64 + 0.23
        ({"top_k": 0, "top_p": 0.6}, [1]),
        ({"top_k": 0, "top_p": 0.7, "temperature": 0.5}, [1]),  # 0.87
        ({"top_k": 2, "top_p": 0.8}, [1, 3]),  # of the two left, 0.73 + 0.27
        ({"top_k": 3, "top_p": 1e-9}, [1]),
        ({"top_k": 1}, [1]),
        ({"top_k": 0, "min_p": 0.2}, [1, 3]),  # 1, 0.37, 0.14, ... of the likeliest
        ({"top_k": 0, "min_p": 0.13}, [0, 1, 3]),
        ({"top_k": 0, "min_p": 0.13, "temperature": 0.5}, [1, 3]),  # 1, 0.14, 0.02
        ({"top_k": 0, "min_p": 1.0}, [1]),
        ({"top_k": 4, "min_p": 0.2}, [1, 3]),
        ({"top_k": 0, "top_p": 0.95, "min_p": 0.2}, [1, 3]),
        ({"top_k": 0, "top_p": 0.6, "min_p": 0.01}, [1]),
        ({"top_k": 3, "top_p": 0.9, "min_p": 1.0}, [1]),
    ],
)
def test_draws_follow_the_softmax_of_what_is_left(params: dict[str, float], allowed: list[int]) -> None:
    settings = SamplingParams(**{"temperature": 1.0, **params})  # type: ignore[arg-type]
    left = torch.full((5,), -torch.inf)
    left[allowed] = torch.tensor(LOGITS)[allowed] / settings.temperature
    assert frequencies(LOGITS, settings) == pytest.approx(left.softmax(0).tolist(), abs=1e-3)


def test_a_min_p_of_1_leaves_all_that_are_likeliest_and_of_0_all() -> None:
    for options in ({}, {"top_p": 0.99}, {"top_k": 4}):
        params = SamplingParams(**{"top_k": 0, "temperature": 1.0, "min_p": 1.0, **options})  # type: ignore[arg-type]
        assert frequencies([2.0, 0.0, 2.0, 1.9], params) == pytest.approx([0.5, 0, 0.5, 0], abs=1e-3)
    plain = SamplingParams(top_k=0, temperature=1.0)
    assert frequencies(LOGITS, SamplingParams(top_k=0, temperature=1.0, min_p=0.0)) == frequencies(LOGITS, plain)


@pytest.mark.parametrize("top_k, top_p, min_p", [(0, 1.0, 0.05), (0, 0.9, 0.1), (20, 1.0, 0.02), (20, 0.8, 0.3)])
def test_what_is_left_is_what_transformers_leaves(top_k: int, top_p: float, min_p: float) -> None:
    logits = torch.randn(3, 200, generator=torch.Generator().manual_seed(0)) * 2
    warpers = [TemperatureLogitsWarper(0.8), *([TopKLogitsWarper(top_k)] if top_k else [])]
    left = LogitsProcessorList([*warpers, TopPLogitsWarper(top_p), MinPLogitsWarper(min_p)])(None, logits.clone())
    params = SamplingParams(temperature=0.8, top_k=top_k, top_p=top_p, min_p=min_p)
    for row, expected in zip(logits.tolist(), left.softmax(-1).tolist()):
        assert frequencies(row, params, 2000) == pytest.approx(expected, abs=1e-3)


@pytest.mark.parametrize("temperature", [0.0, 1e-300, 1e-6])
def test_zero_and_tiny_temperatures_are_greedy(temperature: float) -> None:
    assert frequencies(LOGITS, SamplingParams(temperature=temperature), 100) == [0, 1, 0, 0, 0]


def test_each_row_is_drawn_by_its_own_settings() -> None:
    logits = torch.randn(6, 50, generator=torch.Generator().manual_seed(0)).numpy()
    params = [SamplingParams(top_k=k, temperature=t, top_p=p) for k, t, p in
              [(0, 1, 1), (5, 0, 1), (3, 2, 1), (0, 1, 0.5), (50, 0.1, 0.9), (1, 1, 1)]]  # fmt: skip
    uniforms = [0.9, 0.1, 0.99, 0.999, 0.5, 0.3]
    together = draw(logits, params, uniforms)
    assert together == [draw(logits[i : i + 1], [params[i]], [uniforms[i]])[0] for i in range(6)]


def test_the_largest_uniform_number_stays_among_the_allowed() -> None:
    params = SamplingParams(top_k=3, temperature=1.0)
    uniforms = [0, 0.5, 0.9, 1 - 2**-53]
    assert len(set(draw(np.zeros((4, 4096), dtype=np.float32), [params] * 4, uniforms))) == 3


@pytest.mark.parametrize(
    "values",
    [
        {"max_tokens": 0}, {"max_tokens": True}, {"max_tokens": 2.0}, {"temperature": -0.1},
        {"temperature": float("nan")}, {"temperature": float("inf")}, {"temperature": True}, {"temperature": 10**400},
        {"temperature": "1"}, {"top_k": -1}, {"top_p": 0.0}, {"top_p": 1.01}, {"top_p": float("nan")},
        {"seed": -1}, {"seed": 2**63}, {"seed": 1.5}, {"repetition_penalty": 5e-324}, {"repetition_penalty": 11},
        {"repetition_penalty": float("nan")}, {"min_p": -0.1}, {"min_p": 1.1}, {"min_p": float("nan")},
        {"presence_penalty": 2.1}, {"frequency_penalty": -2.1}, {"frequency_penalty": "1"},
        {"logit_bias": ((-1, 1.0),)}, {"logit_bias": ((1.0, 1.0),)}, {"logit_bias": ((1, 101),)},
        {"logit_bias": ((1, float("nan")),)}, {"logit_bias": ((1, 1.0), (1, 2.0))},
        {"logit_bias": tuple((token, 1.0) for token in range(1025))}, {"logprobs": 21}, {"logprobs": -1},
        {"stop": ("",)}, {"stop": ("x" * 257,)}, {"stop": ("x",) * 17},
    ],
)  # fmt: skip
def test_settings_out_of_range_are_refused_by_name(values: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=next(iter(values))):
        SamplingParams(**values)  # type: ignore[arg-type]
