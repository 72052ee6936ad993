"""The contract on disk: what a data-set folder holds, how it is written, and how it is read back checked.

In: Arrow tables of tokenized stories from `pipelines/`. Out: Parquet shards and `manifest.json`; for
`batches`, the token stream of a split as one NumPy array. Both sides import this module, so neither can drift
from the other. A folder without `manifest.json` is no data set; with one, every file it lists is whole, or
reading says which is not.
"""

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from slm_ray.errors import UserError, first_line
from slm_ray.storage import Place, make_folder, place, replace_file

FORMAT_VERSION = 1
SPLITS = ("train", "validation", "test")
MANIFEST = "manifest.json"
TOKENIZER = "tokenizer.json"
REJECTED = "rejected"
PREPARE_HINT = "run `python pipelines/prepare.py` first"

Tokens = npt.NDArray[np.uint16] | npt.NDArray[np.uint32]

REJECTED_SCHEMA = pa.schema([pa.field(name, pa.string(), nullable=False) for name in ("story_id", "reason", "text")])
"""One row per story kept aside; `text` is the beginning of what was read."""


def shard_schema(vocab_size: int) -> pa.Schema:
    """One row per story: provenance, ids with the end mark last, UTF-8 bytes of the cleaned text."""
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


@dataclass(frozen=True, kw_only=True)
class Shard:
    """One Parquet file of one split, or of the rejected stories."""

    file: str  # relative to the data-set folder, with "/"
    rows: int  # stories
    tokens: int  # ids, end marks included; 0 for rejected stories
    bytes: int  # UTF-8 bytes of the cleaned text; 0 for rejected stories
    sha256: str  # of the file


@dataclass(frozen=True, kw_only=True)
class Split:
    """The shards of one split, in reading order, and their sums."""

    rows: int
    tokens: int
    bytes: int
    shards: tuple[Shard, ...]

    @classmethod
    def of(cls, shards: tuple[Shard, ...]) -> "Split":
        """Put shards in order of their names and add them up."""
        ordered = tuple(sorted(shards, key=lambda shard: shard.file))
        return cls(
            rows=sum(shard.rows for shard in ordered),
            tokens=sum(shard.tokens for shard in ordered),
            bytes=sum(shard.bytes for shard in ordered),
            shards=ordered,
        )


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """What a data set is made of; `fingerprint` identifies it."""

    format_version: int
    source: dict[str, Any]  # requested, used, why, revision, digest, files
    parameters: dict[str, Any]  # everything that decides about bytes
    tokenizer: dict[str, Any]  # file, sha256, vocab_size, end_token, end_token_id
    splits: dict[str, Split]  # every name of SPLITS, empty ones too
    rejected: Split  # evidence; its tokens and bytes are 0
    counts: dict[str, Any]  # read, kept, duplicates, rejected by reason
    fingerprint: str

    def to_json(self) -> str:
        """Sorted keys, two spaces: equal manifests are equal bytes."""
        return json.dumps(dataclasses.asdict(self), indent=2, sort_keys=True, ensure_ascii=False) + "\n"

    @classmethod
    def from_json(cls, text: str) -> "Manifest":
        """Read `to_json()`'s output back. Raises KeyError, TypeError or ValueError where it is not that."""
        fields = json.loads(text)
        if fields["format_version"] != FORMAT_VERSION:
            raise ValueError(f"format version {fields['format_version']}, expected {FORMAT_VERSION}")
        fields["splits"] = {name: _split_from(fields["splits"][name]) for name in SPLITS}
        fields["rejected"] = _split_from(fields["rejected"])
        return cls(**fields)


def fingerprint(
    *,
    source_digest: str,
    parameters: Mapping[str, Any],
    tokenizer_sha256: str,
    splits: Mapping[str, Split],
) -> str:
    """One sha256 that identifies a data set: no path, host or time goes into it."""
    content = {
        "format_version": FORMAT_VERSION,
        "source": source_digest,
        "parameters": dict(parameters),
        "tokenizer": tokenizer_sha256,
        "shards": [[shard.file, shard.sha256] for name in SPLITS for shard in splits[name].shards],
    }
    return json_sha256(content)


def json_sha256(content: Any) -> str:
    """sha256 of a value's one JSON form: sorted keys, no spaces, UTF-8."""
    text = json.dumps(content, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return hashlib.sha256(text.encode("utf-8")).hexdigest()


def load_manifest(folder: str | Place) -> Manifest:
    """The manifest of a data-set folder.

    Raises:
        UserError: there is none, or it is not one that this version reads.
    """
    path = place(folder) / MANIFEST
    try:
        return Manifest.from_json(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError) as error:
        raise UserError(f"no {MANIFEST} in {folder}: {PREPARE_HINT}") from error
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from error
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise UserError(f"{path} is no manifest this version reads ({error}): prepare the data again") from error
    except Exception as error:  # each object store has errors of its own
        raise UserError(f"cannot read {path}: {first_line(error)}") from error


def write_shard(path: str | Place, table: pa.Table) -> Shard:
    """Write one Parquet file, the same bytes for the same table on any host at any time.

    Every writer option that decides about bytes is given here. The file appears under its name only when
    whole: it is written beside it and renamed, so a killed or repeated attempt leaves no half shard.
    """
    path = place(path)
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


def read_split(folder: str | Place, split: str, *, manifest: Manifest | None = None) -> tuple[Tokens, int]:
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
    vocab_size = manifest.tokenizer["vocab_size"]
    tokens = np.empty(wanted.tokens, np.uint16) if vocab_size <= 2**16 else np.empty(wanted.tokens, np.uint32)
    listed = sum(shard.tokens for shard in wanted.shards)
    if listed != wanted.tokens:
        raise UserError(_miscount(place(folder) / split, "tokens by its shards", listed, wanted.tokens))
    start = 0
    for shard in wanted.shards:
        table = read_shard(folder, shard)
        part = table["tokens"].combine_chunks().flatten().to_numpy()
        if len(part) != shard.tokens:
            raise UserError(_miscount(place(folder) / shard.file, "tokens", len(part), shard.tokens))
        tokens[start : start + len(part)] = part
        start += len(part)
    return tokens, wanted.bytes


def read_shard(folder: str | Place, shard: Shard) -> pa.Table:
    """The rows of one shard, after its digest, page checksums and row count were checked.

    Raises:
        UserError: the file is missing, truncated or altered, or has another number of rows than is listed.
    """
    path = place(folder) / shard.file
    content = checked_content(path, shard.sha256)
    try:
        table = pq.ParquetFile(pa.BufferReader(content), page_checksum_verification=True).read()
    except (pa.ArrowException, OSError) as error:
        raise UserError(f"{path} cannot be read ({error}): prepare the data again") from error
    if table.num_rows != shard.rows:
        raise UserError(_miscount(path, "rows", table.num_rows, shard.rows))
    return table


def checked_content(path: Place, sha256: str) -> bytes:
    """The bytes of a file, once their digest was found to be the one recorded.

    Raises:
        UserError: the file is missing, unreadable, truncated or altered.
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}; prepare the data again") from error
    if hashlib.sha256(content).hexdigest() != sha256:
        raise UserError(f"{path} was truncated or altered since it was prepared: prepare the data again")
    return content


def _miscount(path: Place, what: str, found: int, listed: int) -> str:
    return f"{path} has {found} {what}, but {MANIFEST} lists {listed}: prepare the data again"


def _split_from(fields: Mapping[str, Any]) -> Split:
    return Split(**{**fields, "shards": tuple(Shard(**shard) for shard in fields["shards"])})
