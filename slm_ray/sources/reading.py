"""The rows of planned ranges, read back as they are, with stable ids.

In: ranges that have to be read together. Out: each with its raw rows, `RAW_SCHEMA`; an input that changed since it was
planned is refused.
"""

from collections.abc import Iterator, Sequence

import pyarrow as pa

from slm_ray.errors import UserError
from slm_ray.sources import addresses
from slm_ray.sources.input_files import InputFile, InputRange

RAW_SCHEMA = pa.schema(
    [
        pa.field("story_id", pa.string(), nullable=False),
        pa.field("text", pa.large_binary()),
        pa.field("problem", pa.string()),
    ]
)
"""Rows as read: the story's bytes, or with a `problem` (a reason of `rejections.REASONS`) whatever stood there."""

Item = tuple[InputRange, pa.RecordBatch]
"""What flows between the steps: a range and its rows."""


def read_ranges(task: Sequence[InputRange]) -> Iterator[Item]:
    """The ranges of a task, or some of them in order, each with its rows as they are, with `RAW_SCHEMA`.

    Row i of an input has the id `NAME#i`. One range or two are in memory at a time. Of ranges that are left out, the
    bytes may have to be read.

    Raises:
        UserError: the input cannot be read, or changed since it was planned: by its size, its time or ETag, which are
            looked at before the first range and after each, or by its number of rows.
    """
    if not task:
        return
    file = task[0].file
    _refuse_altered(file)
    for part, (texts, problems) in zip(task, file.format.read(task), strict=True):
        if len(texts) != part.n_rows:
            raise UserError(
                f"{file.path} changed while it was prepared: expected {part.n_rows} stories from number "
                f"{part.first_row} on, found {len(texts)}"
            )
        _refuse_altered(file)
        ids = [f"{file.name}#{row}" for row in part.rows]
        yield part, pa.RecordBatch.from_arrays([pa.array(ids, pa.string()), texts, problems], schema=RAW_SCHEMA)


def _refuse_altered(file: InputFile) -> None:
    if not file.stamp:
        return
    with addresses.reading(file.path):
        found = addresses.stamp(file.path)
    if found != file.stamp:
        raise UserError(
            f"{file.path} changed while it was prepared (was {file.stamp}, is {found}): "
            "run again when nobody writes to it"
        )
