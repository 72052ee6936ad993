"""Model execution: prefill, decode, KV cache: a model with a cache of rows, behind one small interface.

In: tokens for rows. Out: logits. `engine.py` decides which story has which row. `TorchBackend` runs on any device and
is the reference that every other backend is compared with.
"""

from collections.abc import Sequence
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from slm_ray.config.schema import ModelConfig

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
