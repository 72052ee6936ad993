"""Scales of a cache in int8: from the model's own stories, the same each time, without a trace."""

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

from slm_ray.config.schema import ModelConfig
from slm_ray.generation.graph.cache_scales import MOST_TOKENS, STORIES, cache_scales
from slm_ray.model.decoder import Decoder, KVCache
from slm_ray.model.threads import torch_threads
from tests.support.tiny_model import random_model

SHAPE: dict[str, object] = {"vocab_size": 97, "seq_len": 24, "n_layers": 2, "d_model": 32, "n_heads": 4, "d_ff": 40}


def small_model(**changes: object) -> Decoder:
    return random_model(ModelConfig(**(SHAPE | changes)))


@pytest.mark.parametrize("changes", [{}, {"n_kv_heads": 2, "d_head": 10}, {"positions": "learned"}, {"seq_len": 200}])
def test_there_is_a_scale_for_every_channel_and_none_is_zero(changes: dict[str, object]) -> None:
    model = small_model(**changes)
    config = model.config
    scales = cache_scales(model)
    assert scales.shape == (2, 2, config.kv_heads, config.head_width) and scales.dtype == np.float32
    assert (scales > 0).all() and np.isfinite(scales).all()


def test_keys_fit_at_every_position() -> None:
    """Rotation turns channel i and i + half into each other: positions that were not seen must not be cut."""
    model = small_model(seq_len=4 * MOST_TOKENS)
    reach = 127 * cache_scales(model)[:, 0]  # (n_layers, n_kv_heads, d_head)
    cache = KVCache.empty(model.config, 1)
    with torch.inference_mode():
        model.decode(torch.randint(97, (1, 4 * MOST_TOKENS), generator=torch.Generator().manual_seed(1)), cache)
    keys = cache.keys[:, 0].abs().numpy()  # (n_layers, n_kv_heads, seq_len, d_head)
    assert (keys <= reach[:, :, None]).mean() > 0.999


@pytest.mark.parametrize(("seq_len", "expected"), [(10 * MOST_TOKENS, MOST_TOKENS), (24, 24)])
def test_room_is_taken_for_the_tokens_that_are_written(
    seq_len: int, expected: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = decoding(monkeypatch, lambda cache: (cache.keys.shape, cache.values.shape))
    cache_scales(small_model(seq_len=seq_len))
    assert set(seen) == {((2, STORIES, 4, expected, 8),) * 2}


def test_scales_are_the_same_with_any_number_of_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    """Replicas of one endpoint may have others, and are to write the same story."""
    model = small_model(vocab_size=2000, n_layers=4, d_model=384, n_heads=6, d_ff=768)  # wide enough to be shared out
    seen, found = decoding(monkeypatch, lambda _: torch.get_num_threads()), []
    for threads in (1, 2):
        with torch_threads(threads):
            found.append(cache_scales(model))
            assert torch.get_num_threads() == threads
    np.testing.assert_array_equal(*found)
    assert set(seen) == {1}


def decoding(patch: pytest.MonkeyPatch, look: Callable[[KVCache], object]) -> list[object]:
    """What is seen at each step of a model."""
    seen: list[object] = []
    decode = Decoder.decode

    def watched(self: Decoder, tokens: Tensor, cache: KVCache) -> Tensor:
        seen.append(look(cache))
        return decode(self, tokens, cache)

    patch.setattr(Decoder, "decode", watched)
    return seen


def test_model_and_random_numbers_are_found_as_they_were() -> None:
    model = small_model(dropout=0.5).train()
    before = torch.random.get_rng_state()
    first, second = cache_scales(model), cache_scales(model)
    np.testing.assert_array_equal(first, second)
    assert model.training and torch.equal(before, torch.random.get_rng_state())


def test_broken_model_gets_scales_too() -> None:
    """That it is broken is said by who compares it with torch."""
    model = small_model()
    model.layers[0].self_attn.k_proj.weight.data[:] = torch.nan
    assert np.isfinite(cache_scales(model)).all()
