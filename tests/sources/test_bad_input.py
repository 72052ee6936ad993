"""Input that is not as it should be: one clear line for a file, a reason for a row, and nothing lost."""

import gzip
import json
from collections import Counter
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from slm_ray.errors import UserError
from slm_ray.preparation import steps
from slm_ray.preparation.cleaning import CleaningRules
from slm_ray.sources import plain_text, rows
from slm_ray.sources.plan import plan_source
from slm_ray.sources.reading import read_ranges
from tests.support.source_files import STORIES, read_range, write_jsonl, write_parquet


def bad_files(folder: Path) -> dict[str, Path]:
    good = write_parquet(folder / "good.parquet", STORIES).read_bytes()
    (folder / "truncated.parquet").write_bytes(good[: len(good) // 2])
    (folder / "named.parquet").write_bytes(b"text,number\n" * 20)
    (folder / "empty.jsonl").touch()
    (folder / "empty").mkdir()
    pq.write_table(pa.table({"text": [1, 2]}), folder / "numbers.parquet")
    pq.write_table(pa.table({"text": [["a"]]}), folder / "lists.parquet")
    pq.write_table(pa.table({"body": ["a"]}), folder / "column.parquet")
    pq.write_table(pa.table({"text": pa.array([], pa.string())}), folder / "rows.parquet")
    write_jsonl(folder / "column.jsonl", [b'{"body": "a"}'])
    write_jsonl(folder / "prose.jsonl", [b"Once upon a time"])
    (folder / "stories.docx").write_bytes(b"x")
    write_jsonl(folder / "numbers.jsonl", [b'{"text": 1}', b'{"text": 2}'])
    write_jsonl(folder / "lists.jsonl", [b'{"text": ["a"]}'] * 50)
    (folder / "utf16.txt").write_text("Once upon a time.", encoding="utf-16")
    (folder / "utf16be.csv").write_text("text\nOnce upon a time.", encoding="utf-16-be")
    (folder / "utf16le.jsonl").write_text('{"text": "a"}', encoding="utf-16-le")
    (folder / "utf32.txt").write_text("Once upon a time.", encoding="utf-32")
    (folder / "utf32be.txt").write_text("Once upon\na time.", encoding="utf-32-be")
    (folder / "column.csv").write_bytes(b"id,body\n1,One.\n")
    (folder / "quote.csv").write_bytes(b'text\n"One.\nTwo.\n')
    (folder / "empty.parquet").touch()
    (folder / "blank.txt").write_bytes(b"\n\n \r\n")
    (folder / "cut.jsonl.gz").write_bytes(gzip.compress(b'{"text": "a"}\n' * 99)[:-9])
    (folder / "cut.jsonl.zst").write_bytes(b"\x28\xb5\x2f\xfd\x04")
    return {path.name: path for path in folder.iterdir()}


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("truncated.parquet", "truncated.parquet is not Parquet, or not all of it"),
        ("named.parquet", "named.parquet is not Parquet"),
        ("empty.jsonl", r"empty.jsonl is empty \(0 bytes\)"),
        ("empty", r"no file in the folder .*empty ends in .parquet, .jsonl"),
        ("numbers.parquet", "column 'text' of .* is int64, expected strings"),
        ("lists.parquet", "is list<.*>, expected strings"),
        ("column.parquet", "has no column 'text'; it has 'body': name the right one with --text-column"),
        ("column.jsonl", "has no column 'text'; it has 'body'"),
        ("prose.jsonl", "is not JSONL: its first line is not JSON"),
        ("rows.parquet", "no stories in .*rows.parquet"),
        ("numbers.jsonl", "column 'text' of .*numbers.jsonl is int in its first lines, expected strings"),
        ("lists.jsonl", "column 'text' of .*lists.jsonl is list in its first lines, expected strings"),
        ("utf16.txt", "utf16.txt is UTF-16, expected UTF-8: convert it, for example with iconv -f UTF-16 -t UTF-8"),
        ("utf16be.csv", "utf16be.csv is UTF-16, expected UTF-8"),
        ("utf16le.jsonl", "utf16le.jsonl is UTF-16, expected UTF-8"),
        ("utf32.txt", "utf32.txt is UTF-32, expected UTF-8: convert it, for example with iconv -f UTF-32 -t UTF-8"),
        ("utf32be.txt", "utf32be.txt is UTF-32, expected UTF-8"),
        ("column.csv", "has no column 'text'; it has 'id', 'body': name the right one with --text-column"),
        ("quote.csv", "quote.csv is not CSV as it should be, near line 3: unexpected end of data"),
        ("empty.parquet", r"empty.parquet is empty \(0 bytes\)"),
        ("blank.txt", "no stories in .*blank.txt"),
        ("cut.jsonl.gz", "cut.jsonl.gz is damaged or cut short, or is no gzip file"),
        ("cut.jsonl.zst", "cut.jsonl.zst is damaged or cut short, or is no zstd file"),
        ("stories.docx", "expected a file that ends in .parquet"),
        ("absent.parquet", "no such file, folder or glob: .*absent.parquet"),
    ],
)
def test_a_bad_input_is_one_clear_line(tmp_path, name, message):
    bad_files(tmp_path)
    with pytest.raises(UserError, match=message) as caught:
        plan_source(str(tmp_path / name))
    assert "\n" not in str(caught.value)


def test_flipped_bytes_in_a_page_are_found_when_it_is_read(tmp_path):
    path = write_parquet(tmp_path / "a.parquet", ["some words " * 2000])
    content = bytearray(path.read_bytes())
    content[200:260] = bytes(byte ^ 255 for byte in content[200:260])
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"a.parquet is damaged"):
        read_range(plan_source(str(path)).ranges[0])


def test_a_line_of_endless_brackets_is_one_bad_row(tmp_path):
    lines = [b'{"text": "One."}', b"[" * 100_000, b'{"text": ' + b"[" * 100_000, b'{"text": "Two."}']
    [part] = plan_source(str(write_jsonl(tmp_path / "a.jsonl", lines))).ranges
    batch = read_range(part)
    assert batch["problem"].to_pylist() == [None, "bad_json", "bad_json", None]


def test_a_first_line_of_endless_brackets_is_one_line_of_error(tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", [b"[" * 100_000])
    with pytest.raises(UserError, match=r"a.jsonl is not JSONL: its first line is not JSON \(.{,100}\)$"):
        plan_source(str(path))


HUGE = b"word " * 10_000_000
LONG = b"A story of more than fifty characters, so that nobody calls it too short. "


def odd_files(folder: Path) -> dict[str, dict[str, int]]:
    """Files with odd rows, and why each row that is no story is none."""
    texts = [LONG + number for number in (b"1", b"2", b"3")]
    odd = {"empty": 2, "control_characters": 1, "invalid_utf8": 2, "too_long": 1}
    rows = [b"", b" \t ", LONG + b"\x00", LONG + b"\xff", LONG + b"\xed\xa0\x80", b"word " * 5000]
    (folder / "marks.txt").write_bytes(b"\xef\xbb\xbf" + b"<|endoftext|>".join([texts[0], *rows[:-1], HUGE, texts[0]]))
    (folder / "windows.txt").write_bytes(texts[1] + b"\r\nMore.\r\n\r\n" + texts[2] + b"\r\n")
    quoted = [b'"' + row + b'"' for row in [b"CSV " + texts[0], *rows]]
    (folder / "a.csv").write_bytes(
        b"\xef\xbb\xbfid,text\r\n" + b"".join(b"1," + row + b"\r\n" for row in quoted) + b"7\r\n"
    )
    column = pa.array([b"Parquet " + texts[0], *rows, None], pa.large_binary()).view(pa.large_string())
    pq.write_table(pa.table({"text": column}), folder / "a.parquet")
    lines = [json.dumps({"text": row.decode()}).encode() for row in rows if b"\xff" not in row and b"\xed" not in row]
    bad = [b'{"text": "' + rows[3] + b'"}', b'{"text": "\\ud800"}', b'{"text": null}', b'{"text": [1]}', b"{"]
    first = json.dumps({"text": "JSONL " + texts[0].decode()}).encode()
    write_jsonl(folder / "a.jsonl", [b"\xef\xbb\xbf" + first, *lines, *bad])
    return {
        "marks.txt": odd,
        "a.csv": {**odd, "bad_csv": 1},
        "a.parquet": {**odd, "not_text": 1},
        "a.jsonl": {**odd, "not_text": 2, "bad_json": 1},
    }


def test_odd_rows_are_counted_and_rejected(tmp_path):
    expected = odd_files(tmp_path)
    made = plan_source(str(tmp_path))
    found: dict[str, Counter[str]] = {}
    for task in made.tasks:
        for part, batch in read_ranges(task):
            _, cleaned = steps.clean_batch((part, batch), CleaningRules())
            reasons = [reason for reason in cleaned["reason"].to_pylist() if reason]
            found.setdefault(part.file.name, Counter()).update(reasons)
            assert "\ufeff" not in "".join(cleaned["text"].to_pylist())
    assert {name: dict(reasons) for name, reasons in found.items() if reasons} == expected
    assert {part.file.name: part.n_rows for part in made.ranges}["windows.txt"] == 2


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        (
            "a.jsonl",
            b'[{"text": "' + b"One long line. " * 300_000,
            r"a.jsonl: a line is longer than 1 MiB; is it JSONL\?",
        ),
        ("a.csv", b"text\n" + b"One long line. " * 300_000, r"a.csv: a line is longer than 1 MiB; is it CSV\?"),
        ("a.txt", b"One.\n\n" + b"One long line.\n" * 300_000, r"a.txt: a story is longer than 1 MiB; see --cut-text"),
    ],
)
def test_what_never_ends_does_not_fill_the_memory(tmp_path, monkeypatch, name, content, message):
    monkeypatch.setattr(rows, "LONGEST_BYTES", 1 << 20)
    monkeypatch.setattr(plain_text, "LONGEST_BYTES", 1 << 20)
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=message):
        plan_source(str(tmp_path / name))
