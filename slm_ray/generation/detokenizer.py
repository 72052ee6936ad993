"""Tokens of a story to text as it comes: whole characters only, and the end of the text where a stop text begins.

In: token ids, one after another. Out: chunks of text that join to the text of all ids.
"""

import copy
from collections.abc import Sequence

from slm_ray.tokenization.tokenizer import Tokenizer

_PARTIAL = "\ufffd"  # how part of a character decodes
_TEXT_CONTEXT_TOKENS = 4
_MAX_HELD = 16
"""Tokens that are held back before it is looked for what of them is certain: a character has four bytes at most."""


class TextStream:
    """Turns tokens into text as they come, whole characters only.

    A byte-level token may hold part of a character: its text is held back until the rest is there. The chunks
    join to the text of all the tokens. `context` are the tokens before the first one, so that a tokenizer that
    treats the beginning of a text in its own way is not misled.
    """

    def __init__(self, tokenizer: Tokenizer, context: Sequence[int]) -> None:
        self._tokenizer = tokenizer
        self._returned = list(context[-_TEXT_CONTEXT_TOKENS:])
        self._held: list[int] = []

    def push(self, token: int) -> str:
        """The text that is certain now, which may be none."""
        own = "" if self._held else self._tokenizer.own_texts[token]
        if own:
            self._returned = [token]
            return own
        self._held = [*self._held, token]
        text = self._held_text()
        if not text or text.endswith(_PARTIAL):
            return self._certain(text) if len(self._held) > _MAX_HELD else ""
        self._returned, self._held = self._held, []
        return text

    def copy(self) -> "TextStream":
        """Another that goes on from here by itself."""
        return copy.copy(self)  # its lists are replaced, never added to

    def _certain(self, text: str) -> str:
        """Text of held tokens that the last ones cannot change: bytes that form no character must not pile up."""
        tokens = self._held
        for count in range(len(tokens) - 3, len(tokens) - 7, -1):
            self._held = tokens[:count]
            first = self._held_text()
            if first and text.startswith(first):
                self._returned, self._held = self._held, tokens[count:]
                return first
        self._held = tokens
        return ""

    @property
    def pending(self) -> str:
        """The text of what is held back, if nothing followed."""
        return self._held_text() if self._held else ""

    def flush(self) -> str:
        """What is left at the end; part of a character becomes U+FFFD."""
        text = self._held_text()
        self._held = []
        return text

    def _held_text(self) -> str:
        before = self._tokenizer.decode(self._returned)
        return self._tokenizer.decode(self._returned + self._held)[len(before) :]


class StopTexts:
    """Finds the first stop text in a text that comes in chunks; what may be the beginning of one is held back."""

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = tuple(stops)
        self._longest = max(map(len, stops), default=0)
        self._held = ""

    def push(self, chunk: str) -> tuple[str, bool]:
        """The text that is certain now, and whether a stop text was found: then it ends before it."""
        if not self._stops:
            return chunk, False
        text = self._held + chunk
        found = [at for at in map(text.find, self._stops) if at >= 0]
        if found:
            self._held = ""
            return text[: min(found)], True
        sure = len(text) - self._possible(text)
        self._held = text[sure:]
        return text[:sure], False

    def flush(self) -> str:
        """What was held back, at the end."""
        text, self._held = self._held, ""
        return text

    def _possible(self, text: str) -> int:
        """Characters at the end that may begin a stop text."""
        for length in range(min(self._longest - 1, len(text)), 0, -1):
            if any(stop.startswith(text[-length:]) for stop in self._stops):
                return length
        return 0
