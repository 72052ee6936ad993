"""Cleaned ranges, as files of the staging folder, until duplicates and tokenizer are known.

In: a cleaned range. Out: the same range, read back in this or a later job.
"""

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
        UserError: it is not the file that was written.
    """
    path = cleaned_path(storage.storage_path(folder), part.number)
    try:
        source = pa.memory_map(str(path)) if storage.is_local(path) else pa.BufferReader(path.read_bytes())
        batch = pa.ipc.open_file(source).get_batch(0)
    except (pa.ArrowException, OSError) as error:
        raise UserError(f"{path} is damaged ({error}): remove the folder {folder} and run again") from error
    return part, batch
