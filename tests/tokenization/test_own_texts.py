"""Texts of single ids against whole texts."""

import functools
import json

from hypothesis import given
from hypothesis import strategies as st

from slm_ray.tokenization.tokenizer import Tokenizer
from slm_ray.tokenization.training import train_bpe

STORIES = ["Once upon a time, there was a café. It didn't rain.", "Tom said: 日本 … and went home."]


@given(st.lists(st.integers(0, 299), max_size=6), st.integers(0, 299))
def test_own_text_of_an_id_follows_any_whole_characters(before: list[int], token: int) -> None:
    """So a story's text needs no decoding of what was there before."""
    tokenizer = own_text_tokenizer()
    text, own = tokenizer.decode(before), tokenizer.own_texts[token]
    if own:
        assert tokenizer.decode([*before, token]) == text + own
    if own == "":
        alone = tokenizer.decode([token])
        assert alone == "" or "\ufffd" in alone


def test_own_text_is_not_certain_where_the_decoder_looks_around() -> None:
    """As SentencePiece's does, which takes the first space away."""
    inner = json.loads(own_text_tokenizer().to_json())
    inner["decoder"] = {"type": "Metaspace", "replacement": "\u2581", "prepend_scheme": "always", "split": True}
    tokenizer = Tokenizer.from_json(json.dumps(inner))
    assert {tokenizer.own_texts[token] for token in range(300)} == {""}


@functools.cache
def own_text_tokenizer() -> Tokenizer:
    return train_bpe(STORIES, vocab_size=300)
