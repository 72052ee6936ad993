"""Where an engine's products are computed: a model with a cache of rows, behind one small interface.

In: tokens for rows. Out: logits. `engine.py` decides which story has which row. `TorchBackend` runs on any device and
is the reference that every other backend is compared with.
"""

import contextlib
from collections.abc import Iterator, Sequence
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from slm_ray.config.schema import ModelConfig
from slm_ray.model.decoder import Decoder, KVCache

Array = NDArray[np.float32]


class Backend(Protocol):
    """A model and the keys and values of `max_rows` rows, each at its own length of at most `config.seq_len`.

    For one thread at a time. Rows in use are the first ones, without gaps.
    """

    config: ModelConfig
    max_rows: int

    def read(self, row: int, tokens: Sequence[int], *, wants_logits: bool = True) -> Array | None:
        """Forget a row and fill it with tokens, which may be none.

        Returns the logits that follow each token, (T, vocab_size); None without tokens, and where
        nobody wants them.
        """
        ...

    def decode(self, tokens: Sequence[int]) -> Array:
        """Append one token to each of the first B rows, none of which is full.

        tokens: B ids. Returns the logits that follow them, (B, vocab_size), valid until the next call.
        """
        ...

    def length(self, row: int) -> int:
        """Tokens that a row holds."""
        ...

    def move(self, source: int, target: int) -> None:
        """Let the row `target` hold what `source` holds."""
        ...


class TorchBackend:
    """Plain torch, on the device of the model.

    The model may be in training mode: it is found as it was after every call, and torch's own random numbers are not
    touched.
    """

    def __init__(self, model: Decoder, max_rows: int = 8) -> None:
        if max_rows < 1:
            raise ValueError(f"max_rows ({max_rows}) must be at least 1")
        self.config = model.config
        self.max_rows = max_rows
        self._model = model
        self._device = next(model.parameters()).device
        self._cache = KVCache.empty(model.config, max_rows, self._device)

    def read(self, row: int, tokens: Sequence[int], *, wants_logits: bool = True) -> Array | None:
        """See `Backend`."""
        self._cache.lengths[row] = 0
        if not tokens:
            return None
        with self._evaluating():
            logits = self._model.decode(torch.tensor([list(tokens)], device=self._device), self._rows(row, row + 1))
        return _on_the_cpu(logits[0]) if wants_logits else None

    def decode(self, tokens: Sequence[int]) -> Array:
        """See `Backend`."""
        ids = torch.tensor(tokens, device=self._device)[:, None]  # (B, 1)
        with self._evaluating():
            logits = self._model.decode(ids, self._rows(0, len(tokens)))
        return _on_the_cpu(logits[:, -1])

    def length(self, row: int) -> int:
        """See `Backend`."""
        return int(self._cache.lengths[row])

    def move(self, source: int, target: int) -> None:
        """See `Backend`."""
        with torch.inference_mode():
            for tensor in (self._cache.keys, self._cache.values):
                tensor[:, target] = tensor[:, source]
            self._cache.lengths[target] = self._cache.lengths[source]

    def _rows(self, start: int, stop: int) -> KVCache:
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


def _on_the_cpu(logits: torch.Tensor) -> Array:
    values: Array = logits.float().cpu().numpy()
    return values
