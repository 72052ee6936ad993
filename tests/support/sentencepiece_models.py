"""SentencePiece models made by the real package, and texts to try them on, for several tests."""

import io
from functools import cache
from typing import Any

import sentencepiece
from hypothesis import strategies as st

from slm_ray.corpus.grammar import sample_stories
from slm_ray.tokenization import loading
from slm_ray.tokenization.from_sentencepiece import convert
from slm_ray.tokenization.tokenizer import END_OF_TEXT, Tokenizer

STORIES = [str(story) for story in sample_stories(0, 60)]
PIECES = st.sampled_from(
    [
        *("the", "The", " the", "Lily", "didn't", '."', "aa", "aaa", "7", "café", "日本", "😀"),
        *(" ", "  ", "\n", "\u2581", "\u00a0", "\x1c", "\x00", "\u0301", "\u200d"),
        *("<", "<s>", "</s>", "<unk>", "<0x41>", "<0x", "0A>", "<|", "|>", END_OF_TEXT),
    ]
)
MIXED = st.lists(PIECES, max_size=12).map("".join)
TEXTS = st.text() | MIXED


@cache
def sentencepiece_model(kind: str, **changes: Any) -> bytes:
    """A `.model` made by the `sentencepiece` package."""
    options = {
        "vocab_size": 500,
        "model_type": kind,
        "normalization_rule_name": "identity",
        "remove_extra_whitespaces": False,
        "byte_fallback": True,
        "character_coverage": 1.0,
        "hard_vocab_limit": False,
        "minloglevel": 2,
    }
    written = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(STORIES), model_writer=written, **{**options, **changes}
    )
    return written.getvalue()


@cache
def from_model(kind: str, **changes: Any) -> Tokenizer:
    text = loading.with_end_of_text(convert(sentencepiece_model(kind, **changes), "stories.model"))
    return Tokenizer.from_json(text, must_keep_text=True)
