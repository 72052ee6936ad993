"""What became of the stories: one summary per input range, merged into the counts of a data set.

In: the finished rows of a range. Out: `RangeSummary` files beside the staged shards, and a `DataSummary` that
the manifest, the terminal and the report share. Everything is a counter or a few examples, and ranges are added one
at a time, so neither the corpus nor all summaries are ever held in memory.
"""

import heapq
import unicodedata
from collections import Counter
from collections.abc import Iterable, Mapping, MutableMapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from slm_ray.dataset.manifest import REJECTED, SPLITS, Shard, Split
from slm_ray.preparation import words
from slm_ray.preparation.rejections import NOT_REJECTED
from slm_ray.tokenization.tokenizer import Tokenizer

Key = TypeVar("Key")
Counts = npt.NDArray[np.int64]

N_EXAMPLES = 3  # story ids shown per reason
EVIDENCE_CHARS = 120  # of the text of an example
N_SAMPLES = 5  # stories shown in the report
SAMPLE_TOKENS = 400  # shown of each
MAX_WORDS = 1_000_000
"""Distinct words counted at once while ranges are merged; beyond, the rarest half is forgotten (about 100 MB)."""

LONGEST_WORD = 64  # characters; what is longer is no word (code, an address), and is not counted

_CODES = (*range(0x3040), *range(0xFE30, 0xFE70), *range(0xFF00, 0xFF66))
_MARKS = "".join(chr(code) for code in _CODES if unicodedata.category(chr(code))[0] in "PS")
"""Punctuation and symbols, which are not part of a word that they surround."""


@dataclass(frozen=True, kw_only=True)
class Sample:
    """A story for the report."""

    story_id: str
    hash: str  # hexadecimal; the lowest ones are shown
    tokens: list[int]  # the first `SAMPLE_TOKENS`
    n_tokens: int  # of the whole story, end-of-text token included


@dataclass(frozen=True, kw_only=True, eq=False)
class RangeSummary:
    """What became of the rows of one range."""

    number: int
    read: int  # rows
    kept: int
    shards: dict[str, Shard]  # by split, and `rejected`
    reasons: dict[str, int]  # rows by reason, duplicates included
    examples: dict[str, list[str]]  # first story ids by reason
    evidence: dict[str, str]  # beginning of the text by the id of an example
    chars: dict[int, int]  # stories by their number of characters
    words: dict[int, int]  # stories by their number of words, see `words`
    tokens: dict[int, int]  # stories by their number of tokens, end-of-text token included
    word_counts: dict[str, int]  # occurrences by word in lower case, without the marks around it
    token_counts: Counts  # (vocab_size,) occurrences by token id
    samples: list[Sample]
    notes: list[str]  # what a user should know of how it was made


@dataclass(frozen=True, kw_only=True, eq=False)
class DataSummary:
    """The sum of all ranges; fields as in `RangeSummary`."""

    splits: dict[str, Split]
    rejected: Split
    read: int
    kept: int
    reasons: dict[str, int]
    examples: dict[str, list[str]]
    evidence: dict[str, str]
    chars: dict[int, int]
    words: dict[int, int]
    tokens: dict[int, int]
    word_counts: dict[str, int]
    token_counts: Counts
    samples: list[Sample] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)  # each once

    @property
    def counts(self) -> dict[str, Any]:
        """As the manifest has them; read = kept + duplicates + the sum of rejected."""
        rejected = {name: n for name, n in sorted(self.reasons.items()) if name not in NOT_REJECTED}
        duplicates = sum(self.reasons.get(name, 0) for name in NOT_REJECTED)
        near = {"near_duplicates": n} if (n := self.reasons.get("near_duplicate")) else {}  # among the duplicates
        return {"read": self.read, "kept": self.kept, "duplicates": duplicates, "rejected": rejected, **near}


def summarize(number: int, table: pa.Table, written: Mapping[str, Shard], tokenizer: Tokenizer) -> RangeSummary:
    """Count the rows of one range, whose columns are those that `steps` made.

    Kept rows have their text in `text`, in `words` as `cut_words` cuts it, and in `tokens`; rejected rows have an
    empty list of words.
    """
    is_kept = table["reason"].is_null().to_numpy()
    rejected = table.select(["story_id", "reason", "text"]).take(np.flatnonzero(~is_kept)).to_pylist()
    examples = _examples(rejected)
    chosen = {story_id for ids in examples.values() for story_id in ids}
    tokens = table["tokens"].filter(is_kept) if rejected else table["tokens"]
    return RangeSummary(
        number=number,
        read=table.num_rows,
        kept=int(is_kept.sum()),
        shards=dict(written),
        reasons=dict(Counter(row["reason"] for row in rejected)),
        examples=examples,
        evidence={row["story_id"]: row["text"][:EVIDENCE_CHARS] for row in rejected if row["story_id"] in chosen},
        chars=_histogram(pc.utf8_length(table["text"]).to_numpy()[is_kept]),
        words=_histogram(_words_per_story(table)[is_kept]),
        tokens=_histogram(pc.list_value_length(tokens).to_numpy()),
        word_counts=_word_counts(table["words"]),
        token_counts=np.bincount(pc.list_flatten(tokens).to_numpy(), minlength=tokenizer.vocab_size),
        samples=_samples(table),
        notes=[tokenizer.fast.problem] if tokenizer.fast and tokenizer.fast.problem else [],
    )


def merge(summaries: Iterable[RangeSummary]) -> DataSummary:
    """Add up the summaries of all ranges, given in order of their numbers; each is held only while it is added."""
    shards: dict[str, list[Shard]] = {name: [] for name in (*SPLITS, REJECTED)}
    examples: dict[str, list[str]] = {}
    evidence: dict[str, str] = {}
    reasons: Counter[str] = Counter()
    word_counts: Counter[str] = Counter()
    histograms: dict[str, Counter[int]] = {"chars": Counter(), "words": Counter(), "tokens": Counter()}
    token_counts = np.zeros(0, np.int64)
    samples: list[Sample] = []
    notes: dict[str, None] = {}
    read = kept = 0
    for part in summaries:
        read, kept = read + part.read, kept + part.kept
        for name, shard in part.shards.items():
            shards[name].append(shard)
        notes |= dict.fromkeys(part.notes)
        _add_examples(part, examples, evidence)
        _add(reasons, part.reasons)
        _add_words(word_counts, part.word_counts)
        for name, histogram in histograms.items():
            _add(histogram, getattr(part, name))
        token_counts = part.token_counts + (token_counts if len(token_counts) else 0)
        samples = heapq.nsmallest(N_SAMPLES, samples + part.samples, key=lambda sample: sample.hash)
    by_split = {name: Split.of(tuple(found)) for name, found in shards.items()}
    return DataSummary(
        splits={name: by_split[name] for name in SPLITS},
        rejected=by_split[REJECTED],
        read=read,
        kept=kept,
        reasons=dict(reasons),
        examples=examples,
        evidence=evidence,
        word_counts=word_counts,
        token_counts=token_counts,
        samples=samples,
        notes=list(notes),
        **histograms,
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


def _histogram(lengths: npt.NDArray[Any]) -> dict[int, int]:
    values, counts = np.unique(lengths, return_counts=True)
    return dict(zip(values.tolist(), counts.tolist(), strict=True))


def _words_per_story(table: pa.Table) -> npt.NDArray[Any]:
    """Words are cut at spaces; where paragraphs are kept, line breaks divide words too, and `words` finds those of
    scripts without spaces."""
    lengths: npt.NDArray[Any] = pc.list_value_length(table["words"]).to_numpy()
    distinct = [chunk.values.dictionary for chunk in table["words"].chunks]
    if any(pc.any(pc.match_substring(found, "\n")).as_py() for found in distinct):
        lengths = lengths + pc.count_substring(table["text"], "\n").to_numpy()
    if not all(pc.all(pc.string_is_ascii(found), min_count=0).as_py() for found in distinct):
        lengths = lengths + np.concatenate([_more_words(chunk) for chunk in table["words"].chunks])
    return lengths


def _more_words(chunk: pa.ListArray) -> npt.NDArray[np.int64]:
    """For each text of a chunk the words that no space divides; each distinct run is looked at once."""
    runs = chunk.values
    more = np.zeros(len(runs.dictionary), np.int64)  # ASCII has none
    others = np.flatnonzero(~pc.string_is_ascii(runs.dictionary).to_numpy(zero_copy_only=False))
    more[others] = [words.n_more_words(run) for run in runs.dictionary.take(pa.array(others)).to_pylist()]
    if not more.any():  # curly quotes and accents alone
        return np.zeros(len(chunk), np.int64)
    sums = np.concatenate(([0], np.cumsum(more[runs.indices.to_numpy()])))
    found: npt.NDArray[np.int64] = np.diff(sums[chunk.offsets.to_numpy()])
    return found


def _word_counts(column: pa.ChunkedArray) -> dict[str, int]:
    """Count by index, and normalise only what is distinct: `"Tom,"` and `"tom"` are the word `tom`."""
    total: dict[str, int] = {}
    for chunk in column.chunks:
        flat = chunk.flatten()
        counts = np.bincount(flat.indices.to_numpy(), minlength=len(flat.dictionary))
        lines = pc.split_pattern(flat.dictionary, "\n")
        n_lines = pc.list_value_length(lines).to_numpy()
        runs, counts = _without_unspaced(lines.flatten(), np.repeat(counts, n_lines), total)
        distinct = pc.utf8_lower(pc.utf8_trim(runs, _MARKS + " ")).dictionary_encode()
        sums = np.bincount(distinct.indices.to_numpy(), counts).astype(np.int64)  # exact: < 2**53
        is_word = pc.less_equal(pc.utf8_length(distinct.dictionary), LONGEST_WORD).to_pylist()
        for word, count, counted in zip(distinct.dictionary.to_pylist(), sums.tolist(), is_word, strict=True):
            if counted:
                total[word] = total.get(word, 0) + count
    total.pop("", None)  # marks alone, as a dash between spaces
    return total


def _without_unspaced(runs: pa.Array, counts: Counts, total: dict[str, int]) -> tuple[pa.Array, Counts]:
    """Add the words of runs that hold several, as in Chinese, to `total`; the other runs and their counts."""
    if pc.all(pc.string_is_ascii(runs), min_count=0).as_py():
        return runs, counts
    is_one = np.ones(len(runs), bool)
    for row in np.flatnonzero(~pc.string_is_ascii(runs).to_numpy(zero_copy_only=False)):
        run = runs[row].as_py()
        if words.UNSPACED.search(run):
            is_one[row] = False
            for word, n in words.split_unspaced(run.strip()).items():
                name = word.strip(_MARKS).lower()
                if len(name) <= LONGEST_WORD:
                    total[name] = total.get(name, 0) + n * int(counts[row])
    return runs.filter(pa.array(is_one)), counts[is_one]


def _samples(table: pa.Table) -> list[Sample]:
    """The training stories with the lowest hashes: a fixed choice, whatever the ranges."""
    rows = pc.indices_nonzero(pc.equal(table["split"], "train"))
    lowest = pc.sort_indices(table["hash"].take(rows))[:N_SAMPLES]
    chosen = table.select(["story_id", "hash", "tokens"]).take(rows.take(lowest))
    return [
        Sample(
            story_id=row["story_id"],
            hash=row["hash"].hex(),
            tokens=row["tokens"][:SAMPLE_TOKENS],
            n_tokens=len(row["tokens"]),
        )
        for row in chosen.to_pylist()
    ]


def _examples(rejected: Iterable[Mapping[str, str]]) -> dict[str, list[str]]:
    examples: dict[str, list[str]] = {}
    for row in rejected:
        ids = examples.setdefault(row["reason"], [])
        if len(ids) < N_EXAMPLES:
            ids.append(row["story_id"])
    return examples


def _add_examples(part: RangeSummary, examples: dict[str, list[str]], evidence: dict[str, str]) -> None:
    for reason, ids in part.examples.items():
        shown = examples.setdefault(reason, [])
        for story_id in ids[: N_EXAMPLES - len(shown)]:
            shown.append(story_id)
            evidence[story_id] = part.evidence[story_id]


def _add(total: MutableMapping[Key, int], counts: Mapping[Key, int]) -> None:
    for key, count in counts.items():
        total[key] = total.get(key, 0) + count


def _add_words(total: Counter[str], counts: Mapping[str, int]) -> None:
    """Add, and forget the rarest words of a corpus with more than `MAX_WORDS`; ties go by the alphabet."""
    _add(total, counts)
    if len(total) > MAX_WORDS:
        kept = heapq.nsmallest(MAX_WORDS // 2, total.items(), key=lambda item: (-item[1], item[0]))
        total.clear()
        total.update(dict(kept))
