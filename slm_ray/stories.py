"""One input range on its way from raw text to shards: a batch that gains columns and loses no row.

In: an `InputRange` and its rows as read. Out: shards, and a `RangeSummary` for the manifest and the report.
Each function is one step of the pipeline; `pipelines/transforms.py` only wires them. A rejected row keeps its
place with a `reason`, so read = kept + duplicates + rejected holds by construction, and is still checked.
"""

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from slm_ray import shards
from slm_ray.shards import REJECTED, REJECTED_SCHEMA, SPLITS, Shard, shard_path, shard_schema
from slm_ray.sources import InputRange, read_range
from slm_ray.summary import RangeSummary, save_summary, summarize
from slm_ray.text import HASH_BYTES, CleaningRules, examine, is_sampled, split_of_hash, story_hash
from slm_ray.tokenizer import Tokenizer, cached_tokenizer

Item = tuple[InputRange, pa.RecordBatch]
"""What flows between the steps: a range and its rows."""

Positions = npt.NDArray[np.uint64]
"""Where stories stand, as one number each: see `row_positions`."""

EVIDENCE_BYTES = 200  # of the text of a rejected story
HASH_BUCKETS = 16  # the hashes of a data set are compared in this many independent parts

_ROW_BITS = 32
_MAIN_SOURCE = np.uint64(1 << 62)


def read_item(part: InputRange) -> Item:
    """A range and its raw rows."""
    return part, read_range(part)


def clean_batch(item: Item, rules: CleaningRules) -> Item:
    """Raw rows to `story_id`, `text` (clean, or evidence), `reason` (null: kept), `hash` (null: rejected)."""
    part, batch = item
    texts, reasons, hashes = [], [], []
    for raw, problem in zip(batch["text"].to_pylist(), batch["problem"].to_pylist(), strict=True):
        text, reason = examine(raw, rules) if problem is None else (_evidence(raw or b""), problem)
        texts.append(text if reason is None else _evidence(text.encode("utf-8")))
        reasons.append(reason)
        hashes.append(story_hash(text) if reason is None else None)
    columns = {
        "story_id": batch["story_id"],
        "text": pa.array(texts, pa.string()),
        "reason": pa.array(reasons, pa.string()),
        "hash": pa.array(hashes, pa.binary(HASH_BYTES)),
    }
    return part, pa.RecordBatch.from_pydict(columns)


def row_positions(part: InputRange, rows: npt.NDArray[np.intp]) -> Positions:
    """Rows as numbers whose order says which of two equal stories is kept: the lower one.

    Validation rows of their own source come before all others, so a copy in the training source is the one
    that goes; then the lower range, then the lower row.
    """
    base = np.uint64(part.number << _ROW_BITS)
    if part.split is None:
        base |= _MAIN_SOURCE
    return rows.astype(np.uint64) | base


def hash_rows(item: Item) -> Iterator[tuple[int, tuple[pa.Array, Positions]]]:
    """`(bucket, (hashes, positions))` of the kept rows: all that has to be shuffled to find duplicates."""
    part, batch = item
    rows = np.flatnonzero(batch["reason"].is_null().to_numpy(zero_copy_only=False))
    hashes = batch["hash"].take(pa.array(rows))
    positions = row_positions(part, rows)
    first_byte = np.frombuffer(b"".join(hashes.to_pylist()), np.uint8)[::HASH_BYTES]
    for bucket in np.unique(first_byte % HASH_BUCKETS):
        inside = np.flatnonzero(first_byte % HASH_BUCKETS == bucket)
        yield int(bucket), (hashes.take(pa.array(inside)), positions[inside])


def find_duplicates(
    group: tuple[int, Iterable[tuple[pa.Array, Positions]]],
) -> Iterator[tuple[int, npt.NDArray[np.int64]]]:
    """`(range number, rows)` of all stories of one bucket that equal another one with a lower position."""
    parts = list(group[1])
    table = pa.table(
        {
            "hash": pa.concat_arrays([hashes for hashes, _ in parts]),
            "position": pa.array(np.concatenate([positions for _, positions in parts])),
        }
    )
    lowest = table.group_by("hash").aggregate([("position", "min")])["position_min"]
    dropped = np.sort(np.setdiff1d(table["position"].to_numpy(), lowest.to_numpy()))
    numbers = (dropped & ~_MAIN_SOURCE) >> np.uint64(_ROW_BITS)
    rows = (dropped & np.uint64(2**_ROW_BITS - 1)).astype(np.int64)
    for number in np.unique(numbers):
        yield int(number), rows[numbers == number]


def sample_texts(item: Item, share: float, fractions: tuple[float, float]) -> tuple[int, list[tuple[bytes, str]]]:
    """`(0, [(hash, text), ...])` of the training stories that the tokenizer learns from, about `share` of all.

    Chosen by hash, so the same ones on any runner; the one key brings all ranges together.
    """
    part, batch = item
    rows = zip(batch["hash"].to_pylist(), batch["text"].to_pylist(), strict=True)
    return 0, [
        (digest, text)
        for digest, text in rows
        if digest is not None and is_sampled(digest, share) and _split(part, digest, fractions) == "train"
    ]


def train_tokenizer(group: tuple[int, Iterable[list[tuple[bytes, str]]]], vocab_size: int) -> str:
    """`tokenizer.json` learned from the sample: each distinct story once, whatever the order of its parts."""
    texts = sorted({pair for part in group[1] for pair in part})
    distinct = dict(reversed(texts))  # of stories equal but for case, the first in order stays
    return Tokenizer.train(distinct.values(), vocab_size).to_json()


def save_tokenizer(tokenizer_json: str, folder: str) -> None:
    """Put `tokenizer.json` into the staging folder."""
    shards.replace_file(Path(folder) / shards.TOKENIZER, tokenizer_json.encode("utf-8"))


def drop_duplicates(item: Item, duplicates: Mapping[int, Iterable[npt.NDArray[np.int64]]]) -> Item:
    """Give the rows found by `find_duplicates` the reason `duplicate`."""
    part, batch = item
    found = duplicates.get(part.number)
    if not found:
        return item
    is_duplicate = np.zeros(batch.num_rows, dtype=bool)
    for rows in found:
        is_duplicate[rows] = True
    evidence = pa.array([_evidence(text.encode("utf-8")) for text in batch["text"].to_pylist()], pa.string())
    mask = pa.array(is_duplicate)
    batch = _replaced(batch, "text", pc.if_else(mask, evidence, batch["text"]))
    return part, _replaced(batch, "reason", pc.if_else(mask, "duplicate", batch["reason"]))


def split_batch(item: Item, fractions: tuple[float, float]) -> Item:
    """Add `split`: train, validation or test; null for rejected rows."""
    part, batch = item
    kept = batch["reason"].is_null().to_pylist()
    splits = [
        _split(part, digest, fractions) if keep else None
        for keep, digest in zip(kept, batch["hash"].to_pylist(), strict=True)
    ]
    return part, batch.append_column("split", pa.array(splits, pa.string()))


def tokenize_batch(item: Item, tokenizer_json: str) -> Item:
    """Add `tokens`, which end with the end mark, `n_bytes` and `words`; rejected rows have the mark alone."""
    part, batch = item
    batch = batch.append_column("words", _words(pc.if_else(batch["reason"].is_null(), batch["text"], None)))
    tokenizer = cached_tokenizer(tokenizer_json)
    texts = pc.if_else(batch["reason"].is_null(), batch["text"], "")
    batch = batch.append_column("tokens", _with_end_mark(tokenizer.encode_batch(texts), tokenizer.end_id))
    return part, batch.append_column("n_bytes", pc.binary_length(texts).cast(pa.uint32()))


def write_range(item: Item, folder: str, tokenizer_json: str) -> RangeSummary:
    """Write the range's shards and evidence below `folder`; its summary, written last, says it is finished."""
    part, batch = item
    tokenizer = cached_tokenizer(tokenizer_json)
    table = pa.Table.from_batches([batch])
    written = {}
    for split in SPLITS:
        rows = table.filter(pc.equal(table["split"], split))
        if len(rows):
            written[split] = _write(folder, split, part.number, rows, shard_schema(tokenizer.vocab_size))
    rejected = table.filter(table["reason"].is_valid())
    if len(rejected):
        written[REJECTED] = _write(folder, REJECTED, part.number, rejected, REJECTED_SCHEMA)
    summary = summarize(part.number, table, written, tokenizer)
    save_summary(Path(folder), summary)
    return summary


def _write(folder: str, split: str, number: int, rows: pa.Table, schema: pa.Schema) -> Shard:
    table = rows.select(schema.names).cast(schema)
    return shards.write_shard(Path(folder) / shard_path(split, number), table)


def _split(part: InputRange, digest: bytes, fractions: tuple[float, float]) -> str:
    return part.split or split_of_hash(digest, fractions)


def _words(texts: pa.StringArray) -> pa.ListArray:
    """Texts cut at single spaces, each distinct word once in a dictionary; none for null."""
    split = pc.split_pattern(texts, " ")
    return pa.ListArray.from_arrays(split.offsets, split.flatten().dictionary_encode())


def _with_end_mark(lists: pa.ListArray, end_id: int) -> pa.ListArray:
    """Append the end mark to every list: `[[5, 6], []]` becomes `[[5, 6, end], [end]]`."""
    ids, offsets = lists.values.to_numpy(), lists.offsets.to_numpy()
    marked = np.insert(ids, offsets[1:], end_id)
    return pa.ListArray.from_arrays(pa.array(offsets + np.arange(len(offsets), dtype=np.int32)), marked)


def _evidence(raw: bytes) -> str:
    """The beginning of a text, readable whatever it is."""
    return raw[:EVIDENCE_BYTES].decode("utf-8", errors="replace")


def _replaced(batch: pa.RecordBatch, name: str, column: pa.Array) -> pa.RecordBatch:
    return batch.set_column(batch.schema.get_field_index(name), name, column)
