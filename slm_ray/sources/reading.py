"""The rows of planned ranges, read back as they are, with stable ids.

In: ranges that have to be read together. Out: each with its raw rows, `RAW_SCHEMA`; an input that changed since it was
planned is refused.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import pyarrow as pa

from slm_ray.errors import UserError
from slm_ray.sources import addresses, formats, plain_text
from slm_ray.sources.formats import Texts
from slm_ray.sources.plain_text import Cut

RAW_SCHEMA = pa.schema(
    [
        pa.field("story_id", pa.string(), nullable=False),
        pa.field("text", pa.large_binary()),
        pa.field("problem", pa.string()),
    ]
)
"""Rows as read: the story's bytes, or with a `problem` (a reason of `text.REASONS`) whatever stood there."""


@dataclass(frozen=True, kw_only=True)
class InputRange:
    """Some consecutive rows of one input: one work item, and one shard of each split."""

    number: int  # names the shards
    kind: str
    source_name: str
    path: str
    first_row: int  # within the input
    n_rows: int
    start_byte: int  # uncompressed JSONL and text: where the first row begins
    end_byte: int
    separator: str  # text: how it is cut, one of prose.CUTS but auto
    text_column: str
    seed: int  # of the sample corpus
    split: str | None
    piece_chars: int = plain_text.PIECE_CHARS  # of text cut into pieces
    compression: str = ""  # gzip or zstd
    stamp: str = ""  # of the file when it was planned, from addresses.stamp; "": nothing can change it
    unit: int = 0  # ranges of one input that have the same are read together


def read_ranges(task: Sequence[InputRange]) -> Iterator[tuple[InputRange, pa.RecordBatch]]:
    """The ranges of a task, or some of them in order, each with its rows as they are, with `RAW_SCHEMA`.

    Row i has the id `NAME#i`, counted in its input. One range or two are in memory at a time. Ranges left out cost
    at most that the bytes before the next one are read.

    Raises:
        UserError: the input cannot be read, or changed since it was planned: by its size, its time or ETag, which are
            looked at before the first range and after each, or by its number of rows.
    """
    if not task:
        return
    _refuse_altered(task[0])
    for part, (texts, problems) in zip(task, _READERS[task[0].kind](task), strict=True):
        if len(texts) != part.n_rows:
            raise UserError(
                f"{part.path} changed while it was prepared: expected {part.n_rows} stories from number "
                f"{part.first_row} on, found {len(texts)}"
            )
        _refuse_altered(part)
        ids = [f"{part.source_name}#{row}" for row in _rows(part)]
        yield part, pa.RecordBatch.from_arrays([pa.array(ids, pa.string()), texts, problems], schema=RAW_SCHEMA)


def read_range(part: InputRange) -> pa.RecordBatch:
    """One range alone; see `read_ranges`."""
    [(_, batch)] = read_ranges((part,))
    return batch


def _refuse_altered(part: InputRange) -> None:
    if not part.stamp:
        return
    with addresses.reading(part.path):
        found = addresses.stamp(part.path)
    if found != part.stamp:
        raise UserError(
            f"{part.path} changed while it was prepared (was {part.stamp}, is {found}): "
            "run again when nobody writes to it"
        )


def _rows(part: InputRange) -> range:
    """Numbers of a range's rows in its input."""
    return range(part.first_row, part.first_row + part.n_rows)


def _read_parquet(task: Sequence[InputRange]) -> Iterator[Texts]:
    return formats.read_parquet(task[0].path, task[0].text_column, [_rows(part) for part in task])


def _read_rows(task: Sequence[InputRange]) -> Iterator[Texts]:
    first = task[0]
    cut = Cut(mode=first.separator or "auto", piece_chars=first.piece_chars)
    if not first.end_byte:  # a file that has to be read from its beginning
        rows = formats.stream_rows(first.kind, first.path, first.compression, first.text_column, cut)
        yield from formats.read_rows(rows, [_rows(part) for part in task])
        return
    for part in task:
        rows = formats.rows_between(part.kind, part.path, part.text_column, cut, part.start_byte, part.end_byte)
        yield from formats.read_rows(rows, [range(part.n_rows)])


def _read_sample(task: Sequence[InputRange]) -> Iterator[Texts]:
    from slm_ray.corpus.grammar import sample_stories

    for part in task:
        stories = sample_stories(part.first_row, part.first_row + part.n_rows, part.seed)
        yield formats.columns([(story.encode(), None) for story in stories])


_READERS: dict[str, Callable[[Sequence[InputRange]], Iterator[Texts]]] = {
    "parquet": _read_parquet,
    "hub": _read_parquet,
    "jsonl": _read_rows,
    "csv": _read_rows,
    "tsv": _read_rows,
    "text": _read_rows,
    "sample": _read_sample,
}


Item = tuple[InputRange, pa.RecordBatch]
"""What flows between the steps: a range and its rows."""
