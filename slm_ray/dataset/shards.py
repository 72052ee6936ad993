"""The Parquet files of a data set: written the same at any time, read back checked.

In: Arrow tables of tokenized stories from the pipeline. Out: shards; for `batches`, the token stream of a split as one
NumPy array. Every file that the manifest lists is complete, or reading says which is not.
"""

import hashlib
from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from slm_ray.dataset.manifest import MANIFEST, SPLITS, Manifest, Shard, load_manifest
from slm_ray.errors import UserError
from slm_ray.storage import StoragePath, file_sha256, make_folder, replace_file, storage_path

Tokens = npt.NDArray[np.uint16] | npt.NDArray[np.uint32]

REJECTED_SCHEMA = pa.schema([pa.field(name, pa.string(), nullable=False) for name in ("story_id", "reason", "text")])
"""One row per rejected story; `text` is the beginning of what was read."""


class UnreadableError(UserError):
    """A file is there, and cannot be read now: it may be whole, so nothing is done again or replaced for it."""


def shard_schema(vocab_size: int) -> pa.Schema:
    """One row per story: provenance, ids with the end-of-text token last, UTF-8 bytes of the cleaned text."""
    token = pa.uint16() if vocab_size <= 2**16 else pa.uint32()
    return pa.schema(
        [
            pa.field("story_id", pa.string(), nullable=False),
            pa.field("tokens", pa.list_(pa.field("element", token, nullable=False)), nullable=False),
            pa.field("n_bytes", pa.uint32(), nullable=False),
        ]
    )


def shard_path(split: str, number: int) -> str:
    """Where a shard lies in the folder: `shard_path("train", 3)` is `"train/00003.parquet"`."""
    return f"{split}/{number:05d}.parquet"


def write_shard(path: str | StoragePath, table: pa.Table) -> Shard:
    """Write one Parquet file, the same bytes for the same table on any host at any time.

    Every writer option that decides about bytes is given here. The file is written under another name and renamed
    when it is complete, so a killed or repeated attempt leaves no half shard.
    """
    path = storage_path(path)
    make_folder(path.parent)
    sink = pa.BufferOutputStream()
    pq.write_table(
        table.combine_chunks(),
        sink,
        row_group_size=max(table.num_rows, 1),
        version="2.6",
        data_page_version="1.0",
        compression="zstd",
        compression_level=3,
        use_dictionary=False,
        write_statistics=False,
        write_page_checksum=True,
    )
    content = memoryview(sink.getvalue())
    replace_file(path, content)
    has_tokens = "tokens" in table.schema.names
    return Shard(
        file=f"{path.parent.name}/{path.name}",
        rows=table.num_rows,
        tokens=sum(len(chunk.flatten()) for chunk in table["tokens"].chunks) if has_tokens else 0,
        bytes=int(np.sum(table["n_bytes"].to_numpy(), dtype=np.int64)) if has_tokens else 0,
        sha256=hashlib.sha256(content).hexdigest(),
    )


def read_split(folder: str | StoragePath, split: str, *, manifest: Manifest | None = None) -> tuple[Tokens, int]:
    """The token stream of a split, stories in shard and row order, and the bytes of text it stands for.

    Each file is read once; its digest, its page checksums and its counts are checked. An empty split gives no tokens.

    Raises:
        UserError: the split is unknown, a shard is missing or not the one the manifest lists, or the manifest's
            counts are not those of its shards.
    """
    manifest = manifest or load_manifest(folder)
    if split not in manifest.splits:
        raise UserError(f"no split {split!r} in {folder}: expected one of {', '.join(SPLITS)}")
    wanted = manifest.splits[split]
    tokens: Tokens = np.empty(wanted.tokens, token_type(manifest))
    start = 0
    for part, _ in split_parts(folder, split, manifest):
        tokens[start : start + len(part)] = part
        start += len(part)
    return tokens, wanted.bytes


def token_type(manifest: Manifest) -> np.dtype[Any]:
    """What holds a token of a data set's vocabulary."""
    return np.dtype(np.uint16 if manifest.tokenizer["vocab_size"] <= 2**16 else np.uint32)


def split_parts(
    folder: str | StoragePath, split: str, manifest: Manifest
) -> Iterator[tuple[Tokens, npt.NDArray[np.int64]]]:
    """The tokens of each shard of a split, and the lengths of its stories; one shard at a time is in memory.

    Raises:
        UserError: as `read_split`.
    """
    wanted = manifest.splits[split]
    listed = sum(shard.tokens for shard in wanted.shards)
    if listed != wanted.tokens:
        raise UserError(_miscount(storage_path(folder) / split, "tokens by its shards", listed, wanted.tokens))
    for shard in wanted.shards:
        stories = read_shard(folder, shard)["tokens"].combine_chunks()
        tokens = stories.flatten().to_numpy()
        if len(tokens) != shard.tokens:
            raise UserError(_miscount(storage_path(folder) / shard.file, "tokens", len(tokens), shard.tokens))
        yield tokens, stories.value_lengths().to_numpy().astype(np.int64)


def read_shard(folder: str | StoragePath, shard: Shard) -> pa.Table:
    """The rows of one shard, after its digest, page checksums and row count were checked.

    Raises:
        UserError: the file is missing, truncated or altered, or has another number of rows than is listed.
    """
    path = storage_path(folder) / shard.file
    content = checked_content(path, shard.sha256)
    try:
        table = pq.ParquetFile(pa.BufferReader(content), page_checksum_verification=True).read()
    except (pa.ArrowException, OSError) as error:
        raise UserError(f"{path} cannot be read ({error}): prepare the data again") from error
    if table.num_rows != shard.rows:
        raise UserError(_miscount(path, "rows", table.num_rows, shard.rows))
    return table


def verify_split(folder: str | StoragePath, split: str, manifest: Manifest) -> None:
    """Check the digest of every file of a split, reading it in parts, and that their sums are the split's.

    Raises:
        UserError: a shard is missing, truncated or altered, or the manifest's counts are not those of its shards.
    """
    wanted = manifest.splits[split]
    for name in ("rows", "tokens", "bytes"):
        listed = sum(getattr(shard, name) for shard in wanted.shards)
        if listed != getattr(wanted, name):
            found = _miscount(storage_path(folder) / split, f"{name} by its shards", listed, getattr(wanted, name))
            raise UserError(found)
    for shard in wanted.shards:
        path = storage_path(folder) / shard.file
        try:
            found = file_sha256(path)
        except OSError as error:
            raise UserError(f"cannot read {path}: {error.strerror}; prepare the data again") from error
        if found != shard.sha256:
            raise UserError(f"{path} was truncated or altered since it was prepared: prepare the data again")


def checked_content(path: StoragePath, sha256: str) -> bytes:
    """The bytes of a file, once their digest was found to be the one recorded.

    Raises:
        UserError: the file is missing, truncated or altered.
        UnreadableError: the disk or the store does not say.
    """
    try:
        content = path.read_bytes()
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError) as error:
        raise UserError(f"cannot read {path}: {error.strerror or 'it is not there'}; prepare the data again") from error
    except OSError as error:
        raise UnreadableError(f"cannot read {path}: {error.strerror or error}; try again") from error
    if hashlib.sha256(content).hexdigest() != sha256:
        raise UserError(f"{path} was truncated or altered since it was prepared: prepare the data again")
    return content


def _miscount(path: StoragePath, what: str, found: int, listed: int) -> str:
    return f"{path} has {found} {what}, but {MANIFEST} lists {listed}: prepare the data again"
