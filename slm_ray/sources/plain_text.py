"""Plain text split into stories: at end-of-text tokens, blank lines, lines or headings, or into pieces of about equal
size.

In: the bytes of a text file. Out: its stories counted, or their bytes. Found by `formats`; `splitters` finds where
stories end.
"""

import csv
import io
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Self

from slm_ray.errors import UserError
from slm_ray.sources.rows import LONGEST_BYTES, Row, RowCount, RowFormat, TooLongError
from slm_ray.sources.splitters import LOOKAHEAD_BYTES, Span, begins_with_article, make_splitter, read_stories
from slm_ray.tokenization.tokenizer import END_OF_TEXT

CUTS = ("auto", "end-mark", "blank-lines", "lines", "articles", "pieces")
"""What `--cut-text` may say. auto: end-of-text tokens where there is one, else articles where two begin, else blank
lines. It refuses what contradicts its guess: a few end-of-text tokens among many blank lines, which may be part of a
story; several lines that give one story, or a few of very many; and fields in double quotes and objects in braces,
which are CSV and JSON."""

PIECE_CHARS = 2000
MIN_PIECE_CHARS, MAX_PIECE_CHARS = 50, 1_000_000

_ARTICLES_AT_LEAST = 2
_SURE_ENDS = 10  # so many are no slip of a story's writer
_BLANK_LINES_AN_END_MARK = 10  # more than a story's paragraphs
_BLANK_LINE = re.compile(r"\n\s*\n")
_LOOKED_AT_BYTES = 1 << 16  # of a text's beginning, that say whether it is CSV or JSON, and what its lines are
_LINES_A_STORY = 10  # on the mean; so many whole paragraphs a story, each of one line, are rather a story each
_PARAGRAPH_CHARS, _PARAGRAPH_SHARE = 40, 0.9  # lines that are paragraphs: long enough, and with an end
_PARAGRAPH_ENDS = tuple(".!?…。！？؟।\"'”’»)]」』")
_JSON = re.compile(r'\[?\s*\{\s*"')


@dataclass(frozen=True, kw_only=True)
class SplitOptions:
    """How text is split into stories."""

    mode: str = "auto"  # one of CUTS
    piece_chars: int = PIECE_CHARS  # of the mode pieces: their usual length, characters

    def __post_init__(self) -> None:
        if self.mode not in CUTS:
            raise UserError(f"cut_text ({self.mode}) must be one of {', '.join(CUTS)}")
        if not MIN_PIECE_CHARS <= self.piece_chars <= MAX_PIECE_CHARS:
            raise UserError(f"piece_chars ({self.piece_chars}) must be from {MIN_PIECE_CHARS} to {MAX_PIECE_CHARS:,}")


@dataclass(frozen=True)
class PlainText(RowFormat):
    """Text files; once one is scanned, its mode is another than auto."""

    options: SplitOptions = SplitOptions()
    advice = "see --cut-text"

    @property
    def cut(self) -> str:
        """See `Format`."""
        size = f" of {self.options.piece_chars} characters" if self.options.mode == "pieces" else ""
        return f"{self.options.mode}{size}"

    @property
    def lookahead_bytes(self) -> int:
        """See `RowFormat`."""
        return make_splitter(self.options.mode, self.options.piece_chars, at_start=False).lookahead_bytes

    def count(self, address: str, chunks: Iterable[bytes], step: int) -> tuple[Self, RowCount]:
        """See `RowFormat`. Raises UserError where it is not clear what ends a story."""
        try:
            mode, count = scan(chunks, self.options, step)
        except UnclearCutError as error:
            raise UserError(f"{address}: {error}") from error
        return replace(self, options=replace(self.options, mode=mode)), count

    def rows(self, address: str, chunks: Iterable[bytes], *, at_start: bool) -> Iterator[Row]:  # noqa: ARG002
        """See `RowFormat`."""
        splitter = make_splitter(self.options.mode, self.options.piece_chars, at_start=at_start)
        return ((story, None) for story in read_stories(chunks, splitter))


class UnclearCutError(Exception):
    """The text contradicts each way to cut it; says how, and what to do."""


def scan(chunks: Iterable[bytes], options: SplitOptions, step: int) -> tuple[str, RowCount]:
    """The mode that fits the text, and its stories counted, in one pass. Raises TooLongError, UnclearCutError."""
    is_auto = options.mode == "auto"
    modes = ("end-mark", "articles", "blank-lines") if is_auto else (options.mode,)
    splitters = {mode: make_splitter(mode, options.piece_chars, at_start=True) for mode in modes}
    counts = {mode: RowCount(step=step) for mode in modes}
    longest = dict.fromkeys(modes, 0)
    beginning, n_lines, n_ends = b"", 0, 0
    lines = make_splitter("lines", 0, at_start=True)
    # 1. Split every chunk in each mode at once, as the file is read once; enough end-of-text tokens decide.
    for chunk in chunks:
        if len(beginning) < _LOOKED_AT_BYTES:
            beginning += chunk[:_LOOKED_AT_BYTES]
        n_ends += chunk.count(b"\n")
        n_lines += len(lines.feed(chunk)) if is_auto and n_lines < 2 else 0
        for mode, splitter in splitters.items():
            longest[mode] = max(longest[mode], _count(counts[mode], splitter.feed(chunk)))
        if "end-mark" in splitters and splitters["end-mark"].n_cuts >= _SURE_ENDS:
            splitters = {"end-mark": splitters["end-mark"]}
    n_lines += len(lines.finish()) if n_lines < 2 else 0
    for mode, splitter in splitters.items():
        longest[mode] = max(longest[mode], _count(counts[mode], splitter.finish()))
    # 2. Take the mode that fits the number of cuts; an article at the beginning has no cut before it.
    n_articles = int(begins_with_article(beginning[:LOOKAHEAD_BYTES]))
    mode = _fitting({mode: splitter.n_cuts for mode, splitter in splitters.items()}, n_articles)
    if mode == "lines" or (is_auto and mode == "blank-lines"):
        _check_line_ends(beginning, n_ends, mode)
    if is_auto and mode == "blank-lines":
        _check_guess(beginning, counts[mode].n_rows, max(n_lines, n_ends if n_lines > 1 else 0))
    if longest[mode] > LONGEST_BYTES:
        raise TooLongError("a story")
    return mode, counts[mode]


def _check_line_ends(beginning: bytes, n_ends: int, mode: str) -> None:
    """Refuse lines that end otherwise, as on old Macintoshes: they would all be one story."""
    text = beginning.decode("utf-8", "replace")
    found = [line for line in text.splitlines(keepends=True) if line.strip()]
    if n_ends or len(found) < 2:
        return
    hint = ", or give --cut-text blank-lines where all of it is one story" * (mode == "blank-lines")
    raise UnclearCutError(
        f"it has lines that end in {found[0][-1]!a} and none that ends in '\\n', so all of it would be one story: "
        f"write line ends as '\\n' (tr '\\r' '\\n'){hint}"
    )


def _check_guess(beginning: bytes, n_stories: int, n_lines: int) -> None:
    """Refuse a text that blank lines would cut wrongly, for all that its beginning and its numbers say."""
    if _is_csv(beginning):
        raise UnclearCutError(
            "its stories are fields in double quotes, as in a CSV file, and would be cut inside them: name it .csv and "
            "put the name of the column (--text-column) above them, or give --cut-text blank-lines"
        )
    text = beginning.decode("utf-8", "replace")
    if _JSON.match(text.removeprefix("\ufeff").lstrip()):
        raise UnclearCutError("it begins as JSON, of which each line or part would be a story: name it .jsonl or .json")
    if n_lines > _LINES_A_STORY * n_stories > _LINES_A_STORY and _is_of_paragraphs(text):
        raise UnclearCutError(
            f"it has about {n_lines:,} lines, each a paragraph, and blank lines would make {n_stories:,} stories of "
            "them: give --cut-text lines where each line is a story, else --cut-text blank-lines"
        )
    if n_stories == 1 and n_lines > 1:
        raise UnclearCutError(
            "it has several lines and no blank line between them, so all of it would be one story: give --cut-text "
            "lines where each line is a story, --cut-text blank-lines where it is one, --cut-text pieces for a book"
        )


def _is_of_paragraphs(text: str) -> bool:
    """Whether nearly all lines of a text are whole paragraphs; those of wrapped prose and of verses are not."""
    found = [line.rstrip() for line in text.splitlines()[:-1] if line.strip()]
    whole = sum(len(line) >= _PARAGRAPH_CHARS and line.endswith(_PARAGRAPH_ENDS) for line in found)
    return whole >= _PARAGRAPH_SHARE * len(found) > 0


def _is_csv(beginning: bytes) -> bool:
    """Whether a text reads as CSV without a fault, and has a field that only CSV keeps together.

    Prose does not: where a line begins with speech in quotes, it goes on behind them.
    """
    text = beginning.decode("utf-8", "replace").removeprefix("\ufeff")
    n_rows = n_joined = 0
    try:
        for fields in csv.reader(io.StringIO(text, newline=""), strict=True):
            n_rows += 1
            n_joined += any(_BLANK_LINE.search(field) for field in fields)
    except csv.Error as error:
        if len(beginning) < _LOOKED_AT_BYTES or "unexpected end" not in str(error):  # which is where the beginning ends
            return False
    return n_joined > 0 and n_rows > 1


def _count(count: RowCount, spans: list[Span]) -> int:
    """Count stories; the length of the longest, bytes."""
    count.add(start for start, _ in spans)
    return max((end - start for start, end in spans), default=0)


def _fitting(n_cuts: dict[str, int], n_articles: int) -> str:
    """The mode to take, given how often each would cut, and whether an article begins with the file."""
    if len(n_cuts) == 1:
        return next(iter(n_cuts))
    if 0 < n_cuts["end-mark"] * _BLANK_LINES_AN_END_MARK < n_cuts["blank-lines"]:
        raise UnclearCutError(
            f"it has {n_cuts['end-mark']} times {END_OF_TEXT} and {n_cuts['blank-lines']:,} blank lines, and it is not "
            "clear which of them end a story: give --cut-text end-mark or --cut-text blank-lines"
        )
    if n_cuts["end-mark"]:
        return "end-mark"
    return "articles" if n_cuts["articles"] + n_articles >= _ARTICLES_AT_LEAST else "blank-lines"
