"""Bytes of single tokens join to those of any text, with every kind of tokenizer that knows bytes."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer as Inner
from tokenizers import decoders, models, pre_tokenizers

from slm_ray.tokenization.byte_entries import BYTE_OF
from slm_ray.tokenization.token_bytes import token_bytes
from slm_ray.tokenization.tokenizer import END_OF_TEXT, Tokenizer
from slm_ray.tokenization.training import train_bpe

BYTE_LEVEL = train_bpe(["Tom and Mia played in the garden until the sun went down."] * 3, vocab_size=290)


def with_byte_pieces() -> Tokenizer:
    """As Llama's: letters that are no entry are `<0x41>`, and spaces are U+2581."""
    entries = [*(f"<0x{byte:02X}>" for byte in range(256)), *"abct\u2581"]
    inner = Inner(models.BPE({entry: number for number, entry in enumerate(entries)}, [], byte_fallback=True))
    inner.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never", split=False)
    inner.decoder = decoders.Sequence([decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()])
    inner.add_special_tokens([END_OF_TEXT])
    return Tokenizer(inner)


@pytest.mark.parametrize("tokenizer", [BYTE_LEVEL, with_byte_pieces()], ids=["byte-level", "byte-pieces"])
@given(text=st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\u2581"), max_size=20))
def test_bytes_of_tokens_join_to_those_of_any_text(tokenizer: Tokenizer, text: str) -> None:
    ids = tokenizer.encode(text)
    pieces = zip(ids, tokenizer.pieces(ids), strict=True)
    assert b"".join(token_bytes(tokenizer, *one) for one in pieces) == text.encode()


def test_the_alphabet_is_that_of_the_tokenizers_package() -> None:
    assert set(BYTE_OF) == set(pre_tokenizers.ByteLevel.alphabet())
    assert sorted(BYTE_OF.values()) == list(range(256))


def test_a_token_without_an_entry_is_its_text() -> None:
    assert token_bytes(BYTE_LEVEL, 10**6, "\ufffd") == "\ufffd".encode()
    assert token_bytes(BYTE_LEVEL, BYTE_LEVEL.eos_id, END_OF_TEXT) == END_OF_TEXT.encode()
