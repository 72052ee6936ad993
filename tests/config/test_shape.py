"""One shape in many spellings: equal once resolved exactly where the models are the same."""

import dataclasses
from typing import Any

import hypothesis.strategies as st
import torch
from hypothesis import given, settings

from slm_ray.config.schema import ModelConfig
from slm_ray.model.decoder import Decoder
from tests.support.tiny_model import random_model, some_tokens

SIZES = {"vocab_size": 32, "seq_len": 8, "d_model": 16, "n_heads": 2, "d_ff": 12}
BIAS = st.sampled_from([None, False, True])
SPELLINGS = st.fixed_dictionaries(
    {
        "n_layers": st.sampled_from([1, 2]),
        "n_kv_heads": st.sampled_from([0, 1, 2]),
        "d_head": st.sampled_from([0, 8, 4]),
        "norm": st.sampled_from(["rms", "layer"]),
        "positions": st.sampled_from(["rotary", "learned"]),
        "rope_theta": st.sampled_from([10_000.0, 50.0]),
        "bias": st.booleans(),
        "qkv_bias": BIAS,
        "o_bias": BIAS,
        "mlp_bias": BIAS,
        "local_window": st.sampled_from([0, 3, 8, 9]),
    }
)
OPEN = ("n_kv_heads", "d_head", "rope_theta", "bias", "qkv_bias", "o_bias", "mlp_bias", "local_window")
"""Fields of which several values mean the same, perhaps."""


def shapes(model: Decoder) -> dict[str, torch.Size]:
    return {name: tensor.shape for name, tensor in model.state_dict().items()}


@settings(max_examples=150, deadline=None)
@given(given_as=SPELLINGS, other=SPELLINGS, changed=st.sets(st.sampled_from(OPEN), min_size=1, max_size=3))
def test_two_spellings_are_equal_once_resolved_exactly_where_the_models_are_the_same(
    given_as: dict[str, Any], other: dict[str, Any], changed: set[str]
) -> None:
    one = ModelConfig(**SIZES, **given_as)
    two = dataclasses.replace(one, **{name: other[name] for name in changed})
    first, second = random_model(one), Decoder(two).eval()
    are_the_same = shapes(first) == shapes(second)
    if are_the_same:
        second.load_state_dict(first.state_dict())
        tokens = some_tokens(32, rows=2, steps=8)
        with torch.inference_mode():
            are_the_same = torch.equal(first(tokens), second(tokens))
    assert (one.resolved == two.resolved) == are_the_same
    assert one.resolved.resolved == one.resolved
