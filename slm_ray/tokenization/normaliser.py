"""SentencePiece's normalisation of a text, exactly: NFKC and the like, as its `.model` holds them.

In: a text, and the precompiled rules of a `.model` (or of the `tokenizer.json` that was made of it). Out: the text as
SentencePiece reads it, with plain spaces. Used by `tokenizer` on all that it encodes and by the preparation on stories.

The rules are a trie of UTF-8 bytes in a double array (Yata's darts-clone), each with the text that takes its place; at
every place of a text the longest rule counts. The Rust package looks rules up by grapheme, which differs for some
combining marks: therefore not by it.
"""

import base64
import functools
import hashlib
import re
import struct
import unicodedata
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

_ANYWHERE = re.compile(rb"[\x20-\x7e](?=[^\x20-\x7e])|[^\x20-\x7e]")
"""Where a rule may begin, if none is of one printable ASCII character or begins with two."""
_EVERYWHERE = re.compile(rb"(?s:.)")
_SPACES = re.compile(rb" {2,}")
_MAX_ROUNDS = 8


@dataclass(frozen=True)
class Normaliser:
    """The rules of one `.model`.

    Raises:
        ValueError: they are no such rules.
    """

    charsmap: bytes
    joins_spaces: bool
    """Whether spaces at both ends go, and several in a row become one."""

    def __post_init__(self) -> None:
        if len(self._trie) < 256 or self._ending != b"\0":
            raise ValueError("its normalisation is cut short, or something else")

    @property
    def record(self) -> dict[str, Any]:
        """What a manifest says of it."""
        return {"charsmap_sha256": hashlib.sha256(self.charsmap).hexdigest(), "joins_spaces": self.joins_spaces}

    def __call__(self, text: str) -> str:
        """The text as SentencePiece reads it."""
        if self._leaves_ascii and text.isascii() and text.isprintable():
            return self._joined(self._between(text.encode()))
        return self._joined(self._parts(text.encode("utf-8", errors="replace")))

    def settled(self, text: str) -> str:
        """The text after so many rounds that another one changes nothing, as of nearly all texts one does."""
        for _ in range(_MAX_ROUNDS):
            before, text = text, self(text)
            if text == before:
                break
        return text

    def _joined(self, parts: Iterator[bytes]) -> str:
        if not self.joins_spaces:
            return b"".join(parts).decode("utf-8", errors="replace")
        written: list[bytes] = []
        for part in parts:  # what stands in one rule's text stays, as there
            kept = part.lstrip(b" ") if not written or written[-1].endswith(b" ") else part
            if kept:
                written.append(kept)
        return b"".join(written).rstrip(b" ").decode("utf-8", errors="replace")

    def _parts(self, content: bytes) -> Iterator[bytes]:
        """What each rule makes of its place, and what is between."""
        start = place = 0
        begins = _ANYWHERE if self._leaves_ascii else _EVERYWHERE
        while found := begins.search(content, place):
            place = found.start()
            length, replaced = self._longest(content, place)
            if length:
                yield from self._between(content[start:place])
                yield replaced
                start = place = place + length
            else:  # on to the next character
                place += 1
                while place < len(content) and content[place] & 0xC0 == 0x80:
                    place += 1
        yield from self._between(content[start:])

    def _between(self, content: bytes) -> Iterator[bytes]:
        """Text that no rule changes."""
        if content:
            yield _SPACES.sub(b" ", content) if self.joins_spaces else content

    def _longest(self, content: bytes, place: int) -> tuple[int, bytes]:
        """How many bytes the longest rule at a place takes, and what it makes of them; 0 without one."""
        trie, length, value = self._trie, 0, 0
        node = _offset(trie[0])
        for at in range(place, len(content)):
            node ^= content[at]
            if node >= len(trie) or trie[node] & 0x800000FF != content[at]:
                break
            unit = trie[node]
            node ^= _offset(unit)
            if unit >> 8 & 1 and node < len(trie):
                length, value = at + 1 - place, trie[node] & 0x7FFFFFFF
        if not length:
            return 0, b""
        return length, self._texts[value : self._texts.find(b"\0", value)]

    @functools.cached_property
    def _trie(self) -> tuple[int, ...]:
        size = struct.unpack_from("<I", self.charsmap)[0] if len(self.charsmap) >= 4 else 0
        if size % 4 or size + 4 >= len(self.charsmap):
            return ()
        return struct.unpack_from(f"<{size // 4}I", self.charsmap, 4)

    @functools.cached_property
    def _texts(self) -> bytes:
        return self.charsmap[4 + 4 * len(self._trie) :]

    @property
    def _ending(self) -> bytes:
        return self.charsmap[-1:]

    @functools.cached_property
    def _leaves_ascii(self) -> bool:
        """Whether no rule is of one printable ASCII character, or begins with two."""
        trie, first = self._trie, _offset(self._trie[0])
        for byte in range(0x20, 0x7F):
            place = first ^ byte
            if place < len(trie) and trie[place] & 0x800000FF == byte:
                second = place ^ _offset(trie[place])
                follow = (
                    trie[second ^ one] & 0x800000FF == one for one in range(0x20, 0x7F) if second ^ one < len(trie)
                )
                if trie[place] >> 8 & 1 or any(follow):
                    return False
        return True


@dataclass(frozen=True)
class Composition:
    """Unicode's NFC: letters and their accents as one character where there is one. Qwen's tokenizers have it."""

    @property
    def record(self) -> dict[str, Any]:
        """What a manifest says of it."""
        return {"form": "NFC", "unicode": unicodedata.unidata_version}

    def __call__(self, text: str) -> str:
        """The text in this form."""
        return unicodedata.normalize("NFC", text)

    def settled(self, text: str) -> str:
        """The same: once is enough."""
        return self(text)


def _offset(unit: int) -> int:
    """From a node of the double array to its children."""
    return unit >> 10 << ((unit & 1 << 9) >> 6)


def normalizer_json(normaliser: Normaliser, prefix: str) -> dict[str, Any]:
    """The `normalizer` of a `tokenizer.json`: the same in the words of the `tokenizers` package, for other readers."""
    steps: list[dict[str, Any]] = [
        {"type": "Precompiled", "precompiled_charsmap": base64.b64encode(normaliser.charsmap).decode("ascii")}
    ]
    if normaliser.joins_spaces:
        steps.append({"type": "Strip", "strip_left": True, "strip_right": True})
        steps.append({"type": "Replace", "pattern": {"Regex": " {2,}"}, "content": " "})
    if prefix:
        steps.append({"type": "Prepend", "prepend": prefix})
    return {"type": "Sequence", "normalizers": steps}


def read_normalizer(config: dict[str, Any] | None) -> tuple[Normaliser | Composition | None, dict[str, Any] | None]:
    """What `normalizer_json` wrote, or NFC, and what is left to the `tokenizers` package; None and all of any other."""
    if config == {"type": "NFC"}:
        return Composition(), None
    steps = (config or {}).get("normalizers") or [{}]
    if (config or {}).get("type") != "Sequence" or steps[0].get("type") != "Precompiled":
        return None, config
    prepend = steps[-1] if steps[-1]["type"] == "Prepend" else None
    try:
        charsmap = base64.b64decode(steps[0]["precompiled_charsmap"], validate=True)
        normaliser = Normaliser(charsmap, joins_spaces=len(steps) > 2)
    except (ValueError, KeyError, TypeError):
        return None, config
    if normalizer_json(normaliser, prepend["prepend"] if prepend else "") != config:
        return None, config
    return normaliser, prepend
