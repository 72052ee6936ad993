"""The scales by which keys and values are rounded to a byte each, taken from what the model itself writes.

In: a `Decoder`. Out: for every layer a scale for each channel of its keys and of its values. They are fixed before the
first request: what a token leaves in the cache depends on its own story alone. A key or value beyond what was seen is
cut to the largest level. The model writes in one thread: replicas with other numbers of them get the same scales.
"""

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from slm_ray.generation.graph.products import LEVELS
from slm_ray.model.decoder import Decoder, KVCache
from slm_ray.model.threads import torch_threads

Array = NDArray[Any]
STORIES = 16
MOST_TOKENS = 64
"""Of each story that is written to see keys and values."""
_ROOM = 1.1
"""Times the largest that was seen."""
_SMALLEST = 1e-6
"""Scale of a channel that is never used."""


def cache_scales(model: Decoder, seed: int = 0) -> Array:
    """The value of one level: (n_layers, 2, n_kv_heads, d_head), keys first.

    Stories are drawn at temperature 1 from the model's own probabilities, each from another first token. The model is
    found as it was.
    """
    was_training = model.training
    model.eval()
    try:
        with torch.inference_mode(), torch_threads(1):
            cache = _written(model, torch.Generator().manual_seed(seed))
    finally:
        model.train(was_training)
    sizes = [_largest(half) for half in (cache.keys, cache.values)]
    if model.config.positions == "rotary":
        sizes[0] = _any_turn(cache.keys)
    scales: Array = np.maximum(torch.stack(sizes, dim=1).cpu().numpy() * _ROOM / LEVELS, _SMALLEST).astype(np.float32)
    return scales


def _written(model: Decoder, dice: torch.Generator) -> KVCache:
    """A cache that is full: it has room for what is written, and no more."""
    config = model.config
    device = next(model.parameters()).device
    count = min(MOST_TOKENS, config.seq_len)
    cache = KVCache.empty(config, STORIES, device, positions=count)
    tokens = torch.randint(config.vocab_size, (STORIES, 1), generator=dice).to(device)
    tokens[0] = 0  # as a rule the end-of-text token, which every story begins with
    for _ in range(count):
        chances = model.decode(tokens, cache)[:, -1].float().softmax(dim=-1).nan_to_num(1.0)
        tokens = torch.multinomial(chances.cpu(), 1, generator=dice).to(device)
    return cache


def _largest(seen: torch.Tensor) -> torch.Tensor:
    """(n_layers, B, n_kv_heads, T, d_head) -> (n_layers, n_kv_heads, d_head)."""
    return seen.float().abs().nan_to_num().amax(dim=(1, 3))


def _any_turn(keys: torch.Tensor) -> torch.Tensor:
    """The same of keys that a later position turns: channels i and i + half by any angle."""
    first, second = keys.float().nan_to_num().chunk(2, dim=-1)
    length = torch.hypot(first, second).amax(dim=(1, 3))  # (n_layers, n_kv_heads, d_head / 2)
    return torch.cat([length, length], dim=-1)
