"""Data sets of the hub by the real client, in a process of its own, from a stand-in of the hub on loopback."""

import http.server
import io
import json
import os
import socket
import subprocess
import sys
import threading
import time
import urllib.parse
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from slm_ray.errors import UserError
from slm_ray.sources import hub
from slm_ray.sources.plan import plan_source
from tests.support import hub_stand_in
from tests.support.paths import ROOT

SECOND_FILE = "data/train-00001-of-00002.parquet"

CLIENT = """
import json, sys
from pathlib import Path
from slm_ray.errors import UserError
from slm_ray.sources.plan import plan_source
from slm_ray.sources.reading import read_ranges
for line in sys.stdin:
    asked = json.loads(line)
    heard = []
    try:
        made = plan_source(asked.pop("source"), download_folder=Path(sys.argv[1]), on_bytes=heard.append, **asked)
        rows = {}
        for task in made.tasks:
            for part, batch in read_ranges(task):
                found = rows.setdefault(str(part.file.split), [])
                found += zip(batch["story_id"].to_pylist(), [text.decode() for text in batch["text"].to_pylist()])
        answer = {"rows": rows, "source": made.source, "own": [made.has_own_validation, made.has_own_test]}
    except UserError as error:
        answer = {"error": str(error)}
    print(json.dumps({**answer, "bytes": sum(heard)}), flush=True)
"""


def parquet(texts: list[str], name: str = "text") -> bytes:
    content = io.BytesIO()
    pq.write_table(pa.table({"n": range(len(texts)), name: texts}), content)
    return content.getvalue()


def stories(split: str, start: int, stop: int) -> list[str]:
    return [f"{split} story {number}" for number in range(start, stop)]


REPOSITORIES = {
    "mouse/tales": {
        "main": {
            "README.md": b"# Tales\n",
            "data/train-00000-of-00002.parquet": parquet(stories("train", 0, 60)),
            SECOND_FILE: parquet(stories("train", 60, 100)),
            "data/validation-00000-of-00001.parquet": parquet(stories("validation", 0, 20)),
            "data/test-00000-of-00001.parquet": parquet(stories("test", 0, 10)),
        },
        "v1": {"README.md": b"", "train.jsonl": b'{"text": "Old."}\n'},
    },
    "mouse/letters": {"main": {"train.jsonl": b'{"body": "Dear."}\n'}},
    "roneneldan/TinyStories": {
        "main": {"data/train.parquet": parquet(stories("t", 0, 50)), "data/validation.parquet": parquet(["v"] * 9)}
    },
}

Ask = Callable[..., dict[str, Any]]


@pytest.fixture(scope="module")
def server() -> Iterator[hub_stand_in.Hub]:
    with hub_stand_in.running(REPOSITORIES) as running:
        yield running


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("hub")


@pytest.fixture(scope="module")
def ask(server: hub_stand_in.Hub, folder: Path) -> Iterator[Ask]:
    """Plan a source in a process that knows the stand-in as the hub, and read it."""
    own = {
        "HF_ENDPOINT": server.endpoint,
        "HF_HOME": str(folder / "home"),
        "PYTHONPATH": str(ROOT),
        "HF_HUB_OFFLINE": "",
    }
    words = [sys.executable, "-c", CLIENT, str(folder / "stories")]
    with subprocess.Popen(
        words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, env={**os.environ, **own}
    ) as process:
        assert process.stdin and process.stdout

        def ask(source: str, **options: object) -> dict[str, Any]:
            assert process.stdin and process.stdout
            process.stdin.write(json.dumps({"source": source, **options}).encode() + b"\n")
            process.stdin.flush()
            answer: dict[str, Any] = json.loads(process.stdout.readline())
            return answer

        yield ask
        process.stdin.close()


def test_a_hub_that_stops_leaves_no_half_file_and_the_next_try_works(server, ask, folder):
    server.breaking[SECOND_FILE] = 1
    server.down.add(SECOND_FILE)
    broken = ask("hub:mouse/tales:train")
    assert broken["error"].startswith("cannot get hub:mouse/tales (")
    assert "503" in broken["error"]
    assert "\n" not in broken["error"]
    assert [path for path in (folder / "stories").rglob("*") if path.is_file()] == []
    server.down.clear()
    server.breaking[SECOND_FILE] = 1  # the client asks again by itself
    whole = ask("hub:mouse/tales:train")["rows"]["None"]
    assert [text for _, text in whole] == stories("train", 0, 100)


def test_official_splits_stay_what_they_are(ask):
    found = ask("hub:mouse/tales")
    assert found["rows"]["None"][99] == ["mouse/tales/train#99", "train story 99"]
    assert found["rows"]["validation"][3] == ["mouse/tales/validation#3", "validation story 3"]
    assert [len(rows) for rows in found["rows"].values()] == [100, 20, 10]
    assert list(found["rows"]) == ["None", "validation", "test"]
    assert found["own"] == [True, True]
    assert found["source"]["revision"] == hub_stand_in.commit_of("mouse/tales", "main")
    assert found["source"]["used"] == "hub:mouse/tales"
    assert found["bytes"] > 0


def test_one_split_can_be_named_and_is_stories_to_split(ask):
    found = ask("hub:mouse/tales:test")
    assert found["rows"] == {"None": [[f"mouse/tales/test#{row}", f"test story {row}"] for row in range(10)]}
    assert found["own"] == [False, False]


def test_as_a_validation_source_it_gives_its_validation_split(ask, tmp_path):
    file = tmp_path / "own.jsonl"
    file.write_text('{"text": "Mine."}\n', encoding="utf-8")
    found = ask(str(file), validation_source="hub:mouse/tales")
    assert {split: len(rows) for split, rows in found["rows"].items()} == {"None": 1, "validation": 20}
    assert found["source"]["validation"] == {
        "used": "hub:mouse/tales:validation",
        "revision": hub_stand_in.commit_of("mouse/tales", "main"),
    }
    assert len(ask(str(file), validation_source="hub:mouse/tales:test")["rows"]["validation"]) == 10
    assert "has no split 'validation'" in ask(str(file), validation_source="hub:mouse/tales@v1")["error"]


def test_auto_is_no_validation_source(ask):
    assert "auto cannot be the validation source" in ask("sample", validation_source="auto")["error"]


def test_a_revision_can_be_named(ask):
    found = ask("hub:mouse/tales@v1")
    assert found["rows"] == {"None": [["mouse/tales/train#0", "Old."]]}
    assert found["source"]["revision"] == hub_stand_in.commit_of("mouse/tales", "v1")
    commit = hub_stand_in.commit_of("mouse/tales", "v1")
    assert ask(f"hub:mouse/tales@{commit}:train")["source"]["digest"] == found["source"]["digest"]


def test_the_first_stories_are_enough(ask):
    assert [len(rows) for rows in ask("hub:mouse/tales", max_stories=40)["rows"].values()] == [40, 2, 2]


def test_what_was_fetched_is_not_fetched_again(server, ask):
    first = ask("hub:mouse/tales:validation")
    server.asked.clear()
    again = ask("hub:mouse/tales:validation")
    assert (again["rows"], again["source"]) == (first["rows"], first["source"])
    assert [request for request in server.asked if "/resolve/" in request] == []


def test_auto_is_tiny_stories_where_the_hub_answers(ask):
    found = ask("auto", max_stories=40)
    assert (found["source"]["used"], found["source"]["why"]) == ("hub:roneneldan/TinyStories", None)
    assert [len(rows) for rows in found["rows"].values()] == [40, 2]
    assert found["rows"]["None"][0] == ["roneneldan/TinyStories/train#0", "t story 0"]


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("hub:mouse/absent", "/api/datasets/mouse/absent answered 404): use --source sample, a path"),
        ("hub:mouse/tales:dev", "has no split 'dev'; it has 'train', 'validation', 'test': name one with hub:mouse/t"),
        ("hub:mouse/tales@v9", "hub:mouse/tales has no revision 'v9'"),
        ("hub:mouse/letters", "hub:mouse/letters has no column 'text'; it has 'body': name the right one with --text"),
    ],
)
def test_what_the_hub_has_not_is_one_clear_line(ask, source, message):
    assert message in ask(source)["error"]


@pytest.mark.parametrize(
    ("word", "expected"),
    [
        ("hub:a/b", ("a/b", None, None)),
        ("hub:imdb:test", ("imdb", None, "test")),
        ("hub:a/b@refs/pr/1", ("a/b", "refs/pr/1", None)),
        ("hub:a/b@v1:train", ("a/b", "v1", "train")),
    ],
)
def test_what_a_word_names(word, expected):
    named = hub.parse(word)
    assert (named.name, named.revision, named.split) == expected


@pytest.mark.parametrize("word", ["hub:", "hub:a/b/c", "hub:a b", "hub:a/b:", "hub:a/b@"])
def test_a_word_that_names_nothing_is_refused(word):
    with pytest.raises(
        UserError, match=r"is not a data set of the hub: expected hub:OWNER/NAME\[@REVISION\]\[:SPLIT\]"
    ):
        hub.parse(word)


def test_auto_falls_back_to_the_sample_corpus_and_says_why(monkeypatch):
    monkeypatch.setattr(hub, "unreachable", lambda name: "no network")
    made = plan_source("auto", max_stories=7)
    assert (made.source["requested"], made.source["used"], made.source["why"]) == ("auto", "sample", "no network")
    assert made.source["digest"] == plan_source("sample", max_stories=7).source["digest"]


def test_an_explicit_hub_source_never_falls_back(monkeypatch):
    monkeypatch.setattr(hub, "unreachable", lambda name: "no network")
    with pytest.raises(UserError, match=r"cannot get hub:a/b \(no network\): use --source sample, a path"):
        plan_source("hub:a/b")


def test_the_hub_is_not_asked_when_it_is_switched_off(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert hub.unreachable("a/b") == "HF_HUB_OFFLINE is set"


def test_a_hub_that_does_not_answer_is_given_up(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    assert "127.0.0.1:9" in (hub.unreachable("a/b", timeout_s=5.0) or "")


def test_a_hub_that_is_silent_is_given_up_in_time(monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as silent:
        endpoint = f"http://127.0.0.1:{silent.getsockname()[1]}"
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", endpoint)
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
        start = time.monotonic()
        assert (hub.unreachable("a/b", timeout_s=0.3) or "").startswith(endpoint)
        assert time.monotonic() - start < 3


@pytest.fixture
def hub_server(monkeypatch, tmp_path) -> Iterator[list[str | None]]:
    """A hub that answers `status-NUMBER` with that status; gives the Authorization headers it received."""
    received: list[str | None] = []

    class Hub(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            received.append(self.headers["Authorization"])
            path = urllib.parse.urlsplit(self.path).path
            self.send_response(int(path.split("-")[-1]) if "-" in path else 401)
            self.send_header("Location", f"http://localhost:{self.server.server_port}/api/datasets/status-200")
            self.end_headers()
            self.wfile.write(b'{"id": "status", "sha": "1"}')

        def log_message(self, *_):
            pass

    with http.server.HTTPServer(("127.0.0.1", 0), Hub) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", f"http://127.0.0.1:{server.server_port}")
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
        monkeypatch.setattr("huggingface_hub.constants.HF_TOKEN_PATH", str(tmp_path / "no_token"))
        monkeypatch.delenv("HF_TOKEN", raising=False)
        yield received
        server.shutdown()


def test_the_hub_is_asked_with_the_token(hub_server, monkeypatch):
    assert hub.unreachable("status-200") is None
    monkeypatch.setenv("HF_TOKEN", "secret")
    assert hub.unreachable("status-200") is None
    assert hub.unreachable("status-307") is None  # renamed and moved to another host, which does not see the token
    assert hub_server == [None, "Bearer secret", "Bearer secret", None]


@pytest.mark.parametrize("status", [401, 403, 404])
def test_a_refusal_of_the_hub_is_an_answer(hub_server, status):
    with pytest.raises(UserError, match=rf"cannot get hub:status-{status} \(.* answered {status}\): .* \(HF_TOKEN\)$"):
        plan_source(f"hub:status-{status}")


def test_auto_does_not_hide_a_refusal(hub_server):
    with pytest.raises(UserError, match=r"cannot get hub:roneneldan/TinyStories \(.* answered 401\)"):
        plan_source("auto", max_stories=7)


@pytest.mark.parametrize("status", [429, 500, 503])
def test_a_hub_in_trouble_does_not_answer(hub_server, status):
    assert (hub.unreachable(f"status-{status}") or "").endswith(f"answered {status}")
