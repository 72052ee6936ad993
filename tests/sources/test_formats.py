"""Formats by the names of files: found in one place, added by one entry, carried by small ranges."""

import pickle
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Self

import pytest

from slm_ray.sources import formats
from slm_ray.sources.delimited import Delimited
from slm_ray.sources.formats import ScanOptions, format_of, is_known
from slm_ray.sources.input_files import Format
from slm_ray.sources.json_lines import JsonLines
from slm_ray.sources.parquet import Parquet
from slm_ray.sources.plain_text import PlainText, SplitOptions
from slm_ray.sources.plan import plan_source
from slm_ray.sources.reading import read_ranges
from slm_ray.sources.rows import Row, RowCount, RowFormat, lines

OPTIONS = ScanOptions(text_column="story", step=10, split_options=SplitOptions(mode="pieces"))


@pytest.mark.parametrize(
    ("name", "found", "compression"),
    [
        ("a.parquet", Parquet("story"), ""),
        ("s3://shelf/b.x/A.JSONL", JsonLines("story"), ""),
        ("a.ndjson.gz", JsonLines("story"), "gzip"),
        ("a.csv.zst", Delimited("story", name="CSV", delimiter=","), "zstd"),
        ("a.tsv", Delimited("story", name="TSV", delimiter="\t"), ""),
        ("a.txt", PlainText(SplitOptions(mode="pieces")), ""),
        ("a.b.text.gz", PlainText(SplitOptions(mode="pieces")), "gzip"),
    ],
)
def test_the_name_of_a_file_says_its_format(name: str, found: Format, compression: str) -> None:
    assert is_known(name)
    assert format_of(name, OPTIONS) == (found, compression)


@pytest.mark.parametrize("name", ["a.parquet.gz", "a.gz", "a.docx", "jsonl", "a.txt.bz2"])
def test_other_names_are_unknown(name: str) -> None:
    assert not is_known(name)


@dataclass(frozen=True)
class Loud(RowFormat):
    """A line is a story, in capitals."""

    advice = "speak in short lines"

    def count(self, address: str, chunks: Iterable[bytes], step: int) -> tuple[Self, RowCount]:
        count, position = RowCount(step), 0
        for line in lines(chunks):
            count.add((position,))
            position += len(line)
        return self, count

    def rows(self, address: str, chunks: Iterable[bytes], *, at_start: bool) -> Iterator[Row]:
        return ((line.strip().upper(), None) for line in lines(chunks))


def test_a_new_format_is_one_entry(tmp_path, monkeypatch):
    monkeypatch.setitem(formats.FORMATS, ".loud", lambda options: Loud())
    (tmp_path / "a.loud").write_text("".join(f"story {number}\n" for number in range(7)))
    made = plan_source(str(tmp_path), rows_per_range=3)
    found = [batch["text"].to_pylist() for task in made.tasks for _, batch in read_ranges(task)]
    assert found == [[b"STORY 0", b"STORY 1", b"STORY 2"], [b"STORY 3", b"STORY 4", b"STORY 5"], [b"STORY 6"]]


@pytest.mark.parametrize(("name", "story"), [("a.txt", "One."), ("a.jsonl", '{"text": "One."}')])
def test_a_range_stays_small_however_many_there_are(tmp_path, name, story):
    (tmp_path / name).write_text(f"{story}\n\n" * 2000)
    ranges = plan_source(str(tmp_path / name), rows_per_range=1).ranges
    assert len(ranges) == 2000
    assert max(len(pickle.dumps(part)) for part in ranges) < 800
    assert pickle.loads(pickle.dumps(ranges)) == ranges
