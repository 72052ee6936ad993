"""Row groups, kinds of text columns, and reading on from any row."""

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from slm_ray.errors import UserError
from slm_ray.sources.plan import SourcePlan, plan_source
from slm_ray.sources.reading import read_ranges
from tests.support.source_files import read_range

TEXTS = [f"Story {row}." for row in range(100)]


def write(path: Path, texts: pa.Array | list[str], row_group_size: int = 1000) -> str:
    pq.write_table(pa.table({"n": range(len(texts)), "text": texts}), path, row_group_size=row_group_size)
    return str(path)


def task_rows(made: SourcePlan) -> list[list[int]]:
    return [[part.first_row for part in task] for task in made.tasks]


@pytest.mark.parametrize(
    ("row_group_size", "tasks"),
    [
        (100, [[0, 20, 40, 60, 80]]),
        (50, [[0, 20, 40], [60, 80]]),
        (30, [[0, 20], [40], [60, 80]]),
        (20, [[0], [20], [40], [60], [80]]),
        (3, [[0], [20], [40], [60], [80]]),
    ],
)
def test_ranges_of_one_row_group_are_one_task(tmp_path, row_group_size, tasks):
    made = plan_source(write(tmp_path / "a.parquet", TEXTS, row_group_size), rows_per_range=20)
    assert task_rows(made) == tasks
    found = [
        text.decode() for task in made.tasks for _, batch in read_ranges(task) for text in batch["text"].to_pylist()
    ]
    assert found == TEXTS
    assert [part for task in made.tasks for part in task] == list(made.ranges)


@pytest.mark.parametrize("left", [(0,), (1, 3), (2, 4), (0, 4), (0, 1, 2, 3, 4), ()])
def test_ranges_that_are_done_can_be_left_out(tmp_path, left):
    [task] = plan_source(write(tmp_path / "a.parquet", TEXTS, 100), rows_per_range=20).tasks
    wanted = tuple(task[number] for number in left)
    found = [(part.number, batch) for part, batch in read_ranges(wanted)]
    assert [number for number, _ in found] == list(left)
    assert [batch["text"].to_pylist() for _, batch in found] == [
        [text.encode() for text in TEXTS[number * 20 : number * 20 + 20]] for number in left
    ]
    assert all(batch == read_range(part) for part, (_, batch) in zip(wanted, found))


def test_batches_smaller_than_the_range_are_put_together(tmp_path, monkeypatch):
    from slm_ray.sources import parquet

    monkeypatch.setattr(parquet, "_BATCH_ROWS", 7)
    [task] = plan_source(write(tmp_path / "a.parquet", TEXTS, 100), rows_per_range=20).tasks
    found = [(part.number, len(batch), batch["text"][0].as_py()) for part, batch in read_ranges((task[1], task[4]))]
    assert found == [(1, 20, b"Story 20."), (4, 20, b"Story 80.")]


@pytest.mark.parametrize(
    "kind",
    [
        pa.string(), pa.large_string(), pa.string_view(), pa.binary(), pa.large_binary(), pa.binary_view(),
        pa.dictionary(pa.int32(), pa.string()), pa.dictionary(pa.int8(), pa.large_string()),
    ],
    ids=str,
)  # fmt: skip
def test_strings_of_any_encoding_are_text(tmp_path, kind):
    path = write(tmp_path / "a.parquet", pa.array(["One.", None, "", "One."], pa.string()).cast(kind))
    batch = read_range(plan_source(path).ranges[0])
    assert batch["text"].to_pylist() == [b"One.", None, b"", b"One."]
    assert batch["problem"].to_pylist() == [None, "not_text", None, None]


def test_a_column_of_nothing_but_nulls_is_rows_without_text(tmp_path):
    batch = read_range(plan_source(write(tmp_path / "a.parquet", pa.nulls(3))).ranges[0])
    assert batch["problem"].to_pylist() == ["not_text"] * 3


def test_two_columns_of_one_name_are_refused(tmp_path):
    table = pa.table([["a"], ["b"]], names=["text", "text"])
    pq.write_table(table, tmp_path / "a.parquet")
    with pytest.raises(UserError, match="has several columns 'text'"):
        plan_source(str(tmp_path / "a.parquet"))


def test_a_column_with_a_dot_in_its_name_is_no_field_of_another(tmp_path):
    pq.write_table(pa.table({"a": [{"b": 1}] * 100, "a.b": TEXTS}), tmp_path / "a.parquet")
    plan = plan_source(str(tmp_path / "a.parquet"), text_column="a.b")
    assert [row for part in plan.ranges for row in read_range(part)["text"].to_pylist()] == [t.encode() for t in TEXTS]
