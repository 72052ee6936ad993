"""What a source means: files found, rows counted, ranges cut, rows read back with stable ids."""

import gzip
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from slm_ray.errors import UserError
from slm_ray.sources import discovery
from slm_ray.sources.plan import SourcePlan, plan_source
from slm_ray.sources.reading import read_ranges
from tests.support.paths import ROOT
from tests.support.source_files import STORIES, read_range, write_jsonl, write_parquet

PLAIN = [f"Story number {number}." for number in range(10)]


def read_all(made: SourcePlan) -> dict[str, bytes | None]:
    rows: dict[str, bytes | None] = {}
    for task in made.tasks:
        for _, batch in read_ranges(task):
            rows.update(zip(batch["story_id"].to_pylist(), batch["text"].to_pylist()))
    return rows


def texts_of(made: SourcePlan) -> list[str]:
    return [text.decode() for text in read_all(made).values()]


@pytest.mark.parametrize("step", [1, 3, 4, 10, 100])
def test_every_format_gives_every_story_once_whatever_the_ranges(tmp_path, step):
    parquet = write_parquet(tmp_path / "a.parquet", STORIES)
    jsonl = write_jsonl(tmp_path / "a.jsonl", [json.dumps({"text": text}).encode() for text in STORIES])
    marked, blank = tmp_path / "a.txt", tmp_path / "b.txt"
    marked.write_text("\n<|endoftext|>\n".join(STORIES))
    blank.write_text("\n\n \n".join(PLAIN) + "\n\n")
    for path, texts in [(parquet, STORIES), (jsonl, STORIES), (marked, STORIES), (blank, PLAIN)]:
        made = plan_source(str(path), rows_per_range=step)
        assert [text.strip() for text in texts_of(made)] == texts
        assert list(read_all(made)) == [f"{path.name}#{row}" for row in range(10)]
        assert [part.number for part in made.ranges] == list(range(-(-10 // step)))


def test_the_first_stories_are_taken_across_files(tmp_path):
    write_parquet(tmp_path / "a.parquet", STORIES)
    write_parquet(tmp_path / "b.parquet", STORIES)
    made = plan_source(str(tmp_path), max_stories=13, rows_per_range=4)
    assert [(part.file.name, part.n_rows) for part in made.ranges] == [
        ("a.parquet", 4), ("a.parquet", 4), ("a.parquet", 2), ("b.parquet", 3),
    ]  # fmt: skip
    assert made.n_rows == len(read_all(made)) == 13


def test_files_with_one_base_name_keep_their_stories_apart(tmp_path):
    for folder in ("x", "y"):
        write_parquet(tmp_path / folder / "train.parquet", [folder])
    assert read_all(plan_source(str(tmp_path))) == {"x/train.parquet#0": b"x", "y/train.parquet#0": b"y"}
    assert read_all(plan_source(str(tmp_path / "*" / "*.parquet"))) == read_all(plan_source(str(tmp_path)))


def test_a_validation_source_of_the_same_name_keeps_its_stories_apart(tmp_path):
    main = write_parquet(tmp_path / "x" / "data.parquet", ["train"])
    other = write_parquet(tmp_path / "y" / "data.parquet", ["val"])
    made = plan_source(str(main), validation_source=str(other))
    assert read_all(made) == {"data.parquet#0": b"train", "validation/data.parquet#0": b"val"}
    assert [part.file.split for part in made.ranges] == [None, "validation"]
    assert made.has_own_validation


def test_links_keep_their_names_and_files_named_twice_count_once(tmp_path):
    blob = write_parquet(tmp_path / "blobs" / "a.parquet", ["One."]).rename(tmp_path / "blobs" / "0a1b2c")
    (tmp_path / "snapshot").mkdir()
    (tmp_path / "snapshot" / "train.parquet").symlink_to(blob)
    assert read_all(plan_source(str(tmp_path / "snapshot"))) == {"train.parquet#0": b"One."}
    assert read_all(plan_source(str(tmp_path / "snapshot" / ".." / "snapshot" / "t*"))) == {"train.parquet#0": b"One."}


def test_a_validation_source_without_stories_is_refused(tmp_path):
    empty = tmp_path / "empty.parquet"
    pq.write_table(pa.table({"text": pa.array([], pa.string())}), empty)
    with pytest.raises(UserError, match=r"no stories in .*empty.parquet"):
        plan_source("sample", validation_source=str(empty))


def test_the_digest_follows_content_and_not_place(tmp_path):
    first = write_parquet(tmp_path / "x" / "a.parquet", STORIES)
    second = write_parquet(tmp_path / "y" / "a.parquet", STORIES)
    other = write_parquet(tmp_path / "z" / "a.parquet", STORIES[::-1])
    described = [plan_source(str(path)).source for path in (first, second, other)]
    assert described[0] == described[1]
    assert described[0]["digest"] != described[2]["digest"]
    assert described[0]["digest"] != plan_source(str(first), max_stories=3).source["digest"]
    assert str(tmp_path) not in json.dumps(described)


def test_rows_that_are_no_text_are_kept_with_a_problem(tmp_path):
    lines = [b'{"text": "good"}', b"nonsense", b"[1]", b'{"text": 3}', b'{"text": "\\ud800"}', b"", b'"\xff"']
    made = plan_source(str(write_jsonl(tmp_path / "a.jsonl", lines)))
    batch = read_range(made.ranges[0])
    problems = [None, "bad_json", "not_text", "not_text", "invalid_utf8", "invalid_utf8"]
    assert batch["problem"].to_pylist() == problems
    assert batch["text"].to_pylist()[1:4] == lines[1:4]


def test_null_and_undecodable_parquet_rows_are_rows(tmp_path):
    column = pa.array([b"ok", None, b"\xff"], pa.binary()).view(pa.string())
    pq.write_table(pa.table({"text": column}), tmp_path / "a.parquet")
    batch = read_range(plan_source(str(tmp_path / "a.parquet")).ranges[0])
    assert batch["text"].to_pylist() == [b"ok", None, b"\xff"]
    assert batch["problem"].to_pylist() == [None, "not_text", None]


def test_text_that_may_be_cut_in_two_ways_is_one_clear_line(tmp_path):
    (tmp_path / "a.txt").write_text("\n\n".join(["One."] * 30 + ["A literal <|endoftext|> in a story."]))
    with pytest.raises(
        UserError, match=r"a\.txt: it has 1 times .* give --cut-text end-mark or --cut-text blank-lines"
    ):
        plan_source(str(tmp_path / "a.txt"))


def test_an_empty_story_between_two_end_marks_is_a_row(tmp_path):
    (tmp_path / "a.txt").write_text("<|endoftext|>One.<|endoftext|>\n<|endoftext|>Two.<|endoftext|>\n")
    assert [text.strip() for text in texts_of(plan_source(str(tmp_path / "a.txt")))] == ["One.", "", "Two."]


def test_windows_line_ends_part_stories(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"One.\r\nMore.\r\n\r\nTwo.\r\n")
    assert [text.split() for text in texts_of(plan_source(str(tmp_path / "a.txt")))] == [["One.", "More."], ["Two."]]


def test_another_column_can_be_named(tmp_path):
    pq.write_table(pa.table({"story": ["One."]}), tmp_path / "a.parquet")
    assert texts_of(plan_source(str(tmp_path / "a.parquet"), text_column="story")) == ["One."]


def test_the_sample_corpus_is_a_source():
    made = plan_source("sample", max_stories=5, rows_per_range=2)
    rows = read_all(made)
    assert list(rows) == [f"sample#{row}" for row in range(5)]
    assert len(set(rows.values())) == 5
    assert rows != read_all(plan_source("sample", max_stories=5, seed=1))
    assert plan_source("sample").n_rows == discovery.SAMPLE_STORIES


def test_several_sources_are_one_input_each_file_once(tmp_path):
    first = write_parquet(tmp_path / "x" / "a.parquet", ["One."])
    (tmp_path / "y").mkdir()
    second = write_jsonl(tmp_path / "y" / "a.jsonl", [b'{"text": "Two."}'])
    expected = {"x/a.parquet#0": b"One.", "y/a.jsonl#0": b"Two."}
    assert read_all(plan_source([str(first), str(second)])) == expected
    assert (
        read_all(plan_source([str(second), str(tmp_path / "x"), str(tmp_path / "*" / "a.*"), str(first)])) == expected
    )
    other = plan_source("sample", max_stories=3, validation_source=[str(first), str(second)])
    assert [part.file.split for part in other.ranges] == [None, "validation", "validation"]


@pytest.mark.parametrize("special", ["auto", "sample", "hub:a/b"])
def test_a_special_source_stands_alone(tmp_path, special):
    path = write_parquet(tmp_path / "a.parquet", ["One."])
    with pytest.raises(
        UserError, match=rf"{special} is a source by itself: name it alone, or files, folders and globs"
    ):
        plan_source([str(path), special])


def test_what_can_be_read_alone_is_a_task_alone(tmp_path):
    jsonl = write_jsonl(tmp_path / "a.jsonl", [json.dumps({"text": text}).encode() for text in STORIES])
    (tmp_path / "a.txt").write_text("<|endoftext|>".join(STORIES))
    for source in (str(jsonl), str(tmp_path / "a.txt"), "sample"):
        made = plan_source(source, rows_per_range=3, max_stories=10)
        assert made.tasks == tuple((part,) for part in made.ranges)
        assert len(made.tasks) == 4
    (tmp_path / "a.csv").write_text("text\n" + "\n".join(PLAIN))
    both = plan_source([str(jsonl), str(tmp_path / "a.csv")], rows_per_range=4)
    assert [[part.number for part in task] for task in both.tasks] == [[0, 1, 2], [3], [4], [5]]


def test_text_is_cut_as_asked_and_the_digest_says_so(tmp_path):
    (tmp_path / "a.txt").write_text("One story.\n\nMore of it.<|endoftext|>Two.")
    plans = [
        plan_source(str(tmp_path / "a.txt"), cut_text=mode) for mode in ("auto", "end-mark", "blank-lines", "pieces")
    ]
    assert [len(texts_of(made)) for made in plans] == [2, 2, 2, 1]
    assert [made.source["files"][0]["cut"] for made in plans] == [
        "end-mark", "end-mark", "blank-lines", "pieces of 2000 characters",
    ]  # fmt: skip
    assert len({made.source["digest"] for made in plans}) == 3
    other = plan_source(str(tmp_path / "a.txt"), cut_text="pieces", piece_chars=60)
    assert other.source["digest"] != plans[3].source["digest"]


def test_pieces_of_a_file_are_the_same_in_any_ranges(tmp_path):
    (tmp_path / "a.txt").write_text("".join(f"This is sentence {number} of many. " for number in range(400)))
    found = [
        texts_of(plan_source(str(tmp_path / "a.txt"), cut_text="pieces", piece_chars=200, rows_per_range=n))
        for n in (1, 7)
    ]
    assert found[0] == found[1]
    assert "".join(found[0]) == (tmp_path / "a.txt").read_text()


def test_an_input_that_shrinks_after_planning_is_found(tmp_path):
    path = write_parquet(tmp_path / "a.parquet", STORIES)
    [part] = plan_source(str(path)).ranges
    for left in (4, 0):
        write_parquet(path, STORIES[:left]) if left else pq.write_table(pa.table({"text": pa.array([], "str")}), path)
        with pytest.raises(UserError, match=rf"changed while it was prepared: expected 10 stories .* found {left}"):
            read_range(replace(part, file=replace(part.file, stamp="")))  # of a place that keeps no times


@pytest.mark.parametrize("name", ["a.parquet", "a.jsonl", "a.csv", "a.jsonl.gz"])
def test_an_input_with_as_many_other_rows_is_found(tmp_path, name):
    path = tmp_path / name
    write_any(path, STORIES)
    [part] = plan_source(str(path)).ranges
    write_any(path, [text.replace("Story", "Lines") for text in STORIES])
    os.utime(path, ns=(0, 1))  # a clock may be coarse
    with pytest.raises(UserError, match=r"changed while it was prepared \(was .* is .*run again"):
        read_range(part)


def test_an_input_altered_while_a_task_is_read_is_found(tmp_path):
    path = write_parquet(tmp_path / "a.parquet", STORIES, row_group_size=10)
    [task] = plan_source(str(path), rows_per_range=5).tasks
    reading = read_ranges(task)
    next(reading)
    os.utime(path, ns=(0, 1))
    with pytest.raises(UserError, match="changed while it was prepared"):
        next(reading)


def write_any(path: Path, texts: list[str]) -> None:
    lines = [json.dumps({"text": text}).encode() for text in texts]
    if path.suffix == ".parquet":
        write_parquet(path, texts)
    elif path.suffix == ".csv":
        path.write_text("text\n" + "".join(f'"{text}"\n' for text in texts))
    else:
        write_jsonl(path, lines)
        if path.suffix == ".gz":
            path.write_bytes(gzip.compress(path.read_bytes()))


def test_a_large_file_takes_little_memory(tmp_path):
    with gzip.open(tmp_path / "large.jsonl.gz", "wb", compresslevel=1) as file:
        for number in range(100):
            file.write((json.dumps({"text": f"{number} " + "some words " * 100}) + "\n").encode() * 1500)
    code = """
import resource, sys
from slm_ray.sources.plan import plan_source
from slm_ray.sources.reading import read_ranges
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
rows = sum(len(batch) for task in plan_source(sys.argv[1]).tasks for _, batch in read_ranges(task))
print(rows, (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024)
"""
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "large.jsonl.gz")], cwd=ROOT, capture_output=True, check=True
    )
    rows, megabytes = map(int, done.stdout.split())
    assert rows == 150_000  # 170 MB of text
    assert megabytes < 140


def test_ids_stay_apart_however_files_are_called(tmp_path):
    for name in ("a/t.jsonl", "a/validation/t.jsonl", "b/t.jsonl"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        write_jsonl(tmp_path / name, [json.dumps({"text": name}).encode()])
    made = plan_source(str(tmp_path / "a"), validation_source=str(tmp_path / "b"))
    assert read_all(made) == {
        "t.jsonl#0": b"a/t.jsonl",
        "validation/t.jsonl#0": b"a/validation/t.jsonl",
        "validation/validation/t.jsonl#0": b"b/t.jsonl",
    }
