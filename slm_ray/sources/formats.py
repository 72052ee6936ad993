"""Files of stories: what kind a file is, how many rows it has, which can be read alone, and the rows themselves.

In: an address, and options. Out: `Scan` while planning, `Texts` while reading. Called by `inputs` and `sources`; each
kind has its module. A fault of the whole file is a `UserError`; a fault of one row is that row's `problem`, with its
bytes kept as evidence.
"""

import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import PurePosixPath

import pyarrow as pa
import pyarrow.compute as pc

from slm_ray.errors import UserError
from slm_ray.sources import addresses, delimited, json_lines, parquet, plain_text
from slm_ray.sources.compression import COMPRESSIONS, Watch, chunks_between, read_chunks
from slm_ray.sources.plain_text import Cut, UnclearCutError
from slm_ray.sources.rows import Row, TooLongError

KINDS = {
    ".parquet": "parquet",
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".csv": "csv",
    ".tsv": "tsv",
    ".txt": "text",
    ".text": "text",
}
"""What is in a file, by the end of its name; all but Parquet may also be compressed as a whole."""

KNOWN_ENDS = f"{', '.join(KINDS)} (all but Parquet also with {' or '.join(COMPRESSIONS)} after it)"
"""For messages."""

Texts = tuple[pa.Array, pa.Array]
"""The bytes of some stories, and their problems (null: none)."""

_DELIMITERS = {"csv": ",", "tsv": "\t"}


@dataclass(frozen=True, kw_only=True)
class Scan:
    """What one pass over a file found."""

    sha256: str  # of the content as stored
    n_rows: int
    borders: tuple[int, ...] = ()  # byte where every `step`-th row begins, then the end; () where none can be entered
    units: tuple[int, ...] = ()  # for every `step`-th row what it is read together with; (): all are, without borders
    separator: str = ""  # text files: how they are cut, one of prose.CUTS but auto


@dataclass(frozen=True, kw_only=True)
class Scanning:
    """How files are looked at."""

    text_column: str
    step: int  # rows of a range
    cut: Cut = field(default_factory=Cut)  # of text files
    on_bytes: Callable[[int], None] | None = None  # hears how many bytes were read since it was called last


def kind_of(address: str) -> tuple[str, str] | None:
    """Kind and compression of a file by its name: `a.jsonl.gz` is `("jsonl", "gzip")`; None if it is none of ours."""
    path = PurePosixPath(address)
    compression = COMPRESSIONS.get(path.suffix.lower(), "")
    kind = KINDS.get((path.with_suffix("") if compression else path).suffix.lower())
    return None if kind is None or (kind == "parquet" and compression) else (kind, compression)


def is_known(address: str) -> bool:
    """Whether a file can be read, by its name."""
    return kind_of(address) is not None


def scan(address: str, scanning: Scanning) -> Scan:
    """Read a file once: digest, number of rows, and where each `step`-th begins.

    Raises:
        UserError: the file cannot be read, is empty or damaged, is not what its name says, or has no such column.
    """
    kind, compression = kind_of(address) or ("", "")
    watch = Watch(scanning.on_bytes)
    with addresses.reading(address):
        if kind == "parquet":
            return _scan_parquet(address, scanning, watch)
        chunks = _checked(address, read_chunks(address, compression, watch))
        try:
            n_rows, borders, separator = _scan_rows(kind, address, chunks, scanning)
        except TooLongError as error:
            hint = "see --cut-text" if kind == "text" else f"is it {kind.upper()}?"
            raise UserError(f"{address}: {error}; {hint}") from error
        except UnclearCutError as error:
            raise UserError(f"{address}: {error}: give --cut-text end-mark or --cut-text blank-lines") from error
    if not compression and borders is not None:
        ends = (*borders, watch.n_bytes)
        return Scan(
            sha256=watch.sha256, n_rows=n_rows, borders=ends, units=tuple(range(len(borders))), separator=separator
        )
    return Scan(sha256=watch.sha256, n_rows=n_rows, separator=separator)


def read_parquet(address: str, text_column: str, parts: Sequence[range]) -> Iterator[Texts]:
    """The texts of some row ranges that follow on one another, perhaps with gaps; each as soon as it is complete."""
    batches = parquet.read(address, text_column, parts[0].start, parts[-1].stop)
    held: list[pa.Array] = []  # rows before `position`, those of the part without a gap
    position = parts[0].start
    for part in parts:
        if part.start >= position:
            held = []
        while position < part.stop and (batch := next(batches, None)) is not None:
            position += len(batch)
            if position > part.start:
                held.append(batch)
        texts = pa.concat_arrays([pa.array([], pa.large_binary()), *held])
        first = position - len(texts)
        held = [texts[max(0, part.stop - first) :]]
        whole = texts[max(0, part.start - first) : max(0, part.stop - first)]
        yield whole, pc.if_else(pc.is_null(whole), "not_text", pa.scalar(None, pa.string()))


def read_rows(rows: Iterator[Row], parts: Iterable[range]) -> Iterator[Texts]:
    """Some row ranges, perhaps with gaps, of rows that are read from the first on."""
    position = 0
    for part in parts:
        for _ in itertools.islice(rows, part.start - position):
            pass
        yield columns(list(itertools.islice(rows, len(part))))
        position = part.stop


def stream_rows(kind: str, address: str, compression: str, text_column: str, cut: Cut) -> Iterator[Row]:
    """All rows of a file, from its beginning."""
    chunks = read_chunks(address, compression)
    if kind == "jsonl":
        return json_lines.read(chunks, text_column)
    if kind in _DELIMITERS:
        return delimited.read(address, chunks, text_column, _DELIMITERS[kind])
    finder = plain_text.make_finder(cut.mode, cut.piece_chars, at_start=True)
    return ((story, None) for story in plain_text.read_stories(chunks, finder))


def rows_between(kind: str, address: str, text_column: str, cut: Cut, start_byte: int, end_byte: int) -> Iterator[Row]:
    """The rows of an uncompressed JSONL or text file from one border to another, perhaps some more."""
    if kind == "jsonl":
        return json_lines.read(chunks_between(address, start_byte, end_byte), text_column)
    finder = plain_text.make_finder(cut.mode, cut.piece_chars, at_start=False)
    chunks = chunks_between(address, start_byte, end_byte + finder.lookahead_bytes)
    return ((story, None) for story in plain_text.read_stories(chunks, finder))


def columns(rows: Sequence[Row]) -> Texts:
    """Rows as Arrow columns."""
    return (
        pa.array([text for text, _ in rows], pa.large_binary()),
        pa.array([problem for _, problem in rows], pa.string()),
    )


def _scan_parquet(address: str, scanning: Scanning, watch: Watch) -> Scan:
    for _ in _checked(address, read_chunks(address, "", watch)):
        pass
    found = parquet.scan(address, scanning.text_column, scanning.step)
    return Scan(sha256=watch.sha256, n_rows=found.n_rows, units=found.units)


def _scan_rows(
    kind: str, address: str, chunks: Iterator[bytes], scanning: Scanning
) -> tuple[int, list[int] | None, str]:
    """Number of rows, where each `step`-th begins (None: nobody can begin there), and how a text is cut."""
    if kind in _DELIMITERS:
        rows = delimited.read(address, chunks, scanning.text_column, _DELIMITERS[kind])
        return sum(1 for _ in rows), None, ""
    if kind == "jsonl":
        count = json_lines.scan(address, chunks, scanning.text_column, scanning.step)
        return count.n_rows, count.borders, ""
    separator, count = plain_text.scan(chunks, scanning.cut, scanning.step)
    return count.n_rows, count.borders, separator


def _checked(address: str, chunks: Iterator[bytes]) -> Iterator[bytes]:
    """Refuse a file that holds nothing, or that says at its beginning that it is no UTF-8."""
    first = next(chunks, b"")
    if not first:
        raise UserError(f"{address} is empty (0 bytes)")
    encoding = _other_encoding(first[:64])
    if encoding:
        raise UserError(
            f"{address} is {encoding}, expected UTF-8: convert it, for example with iconv -f {encoding} -t UTF-8"
        )
    yield first
    yield from chunks


def _other_encoding(beginning: bytes) -> str | None:
    """UTF-16 by its byte order mark, or by a NUL in every second place of at least four characters."""
    if beginning.startswith((b"\xff\xfe", b"\xfe\xff")):
        return "UTF-16"
    even, odd = beginning[0::2], beginning[1::2]
    is_utf16 = len(odd) >= 4 and 0 in beginning and any(not any(a) and all(b) for a, b in ((even, odd), (odd, even)))
    return "UTF-16" if is_utf16 else None
