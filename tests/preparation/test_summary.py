"""The counters of a range and their sum: right, bounded, and written so that a torn file counts for nothing."""

import re
import weakref
from collections import Counter

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from slm_ray.dataset.manifest import Shard
from slm_ray.preparation import summary, summary_files, words
from slm_ray.preparation.splits import story_hash
from slm_ray.tokenization.tokenizer import Tokenizer

TEXTS = ['"Hi," said Tom.', "Tom ran.\nTom - and Ann - ran home!", "ANN slept.", "Hm.", "Hi there."]
REASONS = [None, None, None, "too_short", "near_duplicate"]


def make_table(texts: list[str], reasons: list[str | None], tokenizer: Tokenizer, name: str = "a") -> pa.Table:
    """The columns of a finished range."""
    kept = [reason is None for reason in reasons]
    words = [text.split(" ") if keep else [] for text, keep in zip(texts, kept)]
    tokens = [[*(tokenizer.encode(text) if keep else ()), 0] for text, keep in zip(texts, kept)]
    offsets = np.cumsum([0, *map(len, words)]).astype(np.int32)
    distinct = pa.array([word for row in words for word in row], pa.string()).dictionary_encode()
    return pa.table(
        {
            "story_id": [f"{name}#{row}" for row in range(len(texts))],
            "text": pa.array(texts, pa.string()),
            "reason": pa.array(reasons, pa.string()),
            "hash": pa.array([story_hash(text) if keep else None for text, keep in zip(texts, kept)], pa.binary(16)),
            "split": pa.array(["train" if keep else None for keep in kept], pa.string()),
            "words": pa.ListArray.from_arrays(offsets, distinct),
            "tokens": pa.array(tokens, pa.list_(pa.uint16())),
        }
    )


def shard(number: int, rows: int) -> dict[str, Shard]:
    return {"train": Shard(file=f"train/{number:05d}.parquet", rows=rows, tokens=0, bytes=0, sha256="")}


def summarize(number: int, tokenizer: Tokenizer, texts: list[str], reasons: list[str | None]) -> summary.RangeSummary:
    table = make_table(texts, reasons, tokenizer, name=f"r{number}")
    return summary.summarize(number, table, shard(number, reasons.count(None)), tokenizer)


def test_a_range_is_counted(tiny_tokenizer):
    found = summarize(3, tiny_tokenizer, TEXTS, REASONS)
    lengths = [len(tiny_tokenizer.encode(text)) + 1 for text in TEXTS[:3]]
    assert (found.number, found.read, found.kept) == (3, 5, 3)
    assert found.reasons == {"too_short": 1, "near_duplicate": 1}
    assert found.examples == {"too_short": ["r3#3"], "near_duplicate": ["r3#4"]}
    assert found.evidence == {"r3#3": "Hm.", "r3#4": "Hi there."}
    assert found.chars == Counter(map(len, TEXTS[:3]))
    assert found.words == {3: 1, 9: 1, 2: 1}
    assert found.tokens == Counter(lengths)
    assert found.word_counts == {"hi": 1, "said": 1, "tom": 3, "ran": 2, "and": 1, "ann": 2, "home": 1, "slept": 1}
    assert len(found.token_counts) == tiny_tokenizer.vocab_size
    assert (found.token_counts[0], found.token_counts.sum()) == (3, sum(lengths))


def test_why_encoding_was_slow_is_told_once(tiny_tokenizer, monkeypatch):
    fresh = Tokenizer.from_json(tiny_tokenizer.to_json())
    assert fresh.fast is not None
    monkeypatch.setattr(fresh.fast, "problem", "gigatoken 9 gives other ids")
    parts = [
        summarize(number, tokenizer, TEXTS, REASONS) for number, tokenizer in enumerate((fresh, tiny_tokenizer, fresh))
    ]
    assert summary.merge(parts).notes == ["gigatoken 9 gives other ids"]


def test_samples_are_the_training_stories_with_the_lowest_hashes(tiny_tokenizer):
    texts = [f"The story of mouse number {number}." for number in range(40)]
    found = summarize(0, tiny_tokenizer, texts, [None] * 40)
    lowest = sorted(texts, key=story_hash)[: summary.N_SAMPLES]
    assert [sample.story_id for sample in found.samples] == [f"r0#{texts.index(text)}" for text in lowest]
    assert [tiny_tokenizer.decode(sample.tokens) for sample in found.samples] == lowest


def test_a_range_without_a_kept_story_is_counted_too(tiny_tokenizer):
    found = summarize(0, tiny_tokenizer, ["Hm.", ""], ["too_short", "empty"])
    assert (found.kept, found.chars, found.word_counts, found.samples) == (0, {}, {}, [])
    assert found.token_counts.sum() == 0


def bare(word: str) -> str:
    return word.strip(summary._MARKS)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.lists(st.text(st.sampled_from("aBé'.,“”-д١\n"), min_size=1), min_size=1), min_size=1, max_size=6))
def test_words_are_those_of_a_plain_count(tiny_tokenizer, stories):
    texts = [re.sub("\n+", "\n", " ".join(words)) for words in stories]
    found = summarize(0, tiny_tokenizer, texts, [None] * len(texts))
    expected = Counter(bare(word).lower() for text in texts for word in re.split("[ \n]", text) if bare(word))
    assert found.word_counts == expected
    assert found.words == Counter(len(re.split("[ \n]", text)) for text in texts)


def test_each_character_of_a_script_without_spaces_is_a_word(tiny_tokenizer):
    texts = ["小猫，Tom笑。 Ann", "「小猫」 แมว\n犬", "x" * 65]
    found = summarize(0, tiny_tokenizer, texts, [None] * 3)
    assert found.word_counts == {"小": 2, "猫": 2, "tom": 1, "笑": 1, "ann": 1, "แ": 1, "ม": 1, "ว": 1, "犬": 1}
    assert found.words == Counter(map(words.count_words, texts)) == {5: 1, 6: 1, 1: 1}


def test_ranges_add_up_to_the_whole(tiny_tokenizer):
    texts = [f"Mouse {number} met mouse {number % 7}." for number in range(30)]
    reasons = [None if number % 5 else "duplicate" for number in range(30)]
    whole = summary.merge([summarize(0, tiny_tokenizer, texts, reasons)])
    cuts = [(0, 4), (4, 17), (17, 30)]
    parts = summary.merge(summarize(n, tiny_tokenizer, texts[a:b], reasons[a:b]) for n, (a, b) in enumerate(cuts))
    for name in ("read", "kept", "reasons", "chars", "words", "tokens", "word_counts"):
        assert getattr(parts, name) == getattr(whole, name), name
    assert parts.token_counts.tolist() == whole.token_counts.tolist()
    assert [sample.tokens for sample in parts.samples] == [sample.tokens for sample in whole.samples]
    assert parts.examples == {"duplicate": ["r0#0", "r1#1", "r1#6"]}  # the first ones, whatever the ranges
    assert list(parts.evidence) == parts.examples["duplicate"]
    assert [part.file for part in parts.splits["train"].shards] == [f"train/{n:05d}.parquet" for n in range(3)]
    assert whole.counts == {"read": 30, "kept": 24, "duplicates": 6, "rejected": {}}


def test_merging_holds_one_summary_at_a_time(tiny_tokenizer):
    alive: list[weakref.ref[summary.RangeSummary]] = []

    def parts():
        for number in range(6):
            assert sum(part() is not None for part in alive) <= 1
            part = summarize(number, tiny_tokenizer, TEXTS, REASONS)
            alive.append(weakref.ref(part))
            yield part
            del part

    assert summary.merge(parts()).read == 30


def test_nothing_merges_to_nothing():
    assert summary.merge([]).counts == {"read": 0, "kept": 0, "duplicates": 0, "rejected": {}}


def test_the_rarest_words_of_a_huge_vocabulary_are_forgotten(tiny_tokenizer, monkeypatch):
    monkeypatch.setattr(summary, "MAX_WORDS", 4)
    texts = ["a a a b b c", "d d e e a z"]
    found = summary.merge(summarize(n, tiny_tokenizer, [text], [None]) for n, text in enumerate(texts))
    assert found.word_counts == {"a": 4, "b": 2}


def test_a_summary_comes_back_as_it_was(tiny_tokenizer, tmp_path):
    made = summarize(3, tiny_tokenizer, [*TEXTS[:4], "“Ünïcode” 日本 \x1b <b>"], REASONS)
    summary_files.save_summary(tmp_path, made)
    [path] = (tmp_path / summary_files.SUMMARIES).iterdir()
    read = summary_files.load_summary(path)
    assert read is not None
    assert {**vars(read), "token_counts": None} == {**vars(made), "token_counts": None}
    assert read.token_counts.tolist() == made.token_counts.tolist()


@pytest.mark.parametrize("harm", [
    lambda content: b"", lambda content: content[: len(content) // 2], lambda content: b"\x00" * len(content),
    lambda content: b"[]", lambda content: b'{"number": 3}', lambda content: content.replace(b"range summary", b"x"),
    lambda content: content.replace(b'"number": 3', b'"number": 4'),
    lambda content: content.replace(b'"token_counts": "', b'"token_counts": "!!'),
    lambda content: content.replace(b'"kept"', b'"held"'),
])  # fmt: skip
def test_a_torn_or_foreign_file_is_no_summary(tiny_tokenizer, tmp_path, harm):
    summary_files.save_summary(tmp_path, summarize(3, tiny_tokenizer, TEXTS, REASONS))
    path = tmp_path / summary_files.SUMMARIES / "00003.json"
    assert summary_files.load_summary(path) is not None
    path.write_bytes(harm(path.read_bytes()))
    assert summary_files.load_summary(path) is None
    assert list(summary_files.load_summaries(tmp_path)) == []


def test_an_absent_file_is_no_summary(tmp_path):
    assert summary_files.load_summary(tmp_path / "00000.json") is None


def test_summaries_come_in_order_of_their_ranges(tiny_tokenizer, tmp_path):
    for number in (100000, 2, 99999):
        summary_files.save_summary(tmp_path, summarize(number, tiny_tokenizer, TEXTS, REASONS))
    (tmp_path / summary_files.SUMMARIES / "notes.json").write_text("{}")
    assert [found.number for found in summary_files.load_summaries(tmp_path)] == [2, 99999, 100000]
