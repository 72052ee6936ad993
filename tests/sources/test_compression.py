"""Compressed files: the same stories, read once, and damage found while planning."""

import gzip
import json
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pytest

from slm_ray.errors import UserError
from slm_ray.sources.plan import SourcePlan, plan_source
from slm_ray.sources.reading import read_ranges

TEXTS = [f'Story "{number}",\nwith two lines.' for number in range(50)]
LINES = [text.replace("\n", " ") for text in TEXTS]  # TSV has no field over several lines
BLANK = [f"Story {number}.\nIt ends." for number in range(50)]


def zstd(content: bytes) -> bytes:
    sink = pa.BufferOutputStream()
    with pa.CompressedOutputStream(sink, "zstd") as stream:
        stream.write(content)
    return sink.getvalue().to_pybytes()


PACKERS: dict[str, Callable[[bytes], bytes]] = {".gz": gzip.compress, ".zst": zstd}
EXPECTED = {"blank.txt": BLANK, "a.tsv": LINES}
QUOTED = ['"' + text.replace('"', '""') + '"' for text in TEXTS]
CONTENTS = {
    "a.jsonl": "".join(json.dumps({"text": text}) + "\n" for text in TEXTS).encode(),
    "a.csv": "\r\n".join(["id,text", *(f"{row},{text}" for row, text in enumerate(QUOTED))]).encode(),
    "a.tsv": "\n".join(
        ["text\tid", *(f"{text}\t{row}".replace("\n", " ") for row, text in enumerate(QUOTED)), ""]
    ).encode(),
    "marks.txt": "<|endoftext|>".join(TEXTS).encode(),
    "blank.txt": "\n\n".join(BLANK).encode(),
}


def stories(made: SourcePlan) -> list[str]:
    return [
        text.decode() for task in made.tasks for _, batch in read_ranges(task) for text in batch["text"].to_pylist()
    ]


def write(path: Path, content: bytes) -> Path:
    path.write_bytes(content)
    return path


@pytest.mark.parametrize("end", PACKERS)
@pytest.mark.parametrize("name", CONTENTS)
def test_a_compressed_file_holds_the_same_stories(tmp_path, name, end):
    plain = plan_source(str(write(tmp_path / name, CONTENTS[name])), rows_per_range=8)
    packed = plan_source(str(write(tmp_path / f"{name}{end}", PACKERS[end](CONTENTS[name]))), rows_per_range=8)
    assert stories(packed) == stories(plain) == EXPECTED.get(name, TEXTS)
    assert [(part.first_row, part.n_rows) for part in packed.ranges] == [(p.first_row, p.n_rows) for p in plain.ranges]
    assert [len(task) for task in packed.tasks] == [7]
    assert packed.source["files"][0]["name"] == f"{name}{end}"


@pytest.mark.parametrize("end", PACKERS)
def test_members_on_end_are_one_file(tmp_path, end):
    content = CONTENTS["a.jsonl"]
    packed = PACKERS[end](content[:700]) + PACKERS[end](content[700:])
    assert stories(plan_source(str(write(tmp_path / f"a.jsonl{end}", packed)))) == TEXTS


@pytest.mark.parametrize("end", PACKERS)
@pytest.mark.parametrize(
    "damage",
    [
        lambda packed: packed[: len(packed) // 2],
        lambda packed: packed[:-1],
        lambda packed: packed + b"garbage",
        lambda packed: b"no such thing",
        lambda packed: packed[:20] + bytes(byte ^ 255 for byte in packed[20:24]) + packed[24:],
    ],
    ids=["half", "last byte", "garbage after", "not compressed", "flipped"],
)
def test_damage_is_one_clear_line(tmp_path, end, damage):
    path = write(tmp_path / f"a.txt{end}", damage(PACKERS[end](CONTENTS["blank.txt"])))
    with pytest.raises(UserError, match=rf"a.txt{end} is damaged or cut short, or is no (gzip|zstd) file: ") as caught:
        plan_source(str(path))
    assert "\n" not in str(caught.value)


def test_nothing_compressed_is_nothing(tmp_path):
    with pytest.raises(UserError, match=r"a.jsonl.gz is empty"):
        plan_source(str(write(tmp_path / "a.jsonl.gz", gzip.compress(b""))))


def test_parquet_is_not_compressed_again(tmp_path):
    with pytest.raises(UserError, match=r"a.parquet.gz: expected a file that ends in .parquet, .*\(all but Parquet"):
        plan_source(str(write(tmp_path / "a.parquet.gz", gzip.compress(b"x"))))


def test_ranges_that_are_done_can_be_left_out(tmp_path):
    made = plan_source(str(write(tmp_path / "a.jsonl.gz", gzip.compress(CONTENTS["a.jsonl"]))), rows_per_range=8)
    [task] = made.tasks
    found = [(part.number, batch["story_id"][0].as_py()) for part, batch in read_ranges((task[2], task[5]))]
    assert found == [(2, "a.jsonl.gz#16"), (5, "a.jsonl.gz#40")]


def test_a_file_that_shrinks_after_planning_is_found(tmp_path):
    path = write(tmp_path / "a.jsonl.gz", gzip.compress(CONTENTS["a.jsonl"]))
    [task] = plan_source(str(path), rows_per_range=20).tasks
    write(path, gzip.compress(CONTENTS["a.jsonl"][:1500]))
    with pytest.raises(UserError, match=r"a\.jsonl\.gz changed while it was prepared"):
        list(read_ranges(task))


def test_planning_says_how_much_it_read(tmp_path):
    path = write(tmp_path / "a.txt", b"One line of a story.\n" * 200_000)
    heard: list[int] = []
    plan_source(str(path), cut_text="blank-lines", on_bytes=heard.append)
    assert sum(heard) == path.stat().st_size
    assert len(heard) > 3
