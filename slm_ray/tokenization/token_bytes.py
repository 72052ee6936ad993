"""The bytes that a single token stands for, also where it is part of a character.

In: a token with its text by itself. Out: bytes; those of all tokens of a text join to the text's. Conversations give
them with log-probabilities, as OpenAI's clients expect.
"""

from slm_ray.tokenization.byte_entries import BYTE_OF
from slm_ray.tokenization.tokenizer import Tokenizer

_PARTIAL = "\ufffd"


def token_bytes(tokenizer: Tokenizer, token: int, piece: str) -> bytes:
    """The bytes of an id whose text by itself is `piece`: `"Ġcat"` of a byte-level tokenizer is `b" cat"`."""
    if _PARTIAL not in piece:
        return piece.encode()
    entry = tokenizer.entry(token)
    if len(entry) == 6 and entry.startswith("<0x"):  # as SentencePiece writes a byte
        return bytes([int(entry[3:5], 16)])
    if entry and all(character in BYTE_OF for character in entry):
        return bytes(BYTE_OF[character] for character in entry)
    return piece.encode()
