"""A tokenizer in llama.cpp's terms, so that it gives the same ids there.

In: a `tokenizer.json`. Out: a `Vocabulary` for the metadata of a GGUF file, or a refusal: llama.cpp has byte-level BPE
with a fixed list of pre-tokenizers, and SentencePiece's BPE with bytes for what has no piece. Its Unigram has neither
bytes for unknown characters nor a pre-tokenizer, so no Unigram of ours gives the same ids there.

Source: llama.cpp, src/llama-vocab.cpp (names of `tokenizer.ggml.pre`, their patterns and `ignore_merges`).
"""

import dataclasses
import itertools
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from gguf import TokenType

from slm_ray.errors import UserError
from slm_ray.exports.formats import GGUF_ENDS
from slm_ray.tokenization.tokenizer import Tokenizer

SPACE = "\u2581"
"""How SentencePiece writes a space."""
_CONTRACTIONS = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_ENDINGS = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_QWEN2 = rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{_ENDINGS}"
_LLAMA3 = rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{{1,3}}{_ENDINGS}"
_BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True}


def _split(pattern: str) -> list[dict[str, Any]]:
    cut = {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
    return [cut, {**_BYTE_LEVEL, "use_regex": False}]


PRE_TOKENIZERS: dict[str, tuple[list[dict[str, Any]], bool]] = {
    "gpt-2": ([_BYTE_LEVEL], False),
    "qwen2": (_split(_QWEN2), False),
    "llama-bpe": (_split(_LLAMA3), True),
}
"""llama.cpp's name -> the same in `tokenizers`, and whether a whole word that is an entry is taken as it is."""
_BYTE = re.compile("<0x[0-9A-F]{2}>")
_MARKS = frozenset({"<s>", "</s>", "<pad>", "<mask>"})


@dataclasses.dataclass(frozen=True, kw_only=True)
class Vocabulary:
    """What the keys `tokenizer.ggml.*` say."""

    model: str
    """`gpt2` is byte-level BPE, `llama` SentencePiece's BPE."""
    pre: str
    """Pre-tokenizer; empty for SentencePiece's."""
    tokens: tuple[str, ...]
    """By id."""
    types: tuple[int, ...]
    """`gguf.TokenType` of each."""
    start_id: int
    """Stands before each text."""
    end_ids: tuple[int, ...]
    """Any of them ends it; the one that ends a document is first. At most `GGUF_ENDS`."""
    merges: tuple[tuple[str, str], ...] = ()
    scores: tuple[float, ...] = ()
    has_space_prefix: bool = False


def vocabulary(tokenizer: Tokenizer, size: int) -> Vocabulary:
    """The vocabulary of a model of `size` entries; those that the tokenizer does not have are unused ones.

    Raises:
        UserError: llama.cpp has no tokenizer that gives the same ids; says why.
    """
    config = json.loads(tokenizer.to_json())
    why = _why_not(config)
    if why:
        raise UserError(f"llama.cpp has no tokenizer that gives the ids of this one: {why}")
    model, added = config["model"], config["added_tokens"]
    numbers: dict[str, int] = {**model["vocab"]} | {one["content"]: one["id"] for one in added}
    entries: list[tuple[str, int]] = [(f"[PAD{number}]", int(TokenType.UNUSED)) for number in range(size)]
    for text, number in numbers.items():
        entries[number] = (_written(text, config), int(TokenType.NORMAL))
    if model.get("byte_fallback"):
        for text, number in model["vocab"].items():
            entries[number] = (entries[number][0], _type_of_piece(text, model["unk_token"]))
    for one in added:
        kind = TokenType.CONTROL if one["special"] else TokenType.USER_DEFINED
        entries[one["id"]] = (one["content"], int(kind))
    found = Vocabulary(
        model="gpt2",
        pre=_pre(config),
        tokens=tuple(text for text, _ in entries),
        types=tuple(kind for _, kind in entries),
        start_id=tokenizer.start_id,
        end_ids=tuple(tokenizer.borders.end_ids[:GGUF_ENDS]),
        merges=tuple(_pairs(model["merges"])),
    )
    return _sentencepiece(found, config) if model.get("byte_fallback") else found


def _written(text: str, config: Mapping[str, Any]) -> str:
    """A piece as llama.cpp wants it: SentencePiece's with ▁ for a space."""
    return text.replace(" ", SPACE) if config["model"].get("byte_fallback") else text


def _type_of_piece(text: str, unknown: str | None) -> int:
    if _BYTE.fullmatch(text):
        return int(TokenType.BYTE)
    if text == unknown:
        return int(TokenType.UNKNOWN)
    return int(TokenType.CONTROL if text in _MARKS else TokenType.NORMAL)


def _sentencepiece(found: Vocabulary, config: Mapping[str, Any]) -> Vocabulary:
    """Scores in place of merges: SentencePiece joins the neighbours that make the piece of best score."""
    model = config["model"]
    places: dict[str, int] = {}
    for left, right in _pairs(model["merges"]):
        places.setdefault(left + right, len(places))
    scores = [0.0] * len(found.tokens)
    for text, number in model["vocab"].items():
        scores[number] = -float(places.get(text, len(places)))
    prefix = _space_prefix(config)
    assert prefix is not None
    return dataclasses.replace(found, model="llama", pre="", merges=(), scores=tuple(scores), has_space_prefix=prefix)


def _why_not(config: Mapping[str, Any]) -> str:
    """Why llama.cpp cannot give the same ids; empty where it can."""
    model = config["model"]
    if model["type"] != "BPE":
        return f"it is {model['type']}, and llama.cpp's has neither its pre-tokenizer nor bytes for what has no piece"
    if model.get("dropout") or model.get("continuing_subword_prefix") or model.get("end_of_word_suffix"):
        return "its BPE has dropout, or marks within words"
    for one in config["added_tokens"]:
        if one["lstrip"] or one["rstrip"] or one["single_word"]:
            return f"its token {one['content']} takes spaces with it, or whole words alone"
    if model.get("byte_fallback"):
        return _why_not_sentencepiece(config)
    if config["normalizer"] is not None:
        return f"it changes text before it is cut ({config['normalizer']['type']})"
    if not _pre(config):
        return f"its pre-tokenizer is none of {', '.join(PRE_TOKENIZERS)}"
    return ""


def _pre(config: Mapping[str, Any]) -> str:
    """llama.cpp's name of the pre-tokenizer; empty where it has none that is the same."""
    found = config["pre_tokenizer"] or {}
    parts = found["pretokenizers"] if found.get("type") == "Sequence" else [found]
    parts = [{name: value for name, value in part.items() if name != "trim_offsets"} for part in parts]
    ignores = bool(config["model"].get("ignore_merges"))
    for name, (expected, ignores_merges) in PRE_TOKENIZERS.items():
        if parts == expected and ignores == ignores_merges:
            return name
    return ""


def _why_not_sentencepiece(config: Mapping[str, Any]) -> str:
    if _space_prefix(config) is None:
        return "it is BPE with bytes for what has no piece, and cuts or changes text in another way than SentencePiece"
    model = config["model"]
    vocab, merges = model["vocab"], list(_pairs(model["merges"]))
    pieces = {text for text in vocab if not _BYTE.fullmatch(text) and text not in _MARKS | {model["unk_token"]}}
    cuts = {(text[:at], text[at:]) for text in pieces for at in range(1, len(text))}
    if {(left, right) for left, right in cuts if left in pieces and right in pieces} != set(merges):
        return "its merges are not all ways to put its pieces together"
    wholes = [left + right for left, right in merges]
    if sum(one != other for one, other in itertools.pairwise(wholes)) + bool(wholes) != len(set(wholes)):
        return "its merges are not in the order of its pieces"
    return ""


def _space_prefix(config: Mapping[str, Any]) -> bool | None:
    """Whether SentencePiece puts a space before each text; None where the tokenizer is not of its making."""
    steps = _steps(config["normalizer"], "normalizers")
    pre = _steps(config["pre_tokenizer"], "pretokenizers")
    replaced = {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}
    if not pre and steps in ([], [replaced]):
        return False
    if not pre and steps in ([{"type": "Prepend", "prepend": " "}], [{"type": "Prepend", "prepend": SPACE}, replaced]):
        return True
    if not steps and len(pre) == 1 and pre[0]["type"] == "Metaspace" and pre[0].get("split") is False:
        return {"first": True, "never": False}.get(pre[0]["prepend_scheme"])
    return None


def _steps(part: Mapping[str, Any] | None, name: str) -> list[Mapping[str, Any]]:
    if part is None:
        return []
    return list(part[name]) if part["type"] == "Sequence" else [part]


def _pairs(merges: Sequence[Any]) -> Iterator[tuple[str, str]]:
    """Merges as pairs: older files have them as `left right`."""
    for merge in merges:
        left, right = merge.split(" ", 1) if isinstance(merge, str) else merge
        yield left, right
