"""A trained Unigram tokenizer as SentencePiece's `.model` and `.vocab`, with the ids of its `tokenizer.json`.

In: a `Tokenizer`. Out: the bytes of both files. Written beside a data set's tokenizer by `pipelines/prepare.py`.

Our Unigram is over bytes, which SentencePiece is not: here its normaliser writes each byte as the character that stands
for it (GPT-2's), and its denormaliser reads them back. The message is put together by hand, because the module for it
that comes with `sentencepiece` wants a protobuf newer than the one that Beam allows.
"""

import json
import struct
from collections.abc import Mapping

from slm_ray.tokenization.byte_entries import BYTE_OF
from slm_ray.tokenization.tokenizer import END_OF_TEXT, Tokenizer

MODEL_FILE, VOCAB_FILE = "tokenizer.model", "tokenizer.vocab"
UNKNOWN = "<unk>"
_NORMAL, _UNKNOWN, _CONTROL = 1, 2, 3  # SentencePiece.Type
_UNIGRAM = 1  # TrainerSpec.ModelType
_BLOCK = 256  # units of a double array are made by so many


def sentencepiece_files(tokenizer: Tokenizer) -> dict[str, bytes]:
    """`.model` and `.vocab` by their names; empty for a tokenizer that is no byte-level Unigram.

    The model has one entry more, `<unk>`, behind all others, which SentencePiece asks for and no text gives but one
    with a NUL. Ids are those of the tokenizer unless a piece lies across the cuts of GPT-2's pattern, which
    SentencePiece does not make: in `'star` the tokenizer sees `'s` and `tar`, SentencePiece perhaps `'` and `star`.
    """
    config = json.loads(tokenizer.to_json())
    if config["model"]["type"] != "Unigram" or (config["pre_tokenizer"] or {}).get("type") != "ByteLevel":
        return {}
    pieces = [(text, score, _CONTROL if text == END_OF_TEXT else _NORMAL) for text, score in config["model"]["vocab"]]
    pieces.append((UNKNOWN, 0.0, _UNKNOWN))
    vocab = "".join(f"{text}\t{score:g}\n" for text, score, _ in pieces)
    return {MODEL_FILE: _model(pieces), VOCAB_FILE: vocab.encode()}


def _model(pieces: list[tuple[str, float, int]]) -> bytes:
    """The message `ModelProto`."""
    written = {bytes([byte]): character.encode() for character, byte in BYTE_OF.items() if byte}
    n_end = next(number for number, piece in enumerate(pieces) if piece[2] == _CONTROL)
    trainer = _number(3, _UNIGRAM) + _number(4, len(pieces)) + _number(40, len(pieces) - 1) + _number(41, -1)
    trainer += _number(42, n_end) + _number(43, -1) + _text(45, UNKNOWN.encode()) + _text(47, END_OF_TEXT.encode())
    parts = [_text(1, _text(1, text.encode()) + _score(score) + _number(3, kind)) for text, score, kind in pieces]
    read = {character: byte for byte, character in written.items()}
    return b"".join([*parts, _text(2, trainer), _text(3, _rules(written)), _text(5, _rules(read))])


def _rules(rules: Mapping[bytes, bytes]) -> bytes:
    """The message `NormalizerSpec`: these rules, and no white space added, joined or written otherwise."""
    return _text(1, b"bytes") + _text(2, charsmap(rules)) + _number(3, 0) + _number(4, 0) + _number(5, 0)


def charsmap(rules: Mapping[bytes, bytes]) -> bytes:
    """SentencePiece's precompiled rules: size of a trie, the trie as a double array, the texts that it points to.

    Units are those of darts-clone: a label in the lowest byte, bit 8 where a rule ends, the way to the children above;
    a child of label 0 holds where the text begins. No rule may hold a zero byte.
    """
    texts, places = b"", {}
    for key, text in sorted(rules.items()):
        places[key], texts = len(texts), texts + text + b"\0"
    units: dict[int, int] = {}
    free = iter(range(1, 1 << 21))
    todo, taken = [(0, b"")], {0}
    while todo:
        node, prefix = todo.pop()
        longer = sorted({key[len(prefix)] for key in places if key.startswith(prefix) and key != prefix})
        labels = [*([0] if prefix in places else []), *longer]
        base = next(base for base in free if all(base ^ label not in taken for label in labels))
        taken.update(base ^ label for label in labels)
        label = prefix[-1] if prefix else 0
        units[node] = (node ^ base) << 10 | (prefix in places) << 8 | label
        if prefix in places:
            units[base] = 1 << 31 | places[prefix]
        todo += [(base ^ label, prefix + bytes([label])) for label in longer]
    size = -(-(max(units) + 1) // _BLOCK) * _BLOCK
    return struct.pack(f"<I{size}I", 4 * size, *(units.get(place, 0) for place in range(size))) + texts


def _key(field: int, kind: int) -> bytes:
    return _varint(field << 3 | kind)


def _number(field: int, value: int) -> bytes:
    return _key(field, 0) + _varint(value & (1 << 64) - 1)


def _text(field: int, value: bytes) -> bytes:
    return _key(field, 2) + _varint(len(value)) + value


def _score(value: float) -> bytes:
    return _key(2, 5) + struct.pack("<f", value)


def _varint(value: int) -> bytes:
    """Seven bits a byte, the lowest first (protobuf.dev/programming-guides/encoding)."""
    written = bytearray()
    while value > 0x7F:
        written.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*written, value])
