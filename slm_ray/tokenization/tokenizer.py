"""Text to token ids and back, with a true end-of-text token.

In: cleaned stories, or the `tokenizer.json` of a data set. Out: ids as Arrow lists for `dataset.shards`, text for
`generation`. Wraps the `tokenizers` package; the file it writes opens in `transformers` as well.
"""

import contextlib
import functools
import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import tokenizers

from slm_ray.errors import UserError, reason
from slm_ray.storage import StoragePath, read_at_most, storage_path
from slm_ray.tokenization.borders import END_OF_TEXT as END_OF_TEXT
from slm_ray.tokenization.borders import TextBorders as TextBorders
from slm_ray.tokenization.borders import end_of_text_around
from slm_ray.tokenization.fast_encoding import FastEncoder, as_strings, is_known
from slm_ray.tokenization.normaliser import read_normalizer
from slm_ray.tokenization.own_texts import OwnTexts
from slm_ray.tokenization.word_cache import WordEncoder, are_apart, cut_words, encode_flat, offsets

_SOME_OF_EACH = (  # code points: single ones, then one for each first byte of 2, 3 and 4 in UTF-8
    *range(0x300),
    *range(0x300, 0x800, 0x40),
    *(0x800, *range(0x1000, 0x10000, 0x1000)),
    *(0x10000, 0x40000, 0x80000, 0xC0000, 0x100000),
)
EVERY_BYTE = "".join(map(chr, _SOME_OF_EACH))
"""A text with all 243 bytes that UTF-8 has."""
PROBES = (EVERY_BYTE, "  Two  spaces. ", " One.\nTwo.\n\n", "\u2581a\u2581", "<s></s><unk><pad><0x41>", "")
"""Texts that some tokenizers change."""
MAX_TOKENIZER_BYTES = 64 * 1024 * 1024
"""Four times the largest of the families that are read."""
MIN_VOCAB_SIZE = 257  # the 256 bytes and the end-of-text token: below it, some text could not be written


class TokenizerError(UserError):
    """The `tokenizers` package gave up on a text or on ids: the file of the tokenizer is broken."""


@contextlib.contextmanager
def _panics_as_errors() -> Iterator[None]:
    """A panic of its Rust side is a BaseException, past every `except Exception` and so the end of a thread; what it
    has no word for, as an unknown piece without an unknown token, is a plain Exception."""
    try:
        yield
    except BaseException as error:
        if type(error) is not Exception and type(error).__name__ != "PanicException":
            raise
        raise TokenizerError(f"the tokenizer is broken: {' '.join(str(error).split())}") from error


class Tokenizer:
    """A `tokenizers.Tokenizer` that has an end-of-text token, and never reads one out of a story's text.

    Ids are those of the file. A story that contains the letters of `<|endoftext|>` gets ordinary tokens for
    them: only the pipeline (after each story) and the model (when it stops) make end-of-text tokens.
    """

    def __init__(self, inner: Any, name: str = "tokenizer", borders: TextBorders | None = None) -> None:
        self._inner = inner
        self._inner.no_padding()
        self._inner.no_truncation()
        config = json.loads(inner.to_str())
        self.normaliser, rest = read_normalizer(config["normalizer"])
        if self.normaliser is not None:
            inner = tokenizers.Tokenizer.from_str(json.dumps({**config, "normalizer": rest}))
        self._encoder = inner  # of normalised text
        # Not stored in tokenizer.json, so set at every load: text that looks like a special token stays text.
        self._encoder.encode_special_tokens = True
        self.borders = end_of_text_around(inner, name) if borders is None else borders
        self.start_id, self.eos_id = self.borders.start_id, self.borders.eos_id
        self.stop_ids = self.borders.stop_ids
        self.own_texts = OwnTexts(self.decode, joins_bytes=(config["decoder"] or {}).get("type") == "ByteLevel")
        self._words_are_apart = _cuts_at_spaces(config)
        self._known = _known_characters(config)
        self.vocab_size: int = max(inner.get_vocab(with_added_tokens=True).values()) + 1
        self._words = WordEncoder(inner, self.numpy_type)
        self.fast = FastEncoder(inner) if is_known({**config, "normalizer": rest}) else None

    @classmethod
    def load(cls, path: str | StoragePath, *, must_keep_text: bool = False) -> "Tokenizer":
        """Open a `tokenizer.json`; with `must_keep_text`, only one that loses and changes nothing.

        Raises:
            UserError: it is missing, is not a tokenizer file, has no special token `<|endoftext|>`, or does not
                keep text.
        """
        place = storage_path(path)
        try:
            text = read_at_most(place, MAX_TOKENIZER_BYTES).decode("utf-8")
        except Exception as error:  # each object store has errors of its own
            raise UserError(f"cannot read the tokenizer {path}: {reason(error)}") from error
        return cls.from_json(text, name=str(path), must_keep_text=must_keep_text)

    @classmethod
    def from_json(cls, text: str, name: str = "tokenizer", *, must_keep_text: bool = False) -> "Tokenizer":
        """Make it from the content of a `tokenizer.json`; `name` appears in errors, which are those of `load`."""
        tokenizer = cls(parsed(text, name), name)
        if must_keep_text:
            config = json.loads(text)
            _check_keeps_text(tokenizer, name, None if tokenizer.normaliser else config.get("normalizer"))
            _refuse_dropout(config, name)
        return tokenizer

    def encode(self, text: str) -> list[int]:
        """Ids of a text, without an end-of-text token."""
        text = self.normaliser(text) if self.normaliser else text
        with _panics_as_errors():
            ids: list[int] = self._encoder.encode(text, add_special_tokens=False).ids
        return ids

    @property
    def keeps_every_text(self) -> bool:
        """Whether there is nothing that `normalised` changes and `unknown` finds."""
        return self.normaliser is None and self._known is None

    def normalised(self, text: str) -> str:
        """The text that comes back from ids of this one, where `unknown` finds nothing in it."""
        return self.normaliser.settled(text) if self.normaliser else text

    def unknown(self, text: str) -> list[str]:
        """Characters of a normalised text that no id stands for, each once; empty for byte-level tokenizers."""
        return [] if self._known is None else [one for one in dict.fromkeys(text) if one not in self._known]

    def writable(self, text: str) -> str:
        """The normalised text without the characters that no id stands for."""
        text = self.normalised(text)
        lost = set(self.unknown(text))
        return self.normalised("".join(one for one in text if one not in lost)) if lost else text

    def encode_batch(self, texts: Sequence[str] | pa.Array, words: pa.ListArray | None = None) -> pa.ListArray:
        """Ids of many texts at once, as one list per text of `numpy_type`; no end-of-text tokens.

        By `gigatoken` where it is known to give the ids of `encode`, else each distinct word is encoded once where that
        is exact. The ids are those of `encode` for any text. `words` are `cut_words(texts)`, if the caller has them.
        """
        strings = as_strings(texts)
        if self.normaliser:
            strings = as_strings(list(map(self.normaliser, strings.to_pylist())))
        flat = self.fast.encode(strings, words) if self.fast else None
        if flat is not None:
            return pa.ListArray.from_arrays(pa.array(flat[1], pa.int32()), pa.array(flat[0].astype(self.numpy_type)))
        if self._words_are_apart:
            words = cut_words(strings) if words is None else words
            if are_apart(words):
                return self._words.encode(words)
        ids, lengths = encode_flat(self._encoder, strings.to_pylist(), self.numpy_type)
        return pa.ListArray.from_arrays(pa.array(offsets(lengths), pa.int32()), pa.array(ids))

    def decode(self, ids: Iterable[int]) -> str:
        """The text of ids; end-of-text tokens are left out."""
        with _panics_as_errors():
            text: str = self._inner.decode(list(ids), skip_special_tokens=True)
        return text

    def pieces(self, ids: Iterable[int]) -> list[str]:
        """The text of each id by itself, to show token borders; part of a character shows as U+FFFD."""
        before = self.encode("a")  # the first token of a text may lose its space, so none is decoded as the first
        skipped = len(self.decode(before))
        with _panics_as_errors():
            return [self._inner.decode([*before, token], skip_special_tokens=False)[skipped:] for token in ids]

    def entry(self, token: int) -> str:
        """An id's entry as the file spells it; empty where it has none."""
        return self._inner.id_to_token(token) or ""

    @functools.cached_property
    def entries(self) -> dict[str, int]:
        """Every entry with its id."""
        found: dict[str, int] = self._inner.get_vocab(with_added_tokens=True)
        return found

    @functools.cached_property
    def holes(self) -> npt.NDArray[np.int64]:
        """Ids below `vocab_size` that no entry has; of most tokenizers none."""
        return np.setdiff1d(np.arange(self.vocab_size), list(self.entries.values()))

    @functools.cached_property
    def longest_entry(self) -> int:
        """Characters of the longest entry, which no token's text exceeds: a byte counts as one at least."""
        return max(map(len, self._inner.get_vocab()))

    @property
    def numpy_type(self) -> type[np.unsignedinteger[Any]]:
        """The smallest type of token ids in shards that holds every id."""
        return np.uint16 if self.vocab_size <= 2**16 else np.uint32

    def to_json(self) -> str:
        """The content of `tokenizer.json`."""
        text: str = self._inner.to_str(pretty=True)
        return text

    @functools.cached_property
    def sha256(self) -> str:
        """Digest of `to_json()`, which is what the manifest and a checkpoint record."""
        return hashlib.sha256(self.to_json().encode("utf-8")).hexdigest()

    def save(self, path: str | Path) -> None:
        """Write `tokenizer.json`."""
        Path(path).write_text(self.to_json(), encoding="utf-8")


def parsed(text: str, name: str) -> Any:
    """The package's own tokenizer out of the content of a `tokenizer.json`. Raises: UserError when it is none."""
    try:
        with _panics_as_errors():
            return tokenizers.Tokenizer.from_str(text)
    except Exception as error:  # the Rust side raises plain Exception
        raise UserError(f"{name} is not a tokenizer.json of the `tokenizers` package: {error}") from error


@functools.lru_cache(maxsize=2)
def cached_tokenizer(text: str) -> Tokenizer:
    """`Tokenizer.from_json`, once per process: workers get the JSON with each range."""
    return Tokenizer.from_json(text)


def _refuse_dropout(config: dict[str, Any], name: str) -> None:
    if config["model"].get("dropout"):
        raise UserError(f"{name} has BPE dropout, which encodes a text anew each time: set model.dropout to null")


def _check_keeps_text(tokenizer: Tokenizer, name: str, normalizer: dict[str, Any] | None) -> None:
    """Refuse what drops or changes text: bits per byte would count bytes that no token stands for.

    What it says itself (`normalised`, `unknown`) is known before a story is taken, and refused of none.

    Raises:
        UserError: it has a normaliser (other than a prefix), one of `PROBES` does not come back as it was, or a
            text can contain the end-of-text token.
    """
    kind = (normalizer or {}).get("type")
    probes = PROBES if tokenizer.keeps_every_text else map(tokenizer.writable, PROBES)
    if kind not in (None, "Prepend"):
        why = f"its normaliser ({kind}) changes text"
    elif any(tokenizer.decode(tokenizer.encode(probe)) != probe for probe in probes):
        why = "not every text comes back from it as it was"
    elif tokenizer.eos_id in tokenizer.encode(f"{END_OF_TEXT} a {END_OF_TEXT}{END_OF_TEXT}"):
        why = f"the letters {END_OF_TEXT} in a story become the end-of-text token"
    else:
        return
    raise UserError(
        f"{name} loses text: {why}; use a byte-level tokenizer without normaliser and prefix space, "
        "or leave out --tokenizer to train one"
    )


def _known_characters(config: dict[str, Any]) -> frozenset[str] | None:
    """The characters that a tokenizer made by `from_sentencepiece` has a piece for, where it has none for all bytes.

    One that only stands inside of longer pieces counts as unknown: what is around it decides whether it is.
    """
    model, decoders = config["model"], (config["decoder"] or {}).get("decoders", [])
    is_own = [step.get("type") for step in decoders[:2]] == ["ByteFallback", "Fuse"]
    if not is_own or model["type"] not in ("BPE", "Unigram") or model.get("byte_fallback"):
        return None
    names = model["vocab"] if model["type"] == "BPE" else (name for name, _ in model["vocab"])
    return frozenset(name for name in names if len(name) == 1)


def _cuts_at_spaces(config: dict[str, Any]) -> bool:
    """Whether a space that stands alone always begins a new pre-token, so that words can be encoded apart.

    True of GPT-2's pattern, ` ?letters| ?digits| ?others|spaces`, in which only a run of white space goes on
    past a space. A normaliser, a token added as plain text, or another pre-tokenizer might look across words.
    """
    pre = config["pre_tokenizer"] or {}
    return (
        config["model"]["type"] in ("BPE", "Unigram")
        and not config["model"].get("ignore_merges")
        and config["normalizer"] is None
        and pre.get("type") == "ByteLevel"
        and pre.get("use_regex", True)
        and not pre["add_prefix_space"]
        and all(token["special"] for token in config["added_tokens"])
    )
