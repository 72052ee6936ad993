"""The model executed by torch: the reference for every other backend, and what training samples with.

In: token ids for slots of the cache. Out: logits.
"""

import contextlib
from collections.abc import Iterator, Sequence

import torch

from slm_ray.generation.backend import Logits
from slm_ray.model.decoder import Decoder, KVCache


class TorchBackend:
    """Plain torch, on the device of the model.

    The model may be in training mode: it is found as it was after every call, and torch's own random numbers are not
    touched.
    """

    def __init__(self, model: Decoder, max_slots: int = 8) -> None:
        if max_slots < 1:
            raise ValueError(f"max_slots ({max_slots}) must be at least 1")
        self.config = model.config
        self.max_slots = max_slots
        self._model = model
        self._device = next(model.parameters()).device
        self._cache = KVCache.empty(model.config, max_slots, self._device)

    def prefill(self, slot: int, tokens: Sequence[int], *, start: int = 0, wants_logits: bool = True) -> Logits | None:
        """See `Backend`."""
        self._cache.lengths[slot] = start
        if not tokens:
            return None
        with self._evaluating():
            logits = self._model.decode(torch.tensor([list(tokens)], device=self._device), self._slots(slot, slot + 1))
        return _on_the_cpu(logits[0]) if wants_logits else None

    def prefill_all(self, slot: int, prompts: Sequence[Sequence[int]]) -> None:
        """See `Backend`."""
        for number, tokens in enumerate(prompts):
            self.prefill(slot + number, tokens, wants_logits=False)

    def decode(self, tokens: Sequence[int]) -> Logits:
        """See `Backend`."""
        ids = torch.tensor(tokens, device=self._device)[:, None]  # (B, 1)
        with self._evaluating():
            logits = self._model.decode(ids, self._slots(0, len(tokens)))
        return _on_the_cpu(logits[:, -1])

    def length(self, slot: int) -> int:
        """See `Backend`."""
        return int(self._cache.lengths[slot])

    def copy_slot(self, source: int, target: int) -> None:
        """See `Backend`."""
        with torch.inference_mode():
            for tensor in (self._cache.keys, self._cache.values):
                tensor[:, target] = tensor[:, source]
            self._cache.lengths[target] = self._cache.lengths[source]

    def _slots(self, start: int, stop: int) -> KVCache:
        """A view: what is written to it is written to the whole cache."""
        cache = self._cache
        return KVCache(cache.keys[:, start:stop], cache.values[:, start:stop], cache.lengths[start:stop])

    @contextlib.contextmanager
    def _evaluating(self) -> Iterator[None]:
        was_training = self._model.training
        if was_training:
            self._model.eval()
        try:
            with torch.inference_mode():
                yield
        finally:
            if was_training:
                self._model.train()


def _on_the_cpu(logits: torch.Tensor) -> Logits:
    values: Logits = logits.float().cpu().numpy()
    return values
