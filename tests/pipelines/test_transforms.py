"""Each step of the pipeline alone, and the pure functions that it wires."""

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from apache_beam import Create, Pipeline
from apache_beam.testing.util import assert_that, equal_to

from pipelines.report import measures
from pipelines.transforms import (
    CleanStories,
    DropDuplicates,
    FindDuplicates,
    KeepCleaned,
    LoadCleaned,
    ReadStories,
    SplitStories,
    TokenizeStories,
    TrainTokenizer,
    WriteShards,
)
from slm_ray.dataset.manifest import REJECTED
from slm_ray.errors import UserError
from slm_ray.preparation import cleaned_files, steps, summary, summary_files
from slm_ray.preparation.cleaning import CleaningRules
from slm_ray.preparation.splits import assign_split
from slm_ray.sources import reading
from slm_ray.sources.input_files import InputFile, InputRange
from slm_ray.sources.plain_text import PlainText
from slm_ray.sources.plan import plan_source
from slm_ray.sources.reading import RAW_SCHEMA
from slm_ray.tokenization.tokenizer import Tokenizer
from slm_ray.tokenization.training import train_bpe

RULES = CleaningRules(min_chars=5)
TEXTS = ["The cat sat down.", "A dog ran  home.", "the CAT sat\ndown.", "Hm."]


def make_range(number: int = 0, split: str | None = None, n_rows: int = 4) -> InputRange:
    file = InputFile(format=PlainText(), name="a", path="a", split=split)
    return InputRange(number=number, file=file, first_row=0, n_rows=n_rows)


def raw_item(texts: list[str], number: int = 0, split: str | None = None) -> reading.Item:
    rows = [[f"a{number}#{row}" for row in range(len(texts))], [text.encode() for text in texts], [None] * len(texts)]
    columns = [pa.array(column, field.type) for column, field in zip(rows, RAW_SCHEMA)]
    return make_range(number, split, len(texts)), pa.RecordBatch.from_arrays(columns, schema=RAW_SCHEMA)


def clean_item(texts: list[str], number: int = 0, split: str | None = None) -> reading.Item:
    return steps.clean_batch(raw_item(texts, number, split), RULES)


@pytest.fixture(scope="module")
def tokenizer_json() -> str:
    return train_bpe(TEXTS, 300).to_json()


def column(item: reading.Item, name: str) -> list[object]:
    values: list[object] = item[1][name].to_pylist()
    return values


def run(transform, inputs, expected, view):
    """Apply a transform in memory and compare what `view` shows of its results."""
    with Pipeline(runner="FnApiRunner") as pipeline:
        results = pipeline | Create(inputs) | transform
        assert_that(results, lambda found: equal_to(expected)([view(item) for item in found]))


def test_read_stories():
    made = plan_source("sample", max_stories=3, rows_per_range=2)
    ids = [["sample#0", "sample#1"], ["sample#2"]]
    run(ReadStories(), list(made.tasks), ids, lambda item: column(item, "story_id"))


def test_clean_stories():
    expected = [
        ("The cat sat down.", None),
        ("A dog ran home.", None),
        ("the CAT sat down.", None),
        ("Hm.", "too_short"),
    ]
    run(
        CleanStories(RULES),
        [raw_item(TEXTS)],
        [expected],
        lambda item: list(zip(column(item, "text"), column(item, "reason"))),
    )


def test_what_is_kept_in_files_comes_back(tmp_path):
    item = clean_item(TEXTS)
    run(KeepCleaned(str(tmp_path)), [item], [0], lambda part: part.number)
    shown = lambda found: found[1].to_pylist()  # noqa: E731
    run(LoadCleaned(str(tmp_path)), [item[0]], [item[1].to_pylist()], shown)


def test_a_cleaned_range_that_is_torn_is_named(tmp_path):
    part = cleaned_files.keep_cleaned(clean_item(TEXTS), str(tmp_path))
    path = cleaned_files.cleaned_path(tmp_path, 0)
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(UserError, match=r"cleaned/00000.arrow is damaged .* run again"):
        cleaned_files.load_cleaned(part, str(tmp_path))


def test_find_duplicates_across_ranges_keeps_the_lowest():
    items = [clean_item(TEXTS, number=1), clean_item(["a DOG ran home.", "Something new."], number=0)]
    run(
        FindDuplicates(),
        items,
        [(1, [1, 2])],
        lambda found: (found[0], sorted(np.concatenate(list(found[1])).tolist())),
    )


def test_the_copy_in_a_validation_source_is_the_one_that_stays():
    items = [clean_item(TEXTS[:1], number=0), clean_item(TEXTS[:1], number=7, split="validation")]
    run(FindDuplicates(), items, [(0, [0])], lambda found: (found[0], np.concatenate(list(found[1])).tolist()))


def test_drop_duplicates():
    with Pipeline(runner="FnApiRunner") as pipeline:
        duplicates = pipeline | "Found" >> Create([(0, [np.array([2]), np.array([1])]), (5, [np.array([0])])])
        results = pipeline | Create([clean_item(TEXTS)]) | DropDuplicates(duplicates)
        reasons = [[None, "duplicate", "duplicate", "too_short"]]
        assert_that(results, lambda found: equal_to(reasons)([column(item, "reason") for item in found]))


def test_split_stories():
    fractions = (0.3, 0.3)
    expected = [[*(assign_split(text, fractions) for text in TEXTS[:3]), None]]
    run(SplitStories(fractions), [clean_item(TEXTS)], expected, lambda item: column(item, "split"))


def test_a_range_of_a_validation_source_is_all_validation():
    item = clean_item(TEXTS, split="validation")
    run(SplitStories((0.0, 0.5)), [item], [["validation"] * 3 + [None]], lambda found: column(found, "split"))


def test_train_tokenizer_does_not_depend_on_ranges():
    expected = [Tokenizer.from_json(steps.train_tokenizer((0, sample(clean_item(TEXTS))), 300)).sha256]
    split_up = [clean_item(TEXTS[2:], number=1), clean_item(TEXTS[:2])]
    transform = TrainTokenizer(300, share=1.0, fractions=(0.0, 0.0))
    run(transform, split_up, expected, lambda text: Tokenizer.from_json(text).sha256)


def sample(item: reading.Item) -> list[tuple[bytes, str]]:
    return steps.sample_texts(item, 1.0, (0.0, 0.0))[1]


def test_the_tokenizer_learns_from_training_stories_only():
    item = clean_item([f"Story number {number} of many." for number in range(200)])
    texts = {text for _, text, _ in steps.sample_texts(item, 1.0, (0.3, 0.3))[1]}
    assert texts == {text for text in column(item, "text") if assign_split(str(text), (0.3, 0.3)) == "train"}
    assert len(steps.sample_texts(item, 0.25, (0.0, 0.0))[1]) == pytest.approx(50, abs=25)


def test_tokenize_stories(tokenizer_json):
    tokenizer = Tokenizer.from_json(tokenizer_json)
    item = steps.split_batch(clean_item(TEXTS), (0.0, 0.0))
    ids = [[*tokenizer.encode(text), 0] for text in ("The cat sat down.", "A dog ran home.", "the CAT sat down.")]
    with Pipeline(runner="FnApiRunner") as pipeline:
        learned = pipeline | "Tokenizer" >> Create([tokenizer_json])
        results = pipeline | Create([item]) | TokenizeStories(learned)
        assert_that(results, lambda found: equal_to([[*ids, [0]]])([column(part, "tokens") for part in found]))
    assert column(steps.tokenize_batch(item, tokenizer_json), "n_bytes") == [17, 15, 17, 0]


def test_write_shards(tokenizer_json, tmp_path):
    item = steps.split_batch(clean_item(TEXTS, number=3), (0.0, 0.0))
    item = steps.tokenize_batch(item, tokenizer_json)
    with Pipeline(runner="FnApiRunner") as pipeline:
        learned = pipeline | "Tokenizer" >> Create([tokenizer_json])
        results = pipeline | Create([item]) | WriteShards(str(tmp_path), learned)
        assert_that(results, equal_to([3]))
    [found] = summary_files.load_summaries(tmp_path)
    assert (found.number, found.read, found.kept) == (3, 4, 3)
    assert found.shards.keys() == {"train", REJECTED}
    assert found.reasons == {"too_short": 1}
    assert found.examples == {"too_short": ["a3#3"]}
    assert found.words == {4: 3}
    assert sum(found.token_counts) == found.shards["train"].tokens == sum(n * c for n, c in found.tokens.items())
    assert pq.read_table(tmp_path / "rejected/00003.parquet").to_pylist() == [
        {"story_id": "a3#3", "reason": "too_short", "text": "Hm."}
    ]


def test_long_evidence_is_cut_even_inside_a_character():
    item = steps.clean_batch(raw_item(["é" * 300 + "\x00"]), RULES)
    assert column(item, "reason") == ["control_characters"]
    assert column(item, "text") == ["é" * (steps.EVIDENCE_BYTES // 2)]


def test_a_percentile_is_a_value_that_occurs():
    assert [measures.percentile({3: 1, 5: 3}, share) for share in (0.1, 0.25, 0.5, 1.0)] == [3, 3, 5, 5]
    assert measures.percentile({}, 0.5) == 0


def test_a_lost_story_is_noticed(tokenizer_json, tmp_path):
    item = steps.tokenize_batch(steps.split_batch(clean_item(TEXTS), (0.0, 0.0)), tokenizer_json)
    steps.write_range(item, str(tmp_path), tokenizer_json)
    found = summary.merge(summary_files.load_summaries(tmp_path))
    summary.check(found, 4)
    with pytest.raises(RuntimeError, match="stories do not add up: planned 5, read 4"):
        summary.check(found, 5)
