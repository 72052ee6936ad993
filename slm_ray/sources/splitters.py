"""Finding where stories end in text that comes chunk by chunk: at separators, or at borders near a usual length.

In: the bytes of a text, in chunks of any size. Out: where each story begins and ends, or its bytes. Called by
`plain_text`. The cuts depend on the text alone, never on the chunks, and no more than one story is in memory.
"""

import itertools
import re
from collections.abc import Iterable, Iterator
from typing import Protocol

from slm_ray.tokenization.tokenizer import END_OF_TEXT

BOM = b"\xef\xbb\xbf"

LOOKAHEAD_BYTES = 512
"""No separator needs more, but for the white space at its end."""

Span = tuple[int, int]
"""First byte of a story, and the byte after its last."""

_END_OF_TEXT = re.compile(re.escape(END_OF_TEXT).encode())
# After an optional \r, with which the search would be 15 times slower:
_BLANK_LINES = re.compile(rb"\n[ \t]{0,400}\r?\n\s*")
_LINE_ENDS = re.compile(rb"\n\s*")
_HEADING = rb" ?= (?!=)[^\n]{1,300}?(?<!=) = {0,100}\r?\n"  # ` = Title = ` alone on its line, not ` = = Section = = `
_BEFORE_ARTICLE = re.compile(rb"\n(?=" + _HEADING + rb")")
_STARTS_ARTICLE = re.compile(rb"(?:" + BOM + rb")?" + _HEADING)

_PARAGRAPH_END = re.compile(r"\n[ \t\r]*\n\s*")
_SENTENCE_END = re.compile(r"[.!?][\"'”’)\]]*\s+")
_WHITE_SPACE = re.compile(r"\s+")
_BORDERS = (_PARAGRAPH_END, _SENTENCE_END, _WHITE_SPACE)  # best first


class Splitter(Protocol):
    """Finds stories in text that comes chunk by chunk."""

    n_cuts: int  # made until now
    lookahead_bytes: int  # how much text after a story decides where it ends

    def feed(self, chunk: bytes) -> list[Span]:
        """The stories that are known to end, now that this chunk has come."""

    def finish(self) -> list[Span]:
        """Those that are left when nothing more comes."""


def make_splitter(mode: str, piece_chars: int, *, at_start: bool) -> Splitter:
    """The splitter of a mode other than auto; with `at_start` it begins with the file and not at a later story."""
    if mode == "pieces":
        return _Pieces(piece_chars)
    return _Separated(_PATTERNS[mode], at_start=at_start, skips_blank=mode in ("articles", "lines"))


def begins_with_article(text: bytes) -> bool:
    """Whether the first line of a text, of which `LOOKAHEAD_BYTES` are enough, is the heading of an article."""
    return _STARTS_ARTICLE.match(text) is not None


def read_stories(chunks: Iterable[bytes], splitter: Splitter) -> Iterator[bytes]:
    """The stories themselves. One of them and one chunk are in memory; a byte order mark before a story is left out."""
    held, start = bytearray(), 0  # `held` begins at byte `start` of the text
    for chunk in itertools.chain(chunks, [None]):  # None: nothing more comes
        if chunk is not None:
            held += chunk
        for first, end in splitter.feed(chunk) if chunk is not None else splitter.finish():
            yield bytes(held[first - start : end - start]).removeprefix(BOM)
            del held[: end - start]
            start = end


class _Separated:
    """Stories between separators, which a pattern finds."""

    lookahead_bytes = LOOKAHEAD_BYTES

    def __init__(self, pattern: re.Pattern[bytes], *, at_start: bool, skips_blank: bool) -> None:
        self.n_cuts = 0
        self._pattern = pattern
        self._skips_blank = skips_blank  # a first story of white space alone is none
        self._is_first = at_start  # no separator was found yet
        self._buffer = bytearray()  # in which the next separator may begin
        self._base = 0  # byte of the text where the buffer begins
        self._start = 0  # byte of the text where the current story begins
        self._has_text = False  # the current story, before the buffer
        self._in_separator = False  # white space at the beginning of the buffer belongs to the last separator

    def feed(self, chunk: bytes) -> list[Span]:
        self._buffer += chunk
        self._leave_separator()
        return self._search(is_end=False)

    def _leave_separator(self) -> None:
        """Remove the white space that belongs to a separator found in an earlier chunk."""
        if not self._in_separator:
            return
        n_bytes = len(self._buffer) - len(self._buffer.lstrip())
        self._in_separator = n_bytes == len(self._buffer)
        del self._buffer[:n_bytes]
        self._base += n_bytes
        self._start = self._base

    def finish(self) -> list[Span]:
        """After the last separator there is a story only where there is text."""
        spans = self._search(is_end=True)
        if self._has_text:
            spans.append((self._start, self._base))
        return spans

    def _search(self, is_end: bool) -> list[Span]:
        spans, buffer, position = [], self._buffer, 0
        # 1. Find the next separator; a \r before its \n belongs to it.
        while match := self._pattern.search(buffer, position):
            first, end = match.span()
            if first > position and buffer[first - 1 : first + 1] == b"\r\n":
                first -= 1
            # 2. The current story ends there, and the next one begins behind it.
            if not (self._is_first and self._is_blank(buffer[position:first])):
                spans.append((self._start, self._base + first))
            self.n_cuts += 1
            self._start, self._has_text, self._is_first = self._base + end, False, False
            position = end
            self._in_separator = self._pattern in (_BLANK_LINES, _LINE_ENDS) and end == len(buffer)
        # 3. Drop the bytes in which no separator can begin, but remember whether they had text.
        n_dropped = len(buffer) if is_end else max(position, len(buffer) - self.lookahead_bytes)
        self._has_text = self._has_text or bool(buffer[position:n_dropped].strip())
        del buffer[:n_dropped]
        self._base += n_dropped
        return spans

    def _is_blank(self, beginning: bytearray) -> bool:
        """Whether the text before the first separator, of which this is in the buffer, is no story."""
        if self._skips_blank:
            return not self._has_text and not beginning.removeprefix(BOM).strip()
        return self._base == 0 and beginning in (b"", BOM)


class _Pieces:
    """Pieces from three to five quarters of their usual length; the last one may have up to six.

    Each ends at the paragraph end nearest to the usual length, else at a sentence end, else at white space.
    """

    def __init__(self, chars: int) -> None:
        self.n_cuts = 0
        self._chars = chars
        self._last_chars = chars + chars // 2
        self.lookahead_bytes = 4 * (self._last_chars + 1)  # so many characters, whatever they are
        self._buffer = bytearray()  # from the beginning of the current piece
        self._base = 0  # byte of the text where the buffer begins

    def feed(self, chunk: bytes) -> list[Span]:
        self._buffer += chunk
        return self._cut(is_end=False)

    def finish(self) -> list[Span]:
        spans = self._cut(is_end=True)
        if self._buffer.strip():
            spans.append((self._base, self._base + len(self._buffer)))
        return spans

    def _cut(self, is_end: bool) -> list[Span]:
        spans, position = [], 0
        while is_end or len(self._buffer) - position >= self.lookahead_bytes:
            # 1. Decode as much as the longest piece may need; stop where this is the last piece, or may become it.
            text = self._buffer[position : position + self.lookahead_bytes].decode("utf-8", "surrogateescape")
            if len(text) <= self._last_chars:
                break
            # 2. The piece ends at its best border, which is counted back into bytes.
            end = position + len(text[: self._border(text)].encode("utf-8", "surrogateescape"))
            spans.append((self._base + position, self._base + end))
            position = end
        self.n_cuts += len(spans)
        del self._buffer[:position]
        self._base += position
        return spans

    def _border(self, text: str) -> int:
        """The length of the first piece of a text that is too long for one, characters."""
        quarter = self._chars // 4
        window = text[: self._chars + quarter]
        # The first kind of border with a match from three to five quarters; of those the nearest, then the lower one.
        for pattern in _BORDERS:
            ends = [match.end() for match in pattern.finditer(window, self._chars - quarter)]
            if ends:
                return min(ends, key=lambda end: (abs(end - self._chars), end))
        return self._chars


_PATTERNS = {
    "end-mark": _END_OF_TEXT,
    "blank-lines": _BLANK_LINES,
    "lines": _LINE_ENDS,
    "articles": _BEFORE_ARTICLE,
}
