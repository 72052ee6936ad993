"""What became of the stories: one summary per input range, merged into the counts of a data set.

In: the finished rows of a range. Out: `RangeSummary` files beside the staged shards, and a `DataSummary` that
the manifest, the terminal and the report share. All of it merges by adding, so no corpus is held in memory.
"""

import dataclasses
import json
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from slm_ray.shards import REJECTED, SPLITS, Shard, Split
from slm_ray.storage import Place, replace_file
from slm_ray.tokenizer import Tokenizer

Key = TypeVar("Key")

SUMMARIES = "ranges"  # folder of the summaries, beside the staged shards
N_EXAMPLES = 3  # story ids shown per reason
N_SAMPLES = 5  # stories shown in the report


@dataclass(frozen=True, kw_only=True)
class Sample:
    """A story for the report, with its token borders."""

    story_id: str
    hash: str  # hexadecimal; the lowest ones are shown
    pieces: list[str]


@dataclass(frozen=True, kw_only=True)
class RangeSummary:
    """What became of the rows of one range."""

    number: int
    read: int  # rows
    kept: int
    shards: dict[str, Shard]  # by split, and `rejected`
    reasons: dict[str, int]  # rows by reason, duplicates included
    examples: dict[str, list[str]]  # first story ids by reason
    words: dict[int, int]  # stories by their number of words
    tokens: dict[int, int]  # stories by their number of tokens, end mark included
    token_counts: list[int]  # occurrences by token id
    samples: list[Sample]


@dataclass(frozen=True, kw_only=True)
class DataSummary:
    """The sum of all ranges."""

    splits: dict[str, Split]
    rejected: Split
    read: int
    kept: int
    reasons: dict[str, int]
    examples: dict[str, list[str]]
    words: dict[int, int]
    tokens: dict[int, int]
    token_counts: npt.NDArray[np.int64]  # (vocab_size,)
    samples: list[Sample] = field(default_factory=list)

    @property
    def counts(self) -> dict[str, Any]:
        """As the manifest has them; read = kept + duplicates + the sum of rejected."""
        rejected = {name: n for name, n in sorted(self.reasons.items()) if name != "duplicate"}
        duplicates = self.reasons.get("duplicate", 0)
        return {"read": self.read, "kept": self.kept, "duplicates": duplicates, "rejected": rejected}


def summarize(number: int, table: pa.Table, written: Mapping[str, Shard], tokenizer: Tokenizer) -> RangeSummary:
    """Count the rows of one range, whose columns are those that `stories` made."""
    kept = table.filter(table["reason"].is_null())
    reasons: dict[str, list[str]] = {}
    for story_id, reason in zip(table["story_id"].to_pylist(), table["reason"].to_pylist(), strict=True):
        if reason is not None:
            reasons.setdefault(reason, []).append(story_id)
    words = pc.add(pc.count_substring_regex(kept["text"], r"\s"), 1)
    return RangeSummary(
        number=number,
        read=table.num_rows,
        kept=kept.num_rows,
        shards=dict(written),
        reasons={reason: len(ids) for reason, ids in reasons.items()},
        examples={reason: ids[:N_EXAMPLES] for reason, ids in reasons.items()},
        words=dict(Counter(words.to_pylist())),
        tokens=dict(Counter(pc.list_value_length(kept["tokens"]).to_pylist())),
        token_counts=_token_counts(kept["tokens"], tokenizer.vocab_size),
        samples=_samples(kept, tokenizer),
    )


def save_summary(folder: Place, summary: RangeSummary) -> None:
    """Write it as one JSON file, put in place by a rename: there it means that the range is finished."""
    path = folder / SUMMARIES / f"{summary.number:05d}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    replace_file(path, json.dumps(dataclasses.asdict(summary), sort_keys=True).encode("utf-8"))


def load_summaries(folder: Place) -> list[RangeSummary]:
    """All summaries below a staging folder, in order of their ranges."""
    return [_from_json(path.read_text("utf-8")) for path in sorted((folder / SUMMARIES).glob("*.json"))]


def merge(summaries: Iterable[RangeSummary]) -> DataSummary:
    """Add up the summaries of all ranges, given in order of their numbers."""
    parts = list(summaries)
    by_split = {
        name: Split.of(tuple(part.shards[name] for part in parts if name in part.shards))
        for name in (*SPLITS, REJECTED)
    }
    samples = sorted((sample for part in parts for sample in part.samples), key=lambda sample: sample.hash)
    return DataSummary(
        splits={name: by_split[name] for name in SPLITS},
        rejected=by_split[REJECTED],
        read=sum(part.read for part in parts),
        kept=sum(part.kept for part in parts),
        reasons=_added(part.reasons for part in parts),
        examples=_first_examples(parts),
        words=_added(part.words for part in parts),
        tokens=_added(part.tokens for part in parts),
        token_counts=np.sum([part.token_counts for part in parts], axis=0, dtype=np.int64),
        samples=samples[:N_SAMPLES],
    )


def check(summary: DataSummary, planned_rows: int) -> None:
    """Nothing was lost: every planned row was read, and every row read is kept, a duplicate or rejected.

    Raises:
        RuntimeError: it was, which is a fault of this program and must not become a data set.
    """
    accounted = summary.kept + sum(summary.reasons.values())
    in_shards = sum(split.rows for split in summary.splits.values())
    if not (planned_rows == summary.read == accounted and in_shards == summary.kept):
        raise RuntimeError(
            f"stories do not add up: planned {planned_rows}, read {summary.read}, "
            f"kept {summary.kept} with reasons {summary.reasons}, in shards {in_shards}"
        )


def percentile(histogram: Mapping[int, int], share: float) -> int:
    """The smallest value that at least `share` of all do not exceed: of `{3: 1, 5: 3}` at 0.5 it is 5."""
    left = share * sum(histogram.values())
    for value in sorted(histogram):
        left -= histogram[value]
        if left <= 0:
            return value
    return max(histogram, default=0)


def _token_counts(tokens: pa.ChunkedArray, vocab_size: int) -> list[int]:
    flat = tokens.combine_chunks().flatten().to_numpy()
    counts: list[int] = np.bincount(flat, minlength=vocab_size).tolist()
    return counts


def _samples(kept: pa.Table, tokenizer: Tokenizer) -> list[Sample]:
    """The training stories with the lowest hashes: a fixed choice, whatever the ranges."""
    train = kept.filter(pc.equal(kept["split"], "train")).sort_by("hash").slice(0, N_SAMPLES)
    return [
        Sample(story_id=row["story_id"], hash=row["hash"].hex(), pieces=tokenizer.pieces(row["tokens"]))
        for row in train.select(["story_id", "hash", "tokens"]).to_pylist()
    ]


def _first_examples(parts: Iterable[RangeSummary]) -> dict[str, list[str]]:
    examples: dict[str, list[str]] = {}
    for part in parts:
        for reason, ids in part.examples.items():
            examples[reason] = (examples.get(reason, []) + ids)[:N_EXAMPLES]
    return examples


def _added(counters: Iterable[Mapping[Key, int]]) -> dict[Key, int]:
    total: Counter[Key] = Counter()
    for counter in counters:
        total.update(counter)
    return dict(total)


def _from_json(text: str) -> RangeSummary:
    """JSON knows no whole numbers as keys: they come back from text."""
    fields = json.loads(text)
    fields["shards"] = {name: Shard(**shard) for name, shard in fields["shards"].items()}
    fields["samples"] = [Sample(**sample) for sample in fields["samples"]]
    for name in ("words", "tokens"):
        fields[name] = {int(value): count for value, count in fields[name].items()}
    return RangeSummary(**fields)
