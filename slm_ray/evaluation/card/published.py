"""Figures that others published for models of TinyStories, with what keeps them from being compared as they stand.

In: nothing. Out: rows of a card. Only what a source states stands here; nothing is converted. They are part of what a
card is verified by: another list is another `FORMAT_VERSION` of cards.
"""

from typing import Any

LLAMA2C = "karpathy/llama2.c, README, table of models (https://github.com/karpathy/llama2.c)"
_LLAMA2C_DIFFERS = (
    "nats a token of another tokenizer, over windows of its stream of tokens, on its own held-out part of the larger "
    "TinyStories (GPT-3.5 and GPT-4); seen whole, many epochs"
)


def _llama2c(model: str, parameters: str, vocabulary: str, context: int, loss: float) -> dict[str, Any]:
    return {
        "model": model,
        "parameters": parameters,
        "tokenizer": vocabulary,
        "context": context,
        "loss": loss,
        "source": LLAMA2C,
        "differs": _LLAMA2C_DIFFERS,
    }


PUBLISHED: list[dict[str, Any]] = [
    _llama2c("stories260K", "260 thousand", "SentencePiece BPE of 512", 512, 1.297),
    _llama2c("stories15M", "15 million", "Llama 2, 32,000", 256, 1.072),
    _llama2c("stories42M", "42 million", "Llama 2, 32,000", 1024, 0.847),
    _llama2c("stories110M", "110 million", "Llama 2, 32,000", 1024, 0.760),
]
"""Validation losses in nats a token. They fall with the size of the vocabulary: bits per byte do not, and were not
published."""
