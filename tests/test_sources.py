"""What a source means: files found, rows counted, ranges cut, rows read back with stable ids."""

import http.server
import json
import threading
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from slm_ray import hub, inputs
from slm_ray.errors import UserError
from slm_ray.sources import Plan, plan, read_range

STORIES = [f"Story number {number}, with\n\na blank line." for number in range(10)]
PLAIN = [f"Story number {number}." for number in range(10)]


def write_parquet(path: Path, texts: list[str | None], row_group_size: int = 3) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table({"n": range(len(texts)), "text": texts}), path, row_group_size=row_group_size)
    return path


def write_jsonl(path: Path, lines: list[bytes]) -> Path:
    path.write_bytes(b"\n".join(lines) + b"\n")
    return path


def read_all(made: Plan) -> dict[str, bytes | None]:
    rows: dict[str, bytes | None] = {}
    for part in made.ranges:
        batch = read_range(part)
        rows.update(zip(batch["story_id"].to_pylist(), batch["text"].to_pylist()))
    return rows


def texts_of(made: Plan) -> list[str]:
    return [text.decode() for text in read_all(made).values()]


@pytest.mark.parametrize("step", [1, 3, 4, 10, 100])
def test_every_format_gives_every_story_once_whatever_the_ranges(tmp_path, step):
    parquet = write_parquet(tmp_path / "a.parquet", STORIES)
    jsonl = write_jsonl(tmp_path / "a.jsonl", [json.dumps({"text": text}).encode() for text in STORIES])
    marked, blank = tmp_path / "a.txt", tmp_path / "b.txt"
    marked.write_text("\n<|endoftext|>\n".join(STORIES))
    blank.write_text("\n\n \n".join(PLAIN) + "\n\n")
    for path, texts in [(parquet, STORIES), (jsonl, STORIES), (marked, STORIES), (blank, PLAIN)]:
        made = plan(str(path), rows_per_range=step)
        assert [text.strip() for text in texts_of(made)] == texts
        assert list(read_all(made)) == [f"{path.name}#{row}" for row in range(10)]
        assert [part.number for part in made.ranges] == list(range(-(-10 // step)))


def test_the_first_stories_are_taken_across_files(tmp_path):
    write_parquet(tmp_path / "a.parquet", STORIES)
    write_parquet(tmp_path / "b.parquet", STORIES)
    made = plan(str(tmp_path), max_stories=13, rows_per_range=4)
    assert [(part.source_name, part.n_rows) for part in made.ranges] == [
        ("a.parquet", 4), ("a.parquet", 4), ("a.parquet", 2), ("b.parquet", 3),
    ]  # fmt: skip
    assert made.n_rows == len(read_all(made)) == 13


def test_files_with_one_base_name_keep_their_stories_apart(tmp_path):
    for folder in ("x", "y"):
        write_parquet(tmp_path / folder / "train.parquet", [folder])
    assert read_all(plan(str(tmp_path))) == {"x/train.parquet#0": b"x", "y/train.parquet#0": b"y"}
    assert read_all(plan(str(tmp_path / "*" / "*.parquet"))) == read_all(plan(str(tmp_path)))


def test_a_validation_source_of_the_same_name_keeps_its_stories_apart(tmp_path):
    main = write_parquet(tmp_path / "x" / "data.parquet", ["train"])
    other = write_parquet(tmp_path / "y" / "data.parquet", ["val"])
    made = plan(str(main), validation_source=str(other))
    assert read_all(made) == {"data.parquet#0": b"train", "validation/data.parquet#0": b"val"}
    assert [part.split for part in made.ranges] == [None, "validation"]
    assert made.has_own_validation


def test_links_keep_their_names_and_files_named_twice_count_once(tmp_path):
    blob = write_parquet(tmp_path / "blobs" / "a.parquet", ["One."]).rename(tmp_path / "blobs" / "0a1b2c")
    (tmp_path / "snapshot").mkdir()
    (tmp_path / "snapshot" / "train.parquet").symlink_to(blob)
    assert read_all(plan(str(tmp_path / "snapshot"))) == {"train.parquet#0": b"One."}
    assert read_all(plan(str(tmp_path / "snapshot" / ".." / "snapshot" / "t*"))) == {"train.parquet#0": b"One."}


def test_a_validation_source_without_stories_is_refused(tmp_path):
    empty = tmp_path / "empty.parquet"
    pq.write_table(pa.table({"text": pa.array([], pa.string())}), empty)
    with pytest.raises(UserError, match=r"no stories in .*empty.parquet"):
        plan("sample", validation_source=str(empty))


def test_the_digest_follows_content_and_not_place(tmp_path):
    first = write_parquet(tmp_path / "x" / "a.parquet", STORIES)
    second = write_parquet(tmp_path / "y" / "a.parquet", STORIES)
    other = write_parquet(tmp_path / "z" / "a.parquet", STORIES[::-1])
    described = [plan(str(path)).source for path in (first, second, other)]
    assert described[0] == described[1]
    assert described[0]["digest"] != described[2]["digest"]
    assert described[0]["digest"] != plan(str(first), max_stories=3).source["digest"]
    assert str(tmp_path) not in json.dumps(described)


def test_rows_that_are_no_text_are_kept_with_a_problem(tmp_path):
    lines = [b'{"text": "good"}', b"nonsense", b"[1]", b'{"text": 3}', b'{"text": "\\ud800"}', b"", b'"\xff"']
    made = plan(str(write_jsonl(tmp_path / "a.jsonl", lines)))
    batch = read_range(made.ranges[0])
    problems = [None, "bad_json", "not_text", "not_text", "invalid_utf8", "invalid_utf8"]
    assert batch["problem"].to_pylist() == problems
    assert batch["text"].to_pylist()[1:4] == lines[1:4]


def test_null_and_undecodable_parquet_rows_are_rows(tmp_path):
    column = pa.array([b"ok", None, b"\xff"], pa.binary()).view(pa.string())
    pq.write_table(pa.table({"text": column}), tmp_path / "a.parquet")
    batch = read_range(plan(str(tmp_path / "a.parquet")).ranges[0])
    assert batch["text"].to_pylist() == [b"ok", None, b"\xff"]
    assert batch["problem"].to_pylist() == [None, "not_text", None]


def test_an_empty_story_between_two_end_marks_is_a_row(tmp_path):
    (tmp_path / "a.txt").write_text("<|endoftext|>One.<|endoftext|>\n<|endoftext|>Two.<|endoftext|>\n")
    assert [text.strip() for text in texts_of(plan(str(tmp_path / "a.txt")))] == ["One.", "", "Two."]


def test_windows_line_ends_part_stories(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"One.\r\nMore.\r\n\r\nTwo.\r\n")
    assert [text.split() for text in texts_of(plan(str(tmp_path / "a.txt")))] == [["One.", "More."], ["Two."]]


def test_another_column_can_be_named(tmp_path):
    pq.write_table(pa.table({"story": ["One."]}), tmp_path / "a.parquet")
    assert texts_of(plan(str(tmp_path / "a.parquet"), text_column="story")) == ["One."]


def test_the_sample_corpus_is_a_source():
    made = plan("sample", max_stories=5, rows_per_range=2)
    rows = read_all(made)
    assert list(rows) == [f"sample#{row}" for row in range(5)]
    assert len(set(rows.values())) == 5
    assert rows != read_all(plan("sample", max_stories=5, seed=1))
    assert plan("sample").n_rows == inputs.SAMPLE_STORIES


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
        ("stories.docx", "expected a file that ends in .parquet"),
        ("absent.parquet", "no such file, folder or glob: .*absent.parquet"),
    ],
)
def test_a_bad_input_is_one_clear_line(tmp_path, name, message):
    bad_files(tmp_path)
    with pytest.raises(UserError, match=message) as caught:
        plan(str(tmp_path / name))
    assert "\n" not in str(caught.value)


def test_flipped_bytes_in_a_page_are_found_when_it_is_read(tmp_path):
    path = write_parquet(tmp_path / "a.parquet", ["some words " * 2000])
    content = bytearray(path.read_bytes())
    content[200:260] = bytes(byte ^ 255 for byte in content[200:260])
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"a.parquet is damaged"):
        read_range(plan(str(path)).ranges[0])


def test_an_input_that_shrinks_after_planning_is_found(tmp_path):
    path = write_parquet(tmp_path / "a.parquet", STORIES)
    made = plan(str(path))
    for left in (4, 0):
        write_parquet(path, STORIES[:left]) if left else pq.write_table(pa.table({"text": pa.array([], "str")}), path)
        with pytest.raises(UserError, match=rf"changed while it was prepared: expected 10 stories .* found {left}"):
            read_range(made.ranges[0])


def test_auto_falls_back_to_the_sample_corpus_and_says_why(monkeypatch):
    monkeypatch.setattr(hub, "unreachable", lambda name: "no network")
    made = plan("auto", max_stories=7)
    assert (made.source["requested"], made.source["used"], made.source["why"]) == ("auto", "sample", "no network")
    assert made.source["digest"] == plan("sample", max_stories=7).source["digest"]


def test_an_explicit_hub_source_never_falls_back(monkeypatch):
    monkeypatch.setattr(hub, "unreachable", lambda name: "no network")
    with pytest.raises(UserError, match=r"cannot get hub:a/b \(no network\): use --source sample, a path"):
        plan("hub:a/b")


def test_the_hub_is_not_asked_when_it_is_switched_off(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert hub.unreachable("a/b") == "HF_HUB_OFFLINE is set"


def test_a_hub_that_does_not_answer_is_given_up(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    assert "127.0.0.1:9" in (hub.unreachable("a/b", timeout_s=5.0) or "")


@pytest.fixture
def hub_server(monkeypatch) -> Iterator[list[str | None]]:
    """A hub that answers `status-NUMBER` with that status; gives the Authorization headers it received."""
    received: list[str | None] = []

    class Hub(http.server.BaseHTTPRequestHandler):
        def do_HEAD(self):
            received.append(self.headers["Authorization"])
            self.send_response(int(self.path.split("-")[-1]) if "-" in self.path else 401)
            self.send_header("Location", "http://127.0.0.1:9/elsewhere")
            self.end_headers()

        def log_message(self, *_):
            pass

    with http.server.HTTPServer(("127.0.0.1", 0), Hub) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", f"http://127.0.0.1:{server.server_port}")
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
        monkeypatch.setattr("huggingface_hub.get_token", lambda: None)
        yield received
        server.shutdown()


def test_the_hub_is_asked_with_the_token(hub_server, monkeypatch):
    assert hub.unreachable("status-200") is None
    monkeypatch.setattr("huggingface_hub.get_token", lambda: "secret")
    assert hub.unreachable("status-200") is None
    assert hub.unreachable("status-307") is None  # a renamed data set: answered, and the token goes nowhere else
    assert hub_server == [None, "Bearer secret", "Bearer secret"]


@pytest.mark.parametrize("status", [401, 403, 404])
def test_a_refusal_of_the_hub_is_an_answer(hub_server, status):
    with pytest.raises(UserError, match=rf"cannot get hub:status-{status} \(.* answered {status}\): .* \(HF_TOKEN\)$"):
        plan(f"hub:status-{status}")


def test_auto_does_not_hide_a_refusal(hub_server):
    with pytest.raises(UserError, match=r"cannot get hub:roneneldan/TinyStories \(.* answered 401\)"):
        plan("auto", max_stories=7)


@pytest.mark.parametrize("status", [429, 500, 503])
def test_a_hub_in_trouble_does_not_answer(hub_server, status):
    assert (hub.unreachable(f"status-{status}") or "").endswith(f"answered {status}")


def test_a_line_of_endless_brackets_is_one_bad_row(tmp_path):
    lines = [b'{"text": "One."}', b"[" * 100_000, b'{"text": ' + b"[" * 100_000, b'{"text": "Two."}']
    [part] = plan(str(write_jsonl(tmp_path / "a.jsonl", lines))).ranges
    batch = read_range(part)
    assert batch["problem"].to_pylist() == [None, "bad_json", "bad_json", None]


def test_a_first_line_of_endless_brackets_is_one_line_of_error(tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", [b"[" * 100_000])
    with pytest.raises(UserError, match=r"a.jsonl is not JSONL: its first line is not JSON \(.{,100}\)$"):
        plan(str(path))
