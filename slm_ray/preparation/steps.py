"""One input range on its way from raw text to shards: a batch that gains columns and loses no row.

In: input ranges. Out: shards, and a `RangeSummary` for the manifest and the report. Each function is one step of the
pipeline; `pipelines/transforms.py` only wires them. The way has two halves, because what is kept depends on all
stories: cleaned ranges wait as files in the staging folder until duplicates and tokenizer are known. So the source is
read once, nothing large is shuffled, and a job that was killed finds its cleaned ranges again. A rejected row keeps its
place with a `reason`, so read = kept + duplicates + rejected holds by construction, and is still checked.
"""

import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from slm_ray import storage
from slm_ray.corpus.instructions import with_instruction
from slm_ray.dataset import manifest, shards
from slm_ray.dataset.manifest import REJECTED, SPLITS, Shard
from slm_ray.dataset.shards import REJECTED_SCHEMA, shard_path, shard_schema
from slm_ray.preparation.batch_cleaning import clean_texts
from slm_ray.preparation.cleaned_files import CLEANED_SCHEMA
from slm_ray.preparation.cleaning import CleaningRules, rejection_reason
from slm_ray.preparation.splits import is_sampled, splits_of_hashes, story_hash
from slm_ray.preparation.summary import summarize
from slm_ray.preparation.summary_files import save_summary
from slm_ray.sources.input_files import InputRange
from slm_ray.sources.reading import Item, read_ranges
from slm_ray.tokenization import training
from slm_ray.tokenization.tokenizer import Tokenizer, cached_tokenizer
from slm_ray.tokenization.word_cache import cut_words

EVIDENCE_BYTES = 200  # of the text of a rejected story
SAMPLE_BYTES = 1 << 26
"""Of the stories that a tokenizer is learned from: 20,000 of TinyStories are 17 MB."""
LONG_RUN_BYTES, LONG_RUN_WEIGHT = 24, 16  # without a space: of these, 4 MB are enough, which take half a gigabyte

N_UNKNOWN = 8  # characters named of a story that a tokenizer cannot write

Sampled = tuple[bytes, str, int]
"""A story that a tokenizer is learned from: hash, text, and what it counts of `SAMPLE_BYTES`."""


def read_items(task: Sequence[InputRange]) -> Iterator[Item]:
    """Ranges that are read together, each with its raw rows."""
    return read_ranges(task)


def clean_batch(item: Item, rules: CleaningRules) -> Item:
    """Raw rows to `CLEANED_SCHEMA`."""
    part, batch = item
    problem = batch["problem"].is_valid()
    has_all = not problem.true_count
    found = clean_texts(batch["text"] if has_all else batch["text"].filter(pc.invert(problem)), rules)
    texts, reasons, hashes = found.texts, found.reasons, found.hashes
    if not has_all:  # no text to clean, but a row to account for
        place = np.cumsum(~problem.to_numpy(zero_copy_only=False)) - 1
        rows = pc.if_else(problem, None, pa.array(place))  # (rows,) which text
        shown = [_evidence(raw or b"") for raw in batch["text"].filter(problem).to_pylist()]
        texts = pc.replace_with_mask(pc.coalesce(texts.take(rows), ""), problem, pa.array(shown, pa.large_string()))
        reasons, hashes = pc.coalesce(batch["problem"], reasons.take(rows)), hashes.take(rows)
    columns = [batch["story_id"], texts, reasons, hashes]
    return part, _with_evidence(pa.RecordBatch.from_arrays(columns, schema=CLEANED_SCHEMA))


def fit_batch(item: Item, tokenizer_json: str, rules: CleaningRules) -> Item:
    """Normalise the kept texts as the tokenizer would, and reject those with a character that it has no piece for.

    Of tokenizers that keep every text, nothing is changed.
    """
    part, batch = item
    tokenizer = cached_tokenizer(tokenizer_json)
    rows = zip(*(batch[name].to_pylist() for name in ("text", "reason", "hash")), strict=True)
    fitted = [row if row[1] is not None else _fit(row[0], row[2], tokenizer, rules) for row in rows]
    columns = [pa.array(column, field.type) for column, field in zip(zip(*fitted), list(CLEANED_SCHEMA)[1:])]
    if not fitted:
        return item
    return part, _with_evidence(pa.RecordBatch.from_arrays([batch["story_id"], *columns], schema=CLEANED_SCHEMA))


def _fit(text: str, digest: bytes, tokenizer: Tokenizer, rules: CleaningRules) -> tuple[str, str | None, bytes | None]:
    """Text, reason and hash of a story for a tokenizer that may not keep it."""
    fitting = tokenizer.normalised(text)
    if unknown := tokenizer.unknown(fitting):
        return f"no piece for {' '.join(unknown[:N_UNKNOWN])} in: {fitting}", "not_in_tokenizer", None
    if fitting == text:
        return text, None, digest
    reason = rejection_reason(fitting, rules)
    return fitting, reason, None if reason else story_hash(fitting)


def sample_texts(
    item: Item, share: float, fractions: tuple[float, float], instructions: bool = False
) -> tuple[int, list[Sampled]]:
    """`(0, sample)` of the training stories that the tokenizer learns from, about `share` of all.

    Chosen by hash, so the same ones on any runner; the one key brings all ranges together, for `join_samples`.
    """
    part, batch = item
    digests = enumerate(batch["hash"].to_pylist())
    chosen = [row for row, digest in digests if digest is not None and is_sampled(digest, share)]
    _, sampled = split_batch((part, batch.take(pa.array(chosen, pa.int64()))), fractions)
    train = sampled.filter(pc.equal(sampled["split"], "train"))
    if instructions:
        _, train = add_instructions((part, train))
    pairs = zip(train["hash"].to_pylist(), train["text"].to_pylist(), strict=True)
    return 0, [(digest, text, _weight(text)) for digest, text in pairs]


def _weight(text: str) -> int:
    """What learning from a text costs: its bytes, and more for long runs without a space.

    The trainer takes 110 bytes for one of each distinct word. Words of English are few and repeat; such runs do not.
    """
    n_long = sum(len(run) for run in map(str.encode, text.split(" ")) if len(run) > LONG_RUN_BYTES)
    return len(text.encode()) + (LONG_RUN_WEIGHT - 1) * n_long


def join_samples(samples: Iterable[list[Sampled]]) -> list[Sampled]:
    """One sample of several: its distinct stories in an order by their hashes, as far as `SAMPLE_BYTES` reach.

    Of any parts of a sample joined in any order the result is the same, so none has to be whole in memory.
    """
    ordered = sorted({found for sample in samples for found in sample}, key=lambda found: (found[0][8:], *found))
    reached = itertools.accumulate(weight for _, _, weight in ordered)
    return [found for found, n_bytes in zip(ordered, reached) if n_bytes <= SAMPLE_BYTES] or ordered[:1]


def train_tokenizer(group: tuple[int, list[Sampled]], vocab_size: int, model: str = "bpe") -> str:
    """`tokenizer.json` learned from the sample: each distinct story once, whatever the order of its parts."""
    texts = sorted({(digest, text) for digest, text, _ in group[1]})
    distinct = dict(reversed(texts))  # of stories equal but for case, the first in order stays
    return training.train(distinct.values(), vocab_size, model).to_json()


def save_tokenizer(tokenizer_json: str, folder: str) -> None:
    """Put `tokenizer.json` into the staging folder."""
    storage.replace_file(storage.storage_path(folder) / manifest.TOKENIZER, tokenizer_json.encode("utf-8"))


def drop_duplicates(
    item: Item, duplicates: Mapping[int, Iterable[npt.NDArray[np.int64]]], reason: str = "duplicate"
) -> Item:
    """Set the reason of the rows found to be duplicates to `reason`."""
    part, batch = item
    found = duplicates.get(part.number)
    if not found:
        return item
    is_duplicate = np.zeros(batch.num_rows, dtype=bool)
    for rows in found:
        is_duplicate[rows] = True
    batch = _replaced(batch, "reason", pc.if_else(pa.array(is_duplicate), reason, batch["reason"]))
    return part, _with_evidence(batch)


def split_batch(item: Item, fractions: tuple[float, float]) -> Item:
    """Add `split`: train, validation or test; null for rejected rows."""
    part, batch = item
    if part.file.split is not None:
        splits = pa.repeat(pa.scalar(part.file.split), batch.num_rows)
    else:
        splits = splits_of_hashes(batch["hash"], fractions)
    kept = batch["reason"].is_null()
    return part, batch.append_column("split", pc.if_else(kept, splits, pa.scalar(None, pa.string())))


def add_instructions(item: Item) -> Item:
    """Put an instruction before the text of each kept row; its hash decides which."""
    part, batch = item
    rows = zip(*(batch[name].to_pylist() for name in ("text", "hash", "reason")), strict=True)
    texts = [text if reason is not None else with_instruction(text, digest) for text, digest, reason in rows]
    return part, _replaced(batch, "text", pa.array(texts, pa.large_string()))


def tokenize_batch(item: Item, tokenizer_json: str) -> Item:
    """Add `words` (of `cut_words`), `tokens`, which end with the end-of-text token, and `n_bytes`; rejected rows have
    none."""
    part, batch = item
    tokenizer = cached_tokenizer(tokenizer_json)
    kept = batch["reason"].is_null()
    texts = batch["text"] if kept.true_count == len(kept) else pc.if_else(kept, batch["text"], "")
    words = cut_words(texts)
    tokens = _with_eos(tokenizer.encode_batch(texts, words), tokenizer.eos_id)
    n_bytes = pc.binary_length(texts).cast(pa.uint32())
    names = [*batch.schema.names, "words", "tokens", "n_bytes"]
    return part, pa.RecordBatch.from_arrays([*batch.columns, words, tokens, n_bytes], names)


def write_range(item: Item, folder: str, tokenizer_json: str) -> int:
    """Write the range's shards and evidence below `folder`; its summary, written last, marks it as finished.

    Returns the range's number alone: the summary is read from its file, not sent through a runner.
    """
    part, batch = item
    tokenizer = cached_tokenizer(tokenizer_json)
    table = pa.Table.from_batches([batch])
    written = {}
    for split in SPLITS:
        is_in = pc.equal(table["split"], split)
        if pc.any(is_in).as_py():
            written[split] = _write(folder, split, part.number, table, is_in, shard_schema(tokenizer.vocab_size))
    if table["reason"].null_count < len(table):
        written[REJECTED] = _write(folder, REJECTED, part.number, table, table["reason"].is_valid(), REJECTED_SCHEMA)
    summary = summarize(part.number, table, written, tokenizer)
    save_summary(storage.storage_path(folder), summary)
    return part.number


def _write(folder: str, split: str, number: int, table: pa.Table, is_in: pa.ChunkedArray, schema: pa.Schema) -> Shard:
    """Write those rows that are in the split."""
    rows = table.select(schema.names)
    rows = (rows if pc.all(is_in, skip_nulls=False).as_py() else rows.filter(is_in)).cast(schema)
    return shards.write_shard(storage.storage_path(folder) / shard_path(split, number), rows)


def _with_eos(lists: pa.ListArray, eos_id: int) -> pa.ListArray:
    """Append the end-of-text token to every list: `[[5, 6], []]` becomes `[[5, 6, eos_id], [eos_id]]`."""
    ids, offsets = lists.values.to_numpy(), lists.offsets.to_numpy()
    marked = np.insert(ids, offsets[1:], eos_id)
    return pa.ListArray.from_arrays(pa.array(offsets + np.arange(len(offsets), dtype=np.int32)), marked)


def _with_evidence(batch: pa.RecordBatch) -> pa.RecordBatch:
    """Of rejected rows, only the beginning of the text is kept."""
    rejected = batch["reason"].is_valid()
    if not rejected.true_count:
        return batch
    shown = [_evidence(text.encode("utf-8")) for text in batch["text"].filter(rejected).to_pylist()]
    return _replaced(batch, "text", pc.replace_with_mask(batch["text"], rejected, pa.array(shown, pa.large_string())))


def _evidence(raw: bytes) -> str:
    """The beginning of a text, readable whatever it is."""
    return raw[:EVIDENCE_BYTES].decode("utf-8", errors="replace")


def _replaced(batch: pa.RecordBatch, name: str, column: pa.Array) -> pa.RecordBatch:
    return batch.set_column(batch.schema.get_field_index(name), name, column)
