"""A SentencePiece `.model` as a `tokenizer.json`: the same ids, and every text comes back.

In: the bytes of a `.model` (a protocol buffer). Out: the JSON of a `tokenizers` tokenizer, without end-of-text token.
Called by `loading`.

SentencePiece writes a space as "▁" and cannot tell the two apart when it reads back. Here the pieces hold plain
spaces, so that a "▁" of a story is a character like any other. A model that normalises text (the package's default,
`nmt_nfkc`) keeps its rules, see `normaliser`; one without byte fallback keeps every text of its own characters.
"""

import json
import re
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from slm_ray.errors import UserError
from slm_ray.tokenization.normaliser import Normaliser, normalizer_json

_UNIGRAM, _BPE = 1, 2  # TrainerSpec.ModelType
_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED, _UNUSED = range(1, 6)  # SentencePiece.Type; 6 are bytes
_SPACE = "\u2581"
_REMEDY = "train it with SentencePiece's defaults, or leave out --tokenizer to train one"


Fields = dict[int, list[int | bytes]]
"""A message of a protocol buffer: the values of each field number, in order."""


@dataclass(frozen=True, kw_only=True)
class Piece:
    """One entry; its id is its place."""

    text: str  # as SentencePiece writes it, with "▁"
    score: float
    type: int


@dataclass(frozen=True, kw_only=True)
class Model:
    """What of `sentencepiece_model.proto` decides about ids."""

    pieces: list[Piece]
    model_type: int
    byte_fallback: bool
    spaces_at_end: bool
    charsmap: bytes  # rules of its normaliser, empty where it has none
    joins_spaces: bool
    has_denormalizer: bool
    has_prefix: bool
    escapes_spaces: bool


def parse(content: bytes) -> Model:
    """Read the bytes of a `.model`.

    By hand, because the reader that comes with `sentencepiece` wants a protobuf newer than the one that Beam
    allows. Raises ValueError if it is something else.
    """
    fields = _fields(content)
    pieces = [_piece(value) for value in fields.get(1, [])]
    if not pieces or _UNKNOWN not in {piece.type for piece in pieces}:
        raise ValueError("it has no pieces, or none for what is unknown")
    trainer, normalizer, denormalizer = (_fields(_last(fields, number, b"")) for number in (2, 3, 5))
    return Model(
        pieces=pieces,
        model_type=_last(trainer, 3, _UNIGRAM),
        byte_fallback=bool(_last(trainer, 35, 0)),
        spaces_at_end=bool(_last(trainer, 24, 0)),
        charsmap=_last(normalizer, 2, b""),
        joins_spaces=bool(_last(normalizer, 4, 1)),
        has_denormalizer=bool(_last(denormalizer, 2, b"")),
        has_prefix=bool(_last(normalizer, 3, 1)),
        escapes_spaces=bool(_last(normalizer, 5, 1)),
    )


def convert(content: bytes, name: str) -> str:
    """The `tokenizer.json` of a `.model`, Unigram or BPE, that keeps every normalised text of characters that it has.

    Ids are those of the `sentencepiece` package except where it loses text ("▁" in a story, and runs of spaces
    where the model removes them, of which cleaned stories have none) and for the literal name of a mark (`</s>`) if
    a Unigram model has a piece across its first two characters; such text is kept as well. A space that the model
    puts before each text is put there too, and taken off again by decoding.

    Without byte fallback, two more differ, in text that no prepared story has: letters without a piece around the name
    of a mark (or `<0x41>`) are two unknown ones where the package has one, and of a text whose characters are all
    removed nothing is left, not even the space before it.

    Raises:
        UserError: it is no such file, or it writes text otherwise than it was read.
    """
    try:
        model = parse(content)
        normaliser = Normaliser(model.charsmap, model.joins_spaces) if model.charsmap else None
    except ValueError as error:
        raise UserError(f"{name} is not a SentencePiece .model: {error}") from error
    why = _why_not(model)
    if why is not None:
        raise UserError(f"cannot take the SentencePiece model {name}: {why}; {_REMEDY}")
    has_prefix = model.has_prefix
    strip = [{"type": "Strip", "content": " ", "start": 1, "stop": 0}] if has_prefix else []
    config: dict[str, Any] = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [],
        "normalizer": {"type": "Prepend", "prepend": " "} if has_prefix else None,
        "pre_tokenizer": None,
        "post_processor": None,
        "decoder": {"type": "Sequence", "decoders": [{"type": "ByteFallback"}, {"type": "Fuse"}, *strip]},
    }
    if normaliser is not None:
        config["normalizer"] = normalizer_json(normaliser, " " if has_prefix else "")
    if model.model_type == _UNIGRAM:
        config["model"] = _unigram(model)
        config["pre_tokenizer"] = _cut_names(model)
    else:
        config["model"] = _bpe(model)
    return json.dumps(config, ensure_ascii=False)


def _why_not(model: Model) -> str | None:
    """Why it cannot be taken, or None."""
    types = {piece.type for piece in model.pieces}
    reasons = {
        "it is neither a Unigram nor a BPE model": model.model_type not in (_UNIGRAM, _BPE),
        "its denormaliser changes what is read back (prepare.py wrote it? Then name the tokenizer.json beside it)": (
            model.has_denormalizer
        ),
        "it puts spaces at the end of words": model.spaces_at_end,
        "it does not write spaces as ▁": not model.escapes_spaces,
        "it has unused pieces": _UNUSED in types,
        "it has user-defined symbols": _USER_DEFINED in types,
    }
    return next((why for why, holds in reasons.items() if holds), None)


def _name(piece: Piece) -> str:
    """What the piece is called in `tokenizer.json`: text as it is, names of bytes and marks unchanged."""
    return piece.text.replace(_SPACE, " ") if piece.type == _NORMAL else piece.text


def _unigram(model: Model) -> dict[str, Any]:
    return {
        "type": "Unigram",
        "unk_id": next(number for number, piece in enumerate(model.pieces) if piece.type == _UNKNOWN),
        "vocab": [[_name(piece), piece.score] for piece in model.pieces],
        "byte_fallback": model.byte_fallback,
    }


def _cut_names(model: Model) -> dict[str, Any]:
    """A pre-tokenizer that cuts the literal text `<s>` or `<0x0A>` behind its first character.

    In `tokenizers` such names lie among the pieces, and a story that has the letters would get the mark or the
    byte itself; SentencePiece never does that.
    """
    names = [piece.text for piece in model.pieces if piece.type in (_CONTROL, _UNKNOWN)]
    marks = [f"{re.escape(name[0])}(?={re.escape(name[1:])})" for name in names if len(name) > 1]
    pattern = "|".join(["<(?=0x[0-9A-F]{2}>)", *marks])
    return {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}


def _bpe(model: Model) -> dict[str, Any]:
    """SentencePiece joins whatever two neighbours make the piece of best score: each way to cut a piece is a merge."""
    ids = {_name(piece): number for number, piece in enumerate(model.pieces)}
    scores = {_name(piece): piece.score for piece in model.pieces if piece.type == _NORMAL}
    merges = [
        (left, right)
        for whole in sorted(scores, key=lambda piece: (-scores[piece], ids[piece]))
        for left, right in ((whole[:cut], whole[cut:]) for cut in range(1, len(whole)))
        if left in scores and right in scores
    ]
    return {
        "type": "BPE",
        "unk_token": next(piece.text for piece in model.pieces if piece.type == _UNKNOWN),
        "fuse_unk": True,
        "byte_fallback": model.byte_fallback,
        "ignore_merges": False,
        "vocab": ids,
        "merges": merges,
    }


def _piece(message: int | bytes) -> Piece:
    fields = _fields(message)
    score = _last(fields, 2, bytes(4))
    return Piece(
        text=_last(fields, 1, b"").decode("utf-8"),
        score=struct.unpack("<f", score)[0] if len(score) == 4 else 0.0,
        type=_last(fields, 3, _NORMAL),
    )


def _last(fields: Fields, number: int, default: Any) -> Any:
    """The value of a field that occurs once, of the type of `default`."""
    value = fields.get(number, [default])[-1]
    if not isinstance(value, type(default)):
        raise ValueError(f"field {number} is of another type")
    return value


def _fields(message: int | bytes) -> Fields:
    """The wire format of protocol buffers (protobuf.dev/programming-guides/encoding)."""
    if not isinstance(message, bytes):
        raise ValueError("a number where a message was expected")
    fields: Fields = {}
    for number, value in _pairs(message):
        fields.setdefault(number, []).append(value)
    return fields


def _pairs(message: bytes) -> Iterator[tuple[int, int | bytes]]:
    position = 0
    while position < len(message):
        key, position = _varint(message, position)
        kind = key & 7
        if kind == 0:
            value, position = _varint(message, position)
            yield key >> 3, value
            continue
        if kind == 2:
            size, position = _varint(message, position)
        else:
            size = {1: 8, 5: 4}.get(kind, len(message))
        if position + size > len(message):
            raise ValueError("it is cut short, or something else")
        yield key >> 3, message[position : position + size]
        position += size


def _varint(message: bytes, position: int) -> tuple[int, int]:
    """A number of 7 bits a byte, and the position behind it."""
    number = 0
    for shift in range(0, 70, 7):
        if position >= len(message):
            break
        number |= (message[position] & 0x7F) << shift
        position += 1
        if message[position - 1] < 0x80:
            return number, position
    raise ValueError("it is cut short, or something else")
