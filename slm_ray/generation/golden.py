"""Whether a backend computes what the model that was trained computes, on fixed prompts.

In: a model in torch, its tokenizer, a backend. Out: the largest difference of a logit. The server asks the same prompts
of every version before it serves.
"""

import dataclasses

import numpy as np

from slm_ray.errors import UserError
from slm_ray.generation.backend import Backend
from slm_ray.generation.torch_backend import TorchBackend
from slm_ray.model.decoder import Decoder
from slm_ray.tokenization.tokenizer import Tokenizer

GOLDEN_PROMPTS = ("", "The", "Once upon a time", "One day, a little dog")
"""What every version is asked to continue before it serves."""
CONTINUED_TOKENS = 16
TOLERANCE = 1e-4
"""Of a logit, relative to the largest: fp32 summed in another order."""


class BrokenModelError(UserError):
    """A model that was read and cannot write."""


@dataclasses.dataclass(frozen=True)
class GoldenAnswers:
    """How far a backend is from torch on the fixed prompts and on what greedy decoding writes after them."""

    largest_error: float
    """The largest difference of two logits."""
    largest_logit: float
    """The largest logit in torch, by its size."""

    @property
    def is_equal(self) -> bool:
        """Whether the difference is that of rounding."""
        return self.largest_error <= TOLERANCE * max(1.0, self.largest_logit)


def fitting_prompts(tokenizer: Tokenizer, seq_len: int) -> list[str]:
    """The fixed prompts that leave a context of seq_len tokens half empty; the empty one always does."""
    return [prompt for prompt in GOLDEN_PROMPTS if len(tokenizer.encode(prompt)) <= seq_len // 2]


def compare_with_torch(model: Decoder, tokenizer: Tokenizer, backend: Backend) -> GoldenAnswers:
    """Give the fixed prompts to a backend and to torch, and follow torch's greedy tokens in both.

    Raises:
        BrokenModelError: logits that are not finite.
    """
    torch_backend = TorchBackend(model, 1)
    error = size = 0.0
    for prompt in fitting_prompts(tokenizer, model.config.seq_len):
        tokens = [tokenizer.start_id, *tokenizer.encode(prompt)]
        ours, theirs = torch_backend.prefill(0, tokens), backend.prefill(0, tokens)
        assert ours is not None and theirs is not None
        for _ in range(min(CONTINUED_TOKENS, model.config.seq_len - len(tokens))):
            if not (np.isfinite(ours).all() and np.isfinite(theirs).all()):
                raise BrokenModelError(f"the model gives numbers that are not finite after {prompt!r}")
            error = max(error, float(np.abs(ours - theirs).max()))
            size = max(size, float(np.abs(ours).max()))
            chosen = [int(ours[-1].argmax())]
            ours, theirs = torch_backend.decode(chosen), backend.decode(chosen)
        backend.prefill(0, [])
    return GoldenAnswers(error, size)
