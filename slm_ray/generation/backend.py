"""Model execution: prefill, decode, KV cache, behind one small interface.

In: tokens for slots of the cache. Out: logits. `engine.py` decides which request has which slot. `TorchBackend` runs on
any device and is the reference that every other backend is compared with.
"""

from collections.abc import Sequence
from typing import Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from slm_ray.config.schema import ModelConfig

Logits = NDArray[np.float32]
BackendName = Literal["auto", "torch", "onnx", "onnx-int8"]
"""What can be chosen (`backend_choice.py`); named here, where no torch is needed."""


class Backend(Protocol):
    """A model and a cache of `max_slots` slots, each at its own length of at most `config.seq_len`.

    For one thread at a time. Slots in use are the first ones, without gaps.
    """

    config: ModelConfig
    max_slots: int

    def prefill(self, slot: int, tokens: Sequence[int], *, start: int = 0, wants_logits: bool = True) -> Logits | None:
        """Fill a slot with tokens, which may be none, behind the first `start` that it holds; the rest is forgotten.

        Returns the logits that follow each token, (T, vocab_size); None without tokens, and where nobody wants them.
        """
        ...

    def prefill_all(self, slot: int, prompts: Sequence[Sequence[int]]) -> None:
        """Fill this slot and those behind it from their beginning, each with the tokens of a prompt, none empty.

        The same as one `prefill` after another where nobody wants logits.
        """
        ...

    def decode(self, tokens: Sequence[int]) -> Logits:
        """Append one token to each of the first B slots, none of which is full.

        tokens: B ids. Returns the logits that follow them, (B, vocab_size), valid until the next call.
        """
        ...

    def length(self, slot: int) -> int:
        """Tokens that a slot holds."""
        ...

    def copy_slot(self, source: int, target: int) -> None:
        """Copy the keys, values and length of one slot to another."""
        ...
