"""Encoding by `gigatoken`, for the tokenizers of which it is known to give the ids of `tokenizers`.

In: the content of a `tokenizer.json` and texts in Arrow's memory. Out: their ids in one array. Used by
`Tokenizer.encode_batch`; who is not known here, or differs in the check that each process makes before its first text,
is encoded by `tokenizers` itself. The package is young, so nothing is taken on trust: a property test compares both for
every kind that `is_known` lets in.
"""

import importlib.metadata
import json
import logging
import threading
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from slm_ray.errors import one_line
from slm_ray.tokenization.borders import END_OF_TEXT
from slm_ray.tokenization.byte_entries import BYTE_OF

LOGGER = logging.getLogger(__name__)
MAX_NEW_BYTES = 1 << 23
"""Of distinct words, before the package's own memory of words begins anew: it has no bound, and takes 12 bytes for one
of random words. Of TinyStories this is 200 MB of text."""
_LONG = 3000
CHECKED = (
    *("", " ", "  ", "\n", "\r\n \r\n", "\t", "a", "A's b'S can't I'LL", "a  b   c \n\n d", "\x00\x7f\x1c"),
    *("x" * _LONG, "ab " * _LONG, "\u65e5\u672c" * _LONG),
    *(f"a{END_OF_TEXT} {END_OF_TEXT}{END_OF_TEXT}", "<s></s><unk><pad><0x41><|", "\u2581a\u2581 \u0120b\u010a"),
    *("\u00a0\u3000\u2028\u0085 \u200b\ufeff\u200d", "1234567 \u00bd \u2167 \u0663 \U0001d7d8 x\u00b2 3rd"),
    *("--...!?\u2014\u2026\u201cq\u201d", "caf\u00e9 cafe\u0301 \u0130\u0131\u00df\u017f\u01c5\u02b0"),
    *("\U0001f468\u200d\U0001f469\u200d\U0001f467 \U0001f1e9\U0001f1ea", "\u0939\u093f\u0928\u094d\u0926\u0940"),
    *("\u0e44\u0e17\u0e22 \ud55c\uad6d", "\u0627\u0644\u0639"),
    "".join(map(chr, (*range(0x600), *range(0x600, 0xD800, 0x61), *range(0xE000, 0x110000, 0x1111)))),
    "Once upon a time, there was a girl named Lily. \"It's mine!\" she said. Tom didn't like the 3 toys.",
)
"""Texts that are encoded by both before the first text of a process."""

PATTERNS = {
    "Llama 3": r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+",
    "Qwen 2": r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+",
}
"""How these cut a text into words, besides GPT-2, which `ByteLevel` does by itself."""
Flat = tuple[npt.NDArray[np.uint32], npt.NDArray[np.int64]]
"""Ids of several texts in one array, and where those of each begin and end."""


def is_known(config: dict[str, Any]) -> bool:
    """Whether the ids of this tokenizer are known to be equal: it is one of the kinds that the property test has.

    Byte-level BPE that cuts words as GPT-2, Llama 3 or Qwen 2 do, and BPE with bytes for what is unknown as
    `from_sentencepiece` makes it; all of them with every byte, and without added tokens that are not special.
    """
    model, before = config["model"], config["normalizer"]
    if model["type"] != "BPE" or not all(token["special"] for token in config["added_tokens"]):
        return False
    if any(model.get(name) for name in ("dropout", "continuing_subword_prefix", "end_of_word_suffix")):
        return False
    if model.get("byte_fallback"):
        is_plain = config["pre_tokenizer"] is None and before in (None, {"type": "Prepend", "prepend": " "})
        has_bytes = all(f"<0x{byte:02X}>" in model["vocab"] for byte in range(256))
        return is_plain and has_bytes and not model.get("ignore_merges")
    has_bytes = all(name in model["vocab"] for name in BYTE_OF)
    return has_bytes and before is None and _cuts_words_as_known(config["pre_tokenizer"] or {})


def _cuts_words_as_known(pre: dict[str, Any]) -> bool:
    if pre.get("type") == "ByteLevel":
        return not pre["add_prefix_space"] and bool(pre.get("use_regex", True))
    parts = pre.get("pretokenizers", [])
    if [part["type"] for part in parts] != ["Split", "ByteLevel"]:
        return False
    cut, rest = parts
    is_plain = cut["behavior"] == "Isolated" and not cut["invert"] and cut["pattern"].get("Regex") in PATTERNS.values()
    return is_plain and not rest["add_prefix_space"] and not rest.get("use_regex", True)


class FastEncoder:
    """A tokenizer of a kind that `is_known`, encoded by `gigatoken`. May be used by several threads.

    The package is imported and checked with the first text. On one thread: workers share the cores between them.
    """

    def __init__(self, encoder: Any) -> None:
        self._reference = encoder  # of `tokenizers`
        self._json = ""
        self._lock = threading.Lock()
        self._inner: Any = None
        self._new_bytes = 0
        self.problem = ""
        """Why it is used no more, in words for a user; empty where it is, and where the package is not installed."""
        self._is_out = False

    @property
    def is_used(self) -> bool:
        """Whether it has encoded, or will."""
        return not self._is_out

    def encode(self, texts: pa.LargeStringArray, words: pa.ListArray | None = None) -> Flat | None:
        """Ids of all texts, or None where `tokenizers` has to encode them; `words` as for `Tokenizer.encode_batch`."""
        if self._is_out or not len(texts):
            return None
        new_bytes = texts.nbytes if words is None else words.values.dictionary.nbytes  # at most
        with self._lock:
            try:
                if self._inner is None:
                    self._open()
                elif self._new_bytes + new_bytes > MAX_NEW_BYTES:
                    self._inner, self._new_bytes = _gigatoken().from_json(self._json), 0
                self._new_bytes += new_bytes
                return None if self._is_out else _encode(self._inner, texts)
            except ImportError:  # a server, say, which encodes no stories
                self._is_out = True
            except BaseException as error:  # a panic of its Rust side is no Exception
                if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
                    raise
                self._give_up(f"failed ({one_line(error)[:200]})")
            return None

    def _open(self) -> None:
        # special tokens go: a story that has their letters gets ordinary tokens, as everywhere
        config = {**json.loads(self._reference.to_str()), "added_tokens": [], "post_processor": None}
        self._json = json.dumps(config, ensure_ascii=False)
        self._inner = _gigatoken().from_json(self._json)
        ids, ends = _encode(self._inner, pa.array(CHECKED, pa.large_string()))
        wanted = self._reference.encode_batch_fast(list(CHECKED), add_special_tokens=False)
        rows = zip(CHECKED, ends[:-1], ends[1:], wanted)
        wrong = [text for text, start, end, encoding in rows if ids[start:end].tolist() != encoding.ids]
        if wrong:
            self._give_up(f"gives other ids than tokenizers, for example of {wrong[0][:40]!a}")

    def _give_up(self, why: str) -> None:
        self._is_out, self._inner = True, None
        version = importlib.metadata.version("gigatoken")
        self.problem = f"gigatoken {version} {why}, so stories are encoded by tokenizers alone, which is slower"
        LOGGER.warning("%s", self.problem)


def _gigatoken() -> Any:
    import gigatoken

    return gigatoken.Tokenizer


def _encode(inner: Any, texts: pa.LargeStringArray) -> Flat:
    """Ids of texts, which are neither copied nor made Python objects."""
    import awkward as ak

    starts = np.frombuffer(texts.buffers()[1], np.int64)[texts.offset : texts.offset + len(texts) + 1]
    content = np.frombuffer(texts.buffers()[2] or b"", np.uint8)
    characters = ak.contents.NumpyArray(content, parameters={"__array__": "char"})
    strings = ak.contents.ListOffsetArray(ak.index.Index64(starts), characters, parameters={"__array__": "string"})
    found = ak.to_layout(inner.encode_batch(ak.Array(strings), parallel=False))
    ends = np.asarray(found.offsets.data, np.int64)
    ids: npt.NDArray[np.uint32] = np.asarray(found.content.data)[ends[0] : ends[-1]]
    return ids, ends - ends[0]


def as_strings(texts: Sequence[str] | pa.Array) -> pa.LargeStringArray:
    """Texts in Arrow's memory, with 64-bit offsets."""
    return (texts if isinstance(texts, pa.Array) else pa.array(texts, pa.large_string())).cast(pa.large_string())
