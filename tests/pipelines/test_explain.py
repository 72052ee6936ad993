"""`--explain STORY_ID`: every story leads back to its row, an altered shard is named, a mistake is one line."""

import json
import shutil
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from pipelines import explain, prepare
from slm_ray.dataset import provenance
from slm_ray.dataset.manifest import MANIFEST, load_manifest
from slm_ray.errors import UserError
from slm_ray.sources import input_files
from slm_ray.tokenization.tokenizer import Tokenizer

ROWS = 40  # rows of each file


def story(number: int) -> str:
    return f"Once upon a time there was a mouse with {number} friends.  They all lived in house {number}."


def long_story(number: int) -> str:
    return story(number) + " They sang and danced and ate cheese all day long." * 6


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """A data set of two source files, so of two ranges, with rejected stories; not to be changed."""
    folder = tmp_path_factory.mktemp("explain")
    first = [story(number) for number in range(ROWS)]
    first[7] = long_story(7)
    second = [story(100 + number) for number in range(ROWS)]
    second[3], second[4], second[5] = story(9).upper(), long_story(7).upper() + "\n", "Short \x1b[31m one."
    (folder / "source").mkdir()
    for name, texts in (("a.jsonl", first), ("b.jsonl", second)):
        lines = "".join(json.dumps({"text": text}) + "\n" for text in texts)
        (folder / "source" / name).write_text(lines, encoding="utf-8")
    words = ["--source", str(folder / "source"), "--output", str(folder / "data"), "--vocab-size", "300"]
    assert prepare.main([*words, "--test-fraction", "0.2"]) == 0
    return folder / "data"


def fields(folder: Path, story_id: str) -> dict[str, str]:
    lines = explain.explain(folder, story_id).split("\n")
    return {line[:10].strip(): line[10:] for line in lines}


@pytest.mark.parametrize("split", ["train", "test"])
def test_a_kept_story_is_shown_from_source_to_tokens(data, split):
    tokenizer = Tokenizer.load(data / "tokenizer.json")
    rows = pq.read_table(data / split / "00001.parquet").to_pylist()
    row = rows[-1]
    number = int(row["story_id"].removeprefix("b.jsonl#"))
    text = " ".join(story(100 + number).split())
    found = fields(data, row["story_id"])
    assert found["story"] == f"b.jsonl#{number}"
    assert found["source"] == f"b.jsonl, row {number} of {ROWS}, counted from 0"
    assert load_manifest(data).source["files"][1]["sha256"] in found["digest"]
    assert found["split"] == split
    assert found["shard"].startswith(f"{split}/00001.parquet, row {len(rows) - 1} of {len(rows)}, sha256 ")
    assert found["size"].startswith(
        f"{len(text)} bytes of text, {len(row['tokens'])} tokens with the end-of-text token"
    )
    assert found["text"] == text
    assert found["tokens"].replace("|", "") == text + "<endoftext>"
    assert found["tokens"].count("|") == len(row["tokens"]) - 1 + 2  # the end-of-text token has two of its own
    assert [int(token) for token in found["ids"].split()] == row["tokens"]
    assert tokenizer.decode(row["tokens"]) == text


@pytest.mark.parametrize(("story_id", "equals"), [
    ("b.jsonl#3", "a.jsonl#9 in train, but for white space and case"),
    ("b.jsonl#4", "a.jsonl#7 in train, but for white space and case (by its first 200 bytes)"),
])  # fmt: skip
def test_a_duplicate_leads_to_the_story_that_it_equals(data, story_id, equals):
    split = explain.explain(data, equals.split(" ")[0]).split("split     ")[1].split("\n")[0]
    found = fields(data, story_id)
    assert found["reason"] == "duplicate"
    assert found["equals"] == equals.replace("train", split)


def test_a_rejected_story_has_its_reason_and_harmless_evidence(data):
    found = fields(data, "b.jsonl#5")
    assert found["reason"] == "control_characters"
    assert found["evidence"] == r"Short \x1b[31m one."
    assert found["shard"].startswith("rejected/00001.parquet, row 2 of 3, sha256 ")
    assert "equals" not in found


@pytest.mark.parametrize(("story_id", "message"), [
    ("b.jsonl#40", "no story b.jsonl#40: b.jsonl has 40 rows, up to b.jsonl#39"),
    ("c.jsonl#4", "no story c.jsonl#4: an id is the name of a source file, # and a row counted from 0, as "),
    ("b.json", "as b.jsonl#0; the files are a.jsonl, b.jsonl"), ("", "an id is the name of a source file"),
    ("b.jsonl#-1", "no story b.jsonl#-1"), ("b.jsonl#٣", "an id is"), ("b.jsonl#03", "an id is"),
    ("b.jsonl#" + "9" * 5000, "an id is"),
    ("\x1b[2Jx#3", r"no story \x1b[2Jx#3"),
])  # fmt: skip
def test_an_unknown_story_is_one_clear_line(data, capsys, story_id, message):
    assert prepare.main(["--output", str(data), f"--explain={story_id}"]) == 2
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ")
    assert message in line


def test_the_command_prints_it(data, capsys):
    assert prepare.main(["--explain", "a.jsonl#0", "--output", str(data)]) == 0
    assert "text      Once upon a time there was a mouse with 0 friends. They" in capsys.readouterr().out


@pytest.mark.parametrize(("words", "message"), [
    (("--output", "absent"), "no manifest.json in "), (("--output", "absent", "--force"), "leave out --force"),
])  # fmt: skip
def test_without_a_data_set_nothing_is_made(tmp_path, monkeypatch, capsys, words, message):
    monkeypatch.chdir(tmp_path)
    assert prepare.main(["--explain", "a.jsonl#0", *words]) == 2
    assert message in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_an_altered_shard_is_named_and_only_where_it_matters(data, tmp_path):
    copy = shutil.copytree(data, tmp_path / "data")
    row = pq.read_table(copy / "train/00000.parquet").to_pylist()[0]["story_id"]
    content = bytearray((copy / "train/00000.parquet").read_bytes())
    content[len(content) // 2] ^= 1
    (copy / "train/00000.parquet").write_bytes(content)
    with pytest.raises(UserError, match=r"train/00000.parquet was truncated or altered"):
        explain.explain(copy, row)
    assert fields(copy, "b.jsonl#5") == fields(data, "b.jsonl#5")
    assert fields(copy, "b.jsonl#6") == fields(data, "b.jsonl#6")
    assert fields(copy, "b.jsonl#4")["equals"].startswith("not found: ")


def test_a_story_is_found_where_ranges_are_cut_otherwise(data, monkeypatch):
    expected = explain.explain(data, "b.jsonl#6")
    monkeypatch.setattr(explain, "range_number", lambda manifest, source: 99)
    assert explain.explain(data, "b.jsonl#6") == expected


def test_a_story_behind_a_wrong_guess_is_found_though_the_guessed_shard_was_altered(data, tmp_path, monkeypatch):
    copy = shutil.copytree(data, tmp_path / "data")
    (copy / "train/00000.parquet").write_bytes(b"altered")
    monkeypatch.setattr(explain, "range_number", lambda manifest, source: 0)
    assert fields(copy, "b.jsonl#6") == fields(data, "b.jsonl#6")


def test_ranges_that_end_with_their_bytes_are_known(tmp_path, monkeypatch):
    monkeypatch.setattr(input_files, "RANGE_BYTES", 900)
    source = tmp_path / "long.jsonl"
    texts = [long_story(number) if number % 3 else "x" for number in range(ROWS)]  # every third is too short
    source.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
    words = ["--source", str(source), "--output", str(tmp_path / "data"), "--vocab-size", "300"]
    assert prepare.main([*words, "--validation-fraction", "0.2", "--max-rejected", "1"]) == 0
    manifest = load_manifest(tmp_path / "data")
    assert len(manifest.splits["train"].shards) > 5
    for split in (*manifest.splits.values(), manifest.rejected):
        for shard in split.shards:
            for row in pq.read_table(tmp_path / "data" / shard.file).to_pylist():
                number = provenance.range_number(manifest, provenance.source_row(manifest, row["story_id"]))
                assert shard.file.endswith(f"/{number:05d}.parquet")


def test_a_file_without_rows_is_said_to_have_none(data, tmp_path):
    manifest = json.loads((data / MANIFEST).read_text())
    manifest["source"]["files"].append({"name": "empty.csv", "rows": 0, "sha256": "", "split": None})
    (tmp_path / MANIFEST).write_text(json.dumps(manifest))
    with pytest.raises(UserError, match=r"no story empty.csv#0: empty.csv has no rows$"):
        explain.explain(tmp_path, "empty.csv#0")
