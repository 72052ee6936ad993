"""Cleaned ranges, as files of the staging folder, until duplicates and tokenizer are known.

In: a cleaned range. Out: the same range, read back in this or a later job.
"""

import mmap
import os
from pathlib import Path

import pyarrow as pa

from slm_ray import storage
from slm_ray.errors import UserError
from slm_ray.preparation.splits import HASH_BYTES
from slm_ray.sources.input_files import InputRange
from slm_ray.sources.reading import Item
from slm_ray.storage import StoragePath

CLEANED = "cleaned"  # folder of the cleaned ranges, beside the staged shards
CLEANED_SCHEMA = pa.schema(
    [
        pa.field("story_id", pa.string(), nullable=False),
        pa.field("text", pa.large_string(), nullable=False),  # clean, or evidence
        pa.field("reason", pa.string()),  # null: kept
        pa.field("hash", pa.binary(HASH_BYTES)),  # null: rejected
    ]
)


def cleaned_path(folder: StoragePath, number: int) -> StoragePath:
    """Where a cleaned range waits."""
    return folder / CLEANED / f"{number:05d}.arrow"


def keep_cleaned(item: Item, folder: str) -> InputRange:
    """Write a cleaned range into the staging folder `folder`. Returns the range alone."""
    part, batch = item
    sink = pa.BufferOutputStream()
    with pa.ipc.new_file(sink, batch.schema) as writer:
        writer.write_batch(batch)
    path = cleaned_path(storage.storage_path(folder), part.number)
    storage.make_folder(path.parent)
    storage.replace_file(path, memoryview(sink.getvalue()))
    return part


def load_cleaned(part: InputRange, folder: str) -> Item:
    """A cleaned range, read back; only what is used of it is read from a disk.

    Raises:
        UserError: it is not the file that was written, or cannot be read now.
    """
    path = cleaned_path(storage.storage_path(folder), part.number)
    try:
        content = _mapped(path) if storage.is_local(path) else path.read_bytes()
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}; run again") from error
    try:
        batch = pa.ipc.open_file(pa.BufferReader(content)).get_batch(0)
    except (pa.ArrowException, OSError) as error:
        raise UserError(f"{path} is damaged ({error}): remove the folder {folder} and run again") from error
    return part, batch


def _mapped(path: Path) -> pa.Buffer | bytes:
    """The content of a file, read when it is used. Arrow's own mapping takes no name that is not UTF-8."""
    with path.open("rb") as file:
        if not os.fstat(file.fileno()).st_size:
            return b""
        return pa.py_buffer(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
