"""Parquet: how many rows a file has, which of them are decoded together, and their texts.

In: an address. Out: its rows counted while planning, its texts as a stream while reading. Found by `formats`. Memory
is a range or two and the pages they lie in, however large the row groups are.
"""

import bisect
import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pyarrow.types as types

from slm_ray.errors import UserError
from slm_ray.sources import addresses, input_files
from slm_ray.sources.compression import ScanWatch
from slm_ray.sources.input_files import InputFile, InputRange, ScanResult, Texts
from slm_ray.sources.rows import column_hint, first_chunks

_BATCH_ROWS = 1000
_BATCH_BYTES = 1 << 22
_BUFFER_BYTES = 1 << 20  # of a column read ahead; without a limit it is all of the row group


@dataclass(frozen=True)
class Parquet:
    """Parquet files; one with several row groups can be entered at each of them."""

    text_column: str
    cut = ""

    def scan(self, file: InputFile, step: int, watch: ScanWatch) -> ScanResult:
        """See `Format`. Reads the content for its digest, and the metadata at its end for the rest."""
        for _ in first_chunks(file, watch):
            pass
        starts, sizes = _checked_groups(file.path, self.text_column)
        first_rows = tuple(_range_starts(starts, sizes, step))
        units = tuple(bisect.bisect_right(starts, row) - 1 for row in first_rows)
        return ScanResult(file=file, sha256=watch.sha256, n_rows=starts[-1], first_rows=first_rows, units=units)

    def read(self, ranges: Sequence[InputRange]) -> Iterator[Texts]:
        """See `Format`."""
        parts = [part.rows for part in ranges]
        batches = _read(ranges[0].file.path, self.text_column, parts[0].start, parts[-1].stop)
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


def _range_starts(starts: Sequence[int], sizes: Sequence[float], step: int) -> Iterator[int]:
    """Where ranges begin: after `step` rows, or `RANGE_BYTES` of text by the mean size of a row of each group."""
    n_rows, n_bytes = step, 0.0
    for (row, end), size in zip(itertools.pairwise(starts), sizes, strict=True):
        while row < end:
            if n_rows >= step or n_bytes >= input_files.RANGE_BYTES:
                yield row
                n_rows, n_bytes = 0, 0.0
            left = math.ceil((input_files.RANGE_BYTES - n_bytes) / max(size, 1.0))
            n_more = min(step - n_rows, end - row, left)
            row, n_rows, n_bytes = row + n_more, n_rows + n_more, n_bytes + n_more * size


def _checked_groups(address: str, text_column: str) -> tuple[list[int], list[float]]:
    """See `_group_starts`, `_row_bytes`. Raises UserError for what is not Parquet, or has no such column of text."""
    try:
        with addresses.open_file(address) as stored, pq.ParquetFile(stored) as file:
            schema, starts, sizes = file.schema_arrow, _group_starts(file), _row_bytes(file, text_column)
    except pa.ArrowException as error:
        raise UserError(f"{address} is not Parquet, or not all of it: {addresses.all_lines(error)}") from error
    if text_column not in schema.names:
        raise UserError(f"{address} has no column {text_column!r}; {column_hint(schema.names)}")
    if schema.names.count(text_column) > 1:
        raise UserError(f"{address} has several columns {text_column!r}: name one with --text-column, or rename them")
    column_type = schema.field(text_column).type
    if not _is_text(column_type):
        raise UserError(f"column {text_column!r} of {address} is {column_type}, expected strings")
    return starts, sizes


def _read(address: str, text_column: str, first_row: int, end_row: int) -> Iterator[pa.Array]:
    """The texts from one row to another as bytes, null where there is none, some hundred at a time.

    Decodes from the beginning of the row group that holds the first row.

    Raises:
        UserError: a page cannot be read.
    """
    with addresses.reading(address), addresses.open_file(address) as stored:
        try:
            with pq.ParquetFile(stored, page_checksum_verification=True, buffer_size=_BUFFER_BYTES) as file:
                yield from _slices(file, text_column, first_row, end_row)
        except (pa.ArrowException, OSError) as error:
            if getattr(error, "errno", None):
                raise
            why = f"{address} is damaged and cannot be read as Parquet: {addresses.all_lines(error)}"
            raise UserError(why) from error


def _slices(file: pq.ParquetFile, text_column: str, first_row: int, end_row: int) -> Iterator[pa.Array]:
    starts = _group_starts(file)
    spans = list(enumerate(itertools.pairwise(starts)))
    groups = [group for group, (start, end) in spans if start < end and start < end_row and end > first_row]
    position = starts[groups[0]] if groups else 0
    largest = max((size for group, size in enumerate(_row_bytes(file, text_column)) if group in groups), default=1.0)
    n_rows = min(_BATCH_ROWS, max(1, int(_BATCH_BYTES / max(largest, 1.0))))
    for batch in file.iter_batches(batch_size=n_rows, row_groups=groups, columns=[text_column]):
        wanted = batch.column(text_column)[max(0, first_row - position) : max(0, end_row - position)]
        if len(wanted):
            yield wanted.cast(pa.large_binary())
        position += batch.num_rows


def _group_starts(file: pq.ParquetFile) -> list[int]:
    """The first row of each row group, and the number of all rows."""
    groups = range(file.metadata.num_row_groups)
    return list(itertools.accumulate((file.metadata.row_group(group).num_rows for group in groups), initial=0))


def _row_bytes(file: pq.ParquetFile, text_column: str) -> list[float]:
    """The mean size of a text of each row group, as its pages hold them: the file does not say that of each row."""
    sizes = []
    for number in range(file.metadata.num_row_groups):
        group = file.metadata.row_group(number)
        columns = (group.column(place) for place in range(group.num_columns))
        n_bytes = sum(part.total_uncompressed_size for part in columns if part.path_in_schema == text_column)
        sizes.append(n_bytes / max(group.num_rows, 1))
    return sizes


def _is_text(kind: pa.DataType) -> bool:
    """Strings of any encoding; a column of nothing but nulls has rows too, each of them no text."""
    if types.is_dictionary(kind):
        kind = kind.value_type
    text = (pa.string(), pa.large_string(), pa.string_view(), pa.binary(), pa.large_binary(), pa.binary_view())
    return kind in text or types.is_null(kind)
