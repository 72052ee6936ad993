"""Plain text cut into stories: at end-of-text tokens, blank lines or headings, or into pieces of about equal size.

In: the bytes of a text file, in chunks of any size. Out: where each story begins and ends, or its bytes. Called by
`formats`. The cuts depend on the text alone, never on the chunks, and hold no more than one story in memory.
"""

import itertools
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Protocol

from slm_ray.errors import UserError
from slm_ray.sources.rows import LONGEST_BYTES, RowCount, TooLongError
from slm_ray.tokenization.tokenizer import END_OF_TEXT

CUTS = ("auto", "end-mark", "blank-lines", "articles", "pieces")
"""What `--cut-text` may say. auto: end-of-text tokens where there is one, else articles where two begin, else blank
lines; a few end-of-text tokens among many blank lines are refused, for they may be part of a story."""

PIECE_CHARS = 2000
MIN_PIECE_CHARS, MAX_PIECE_CHARS = 50, 1_000_000

BOM = b"\xef\xbb\xbf"
_ARTICLES_AT_LEAST = 2
_SURE_END_MARKS = 10  # so many are no slip of a story's writer
_BLANK_LINES_AN_END_MARK = 10  # more than a story's paragraphs

Span = tuple[int, int]
"""First byte of a story, and the byte after its last."""

_END_MARK = re.compile(re.escape(END_OF_TEXT).encode())
_BLANK_LINES = re.compile(
    rb"\n[ \t]{0,400}\r?\n\s*"
)  # after an optional \r, with which the search would be 15 times slower
_HEADING = rb" ?= (?!=)[^\n]{1,300}?(?<!=) = {0,100}\r?\n"  # ` = Title = ` alone on its line, not ` = = Section = = `
_BEFORE_ARTICLE = re.compile(rb"\n(?=" + _HEADING + rb")")
_STARTS_ARTICLE = re.compile(rb"(?:" + BOM + rb")?" + _HEADING)

_PARAGRAPH_END = re.compile(r"\n[ \t\r]*\n\s*")
_SENTENCE_END = re.compile(r"[.!?][\"'”’)\]]*\s+")
_WHITE_SPACE = re.compile(r"\s+")
_BORDERS = (_PARAGRAPH_END, _SENTENCE_END, _WHITE_SPACE)  # best first


@dataclass(frozen=True, kw_only=True)
class Cut:
    """How text is cut."""

    mode: str = "auto"  # one of CUTS
    piece_chars: int = PIECE_CHARS  # of the mode pieces: their usual length, characters

    def __post_init__(self) -> None:
        if self.mode not in CUTS:
            raise UserError(f"cut_text ({self.mode}) must be one of {', '.join(CUTS)}")
        if not MIN_PIECE_CHARS <= self.piece_chars <= MAX_PIECE_CHARS:
            raise UserError(f"piece_chars ({self.piece_chars}) must be from {MIN_PIECE_CHARS} to {MAX_PIECE_CHARS:,}")


class Finder(Protocol):
    """Finds stories in text that comes chunk by chunk."""

    n_cuts: int  # made until now
    lookahead_bytes: int  # how much text after a story decides where it ends

    def feed(self, chunk: bytes) -> list[Span]:
        """The stories that are known to end, now that this chunk has come."""

    def finish(self) -> list[Span]:
        """Those that are left when nothing more comes."""


def make_finder(mode: str, piece_chars: int, *, at_start: bool) -> Finder:
    """The finder of a mode other than auto; `at_start` where it begins with the file and not at a later story."""
    if mode == "pieces":
        return _Pieces(piece_chars)
    return _Separated(_PATTERNS[mode], at_start=at_start, skips_blank=mode == "articles")


class UnclearCutError(Exception):
    """A few end-of-text tokens, which may be part of a story, among many blank lines, which may be within one."""

    def __init__(self, n_end_marks: int, n_blank_lines: int) -> None:
        super().__init__(
            f"it has {n_end_marks} times {END_OF_TEXT} and {n_blank_lines:,} blank lines, and it is not clear which of "
            "them end a story"
        )


def scan(chunks: Iterable[bytes], cut: Cut, step: int) -> tuple[str, RowCount]:
    """The mode that fits the text, and its stories counted, in one pass. Raises TooLongError, UnclearCutError."""
    modes = ("end-mark", "articles", "blank-lines") if cut.mode == "auto" else (cut.mode,)
    finders = {mode: make_finder(mode, cut.piece_chars, at_start=True) for mode in modes}
    counts = {mode: RowCount(step=step) for mode in modes}
    longest = dict.fromkeys(modes, 0)
    beginning = b""
    for chunk in chunks:
        if len(beginning) < _Separated.lookahead_bytes:
            beginning += chunk
        for mode, finder in finders.items():
            longest[mode] = max(longest[mode], _count(counts[mode], finder.feed(chunk)))
        if "end-mark" in finders and finders["end-mark"].n_cuts >= _SURE_END_MARKS:  # then nothing else matters
            finders = {"end-mark": finders["end-mark"]}
    for mode, finder in finders.items():
        longest[mode] = max(longest[mode], _count(counts[mode], finder.finish()))
    n_articles = 1 if _STARTS_ARTICLE.match(beginning) else 0
    mode = _fitting({mode: finder.n_cuts for mode, finder in finders.items()}, n_articles)
    if longest[mode] > LONGEST_BYTES:
        raise TooLongError("a story")
    return mode, counts[mode]


def _count(count: RowCount, spans: list[Span]) -> int:
    """Count stories; the length of the longest, bytes."""
    count.add(start for start, _ in spans)
    return max((end - start for start, end in spans), default=0)


def _fitting(n_cuts: dict[str, int], n_articles: int) -> str:
    """The mode to take, given how often each would cut, and whether an article begins with the file."""
    if len(n_cuts) == 1:
        return next(iter(n_cuts))
    if 0 < n_cuts["end-mark"] * _BLANK_LINES_AN_END_MARK < n_cuts["blank-lines"]:
        raise UnclearCutError(n_cuts["end-mark"], n_cuts["blank-lines"])
    if n_cuts["end-mark"]:
        return "end-mark"
    return "articles" if n_cuts["articles"] + n_articles >= _ARTICLES_AT_LEAST else "blank-lines"


def read_stories(chunks: Iterable[bytes], finder: Finder) -> Iterator[bytes]:
    """The stories themselves. Holds one of them and one chunk; a byte order mark before a story is no part of it."""
    held, start = bytearray(), 0  # `held` begins at byte `start` of the text
    for chunk in itertools.chain(chunks, [None]):
        if chunk is not None:
            held += chunk
        for first, end in finder.feed(chunk) if chunk is not None else finder.finish():
            yield bytes(held[first - start : end - start]).removeprefix(BOM)
            del held[: end - start]
            start = end


class _Separated:
    """Stories with something between them that a pattern finds."""

    lookahead_bytes = 512  # no separator needs more, but for the white space at its end

    def __init__(self, pattern: re.Pattern[bytes], *, at_start: bool, skips_blank: bool) -> None:
        self.n_cuts = 0
        self._pattern = pattern
        self._is_first = at_start  # before a leading separator there is no story
        self._skips_blank = skips_blank
        self._buffer = bytearray()  # what a separator not yet found may begin in; at byte `_base` of the text
        self._base = 0
        self._start = 0  # of the current story
        self._has_text = False  # between there and the buffer
        self._in_separator = False  # which the white space that comes next belongs to

    def feed(self, chunk: bytes) -> list[Span]:
        self._buffer += chunk
        self._leave_separator()
        return self._search(is_end=False)

    def _leave_separator(self) -> None:
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
        keep = len(buffer)
        while match := self._pattern.search(buffer, position):
            first, end = match.span()
            if first > position and buffer[first - 1 : first + 1] == b"\r\n":
                first -= 1
            if not self._is_nothing(buffer, position, first):
                spans.append((self._start, self._base + first))
            self.n_cuts += 1
            self._start, self._has_text, self._is_first = self._base + end, False, False
            position = end
            self._in_separator = self._pattern is _BLANK_LINES and end == len(buffer)
        if not is_end:
            keep = max(position, len(buffer) - self.lookahead_bytes)
        self._has_text = self._has_text or bool(buffer[position:keep].strip())
        del buffer[:keep]
        self._base += keep
        return spans

    def _is_nothing(self, buffer: bytearray, position: int, first: int) -> bool:
        if not self._is_first:
            return False
        before = buffer[position:first]
        if self._skips_blank:
            return not self._has_text and not before.removeprefix(BOM).strip()
        return self._base + first == 0 or (self._base == 0 and before == BOM)


class _Pieces:
    """Pieces from three to five quarters of their usual length (the last one up to six), each ending at the
    paragraph end, else sentence end, else white space, that is nearest to the usual length."""

    def __init__(self, chars: int) -> None:
        self.n_cuts = 0
        self._chars = chars
        self._last_chars = chars + chars // 2
        self.lookahead_bytes = 4 * (self._last_chars + 1)  # so many characters, whatever they are
        self._buffer = bytearray()
        self._base = 0

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
            text = self._buffer[position : position + self.lookahead_bytes].decode("utf-8", "surrogateescape")
            if len(text) <= self._last_chars:
                break
            end = position + len(text[: self._border(text)].encode("utf-8", "surrogateescape"))
            spans.append((self._base + position, self._base + end))
            position = end
        self.n_cuts += len(spans)
        del self._buffer[:position]
        self._base += position
        return spans

    def _border(self, text: str) -> int:
        """How many characters the first piece of a text has that is too long for one."""
        quarter = self._chars // 4
        window = text[: self._chars + quarter]
        for pattern in _BORDERS:
            ends = [match.end() for match in pattern.finditer(window, self._chars - quarter)]
            if ends:
                return min(ends, key=lambda end: (abs(end - self._chars), end))
        return self._chars


_PATTERNS = {"end-mark": _END_MARK, "blank-lines": _BLANK_LINES, "articles": _BEFORE_ARTICLE}
