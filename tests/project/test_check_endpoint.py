"""`infra/check_endpoint.py`: what it says of a sound server, and of servers that are broken in one way each."""

import contextlib
import dataclasses
import json
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from infra.check_endpoint import check, main, read_key
from infra.endpoint_checks import Prompt
from infra.endpoint_client import MAX_ANSWER_BYTES, Answer, Endpoint, NoAnswerError, UnreachableError, endpoint
from serve.api.settings import ApiSettings, key_digests
from slm_ray.errors import UserError
from tests.support.http_server import running
from tests.support.paths import ROOT
from tests.support.ports import free_port
from tests.support.tiny_model import write_endless_model

KEY = "a-key-of-tests"
SHORT = Prompt(max_tokens=12)
Fault = Callable[[str, dict[str, Any]], None]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_endless_model(tmp_path_factory.mktemp("endpoint") / "tiny")


@pytest.fixture(scope="module")
def url(model: Path) -> Iterator[str]:
    with running(model) as address:
        yield address


def state_of(results: list[Any]) -> dict[str, str]:
    """What became of each check, with a number where two have one name."""
    return {f"{number} {one.check.strip()}": one.state for number, one in enumerate(results)}


def test_a_sound_server_holds_every_check(url: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([url, "--max-tokens", "12"]) == 0
    out = capsys.readouterr().out
    assert out.splitlines()[-1] == "10 of 10 checks held"
    assert "FAILED" not in out and "not asked" not in out
    assert main([url, "--max-tokens", "12", "--prompt", "", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["is_ok"] and len(report["checks"]) == 10


def test_as_a_script_it_imports_nothing_that_has_to_be_installed(url: str) -> None:
    command = [sys.executable, "-S", "infra/check_endpoint.py", url, "--max-tokens", "4"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")


def test_a_key_is_asked_for_sent_and_refused(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    right, wrong = tmp_path / "keys", tmp_path / "other"
    right.write_text(f"\n{KEY}\nanother-key-of-tests\n")
    wrong.write_text("not-a-key-of-it\n")
    with running(model, ApiSettings(key_digests=key_digests({"SLM_API_KEYS": KEY}))) as address:
        assert main([address]) == 2
        assert "give it one by --key-file FILE" in capsys.readouterr().err
        assert main([address, "--key-file", str(wrong)]) == 2
        assert "it refuses that key" in capsys.readouterr().err
        assert main([address, "--key-file", str(right), "--max-tokens", "4"]) == 0


@dataclasses.dataclass(frozen=True)
class Broken:
    """The real endpoint, but that a fault changes the content of each answer on its way."""

    real: Endpoint
    fault: Fault
    timeout_s: float = 60.0
    key: str = ""

    def ask(self, method: str, path: str, content: Any = None) -> Answer:
        answer = self.real.ask(method, path, content)
        if answer.content_type == "text/event-stream":
            events = [one if one == "[DONE]" else self._changed(f"{path} stream", one) for one in answer.events()]
            body = "".join(f"data: {one}\n\n" for one in events if one).encode()
        else:
            body = self._changed(path, answer.body.decode()).encode()
        return dataclasses.replace(answer, body=body)

    def _changed(self, path: str, text: str) -> str:
        content = json.loads(text)
        self.fault(path, content)
        return json.dumps(content) if content else ""


def at(place: str, change: Callable[[dict[str, Any]], object]) -> Fault:
    """A fault of one route alone."""
    return lambda path, content: change(content) if path == place else None  # type: ignore[func-returns-value]


class Twice:
    """Stories that differ from one time to the next."""

    def __init__(self) -> None:
        self.times = 0

    def __call__(self, path: str, content: dict[str, Any]) -> None:
        if path == "/generate" and "story" in content:
            self.times += 1
            content["story"] += "!" * self.times


def of_choice(name: str, value: object) -> Callable[[dict[str, Any]], object]:
    return lambda content: [choice.update({name: value}) for choice in content.get("choices", ())]


FAULTS: dict[str, tuple[Fault, str]] = {
    "it is not alive": (at("/health", lambda c: c.update(status="ill")), "0 GET /health"),
    "a description lacks a field": (at("/model", lambda c: c.pop("vocab_size")), "2 GET /model"),
    "a flag for a number": (at("/model", lambda c: c.update(step=True)), "2 GET /model"),
    "another model is listed": (at("/v1/models", lambda c: c["data"][0].update(id="gpt")), "3 GET /v1/models"),
    "no prompt": (at("/generate", lambda c: "story" in c and c.update(story="A dog")), "4 POST /generate"),
    "too many tokens": (
        at("/generate", lambda c: "usage" in c and c["usage"].update(completion_tokens=13)),
        "4 POST /generate",
    ),
    "another story each time": (Twice(), "5 again"),
    "a piece is lost": (at("/generate stream", lambda c: c.get("text") and c.update(text="")), "6 streamed"),
    "no last event": (at("/generate stream", lambda c: "done" in c and c.clear()), "6 streamed"),
    "an error in the stream": (at("/generate stream", lambda c: c.update(error={"detail": "no"})), "6 streamed"),
    "a stream counts otherwise": (
        at("/generate stream", lambda c: "usage" in c and c["usage"].update(prompt_tokens=99)),
        "6 streamed",
    ),
    "another version answers": (
        at("/generate stream", lambda c: "model" in c and c["model"].update(version="9")),
        "6 streamed",
    ),
    "a wrong sum": (
        at("/v1/completions", lambda c: "usage" in c and c["usage"].update(total_tokens=1)),
        "7 POST /v1/completions",
    ),
    "an unknown reason": (at("/v1/completions", of_choice("finish_reason", "tired")), "7 POST /v1/completions"),
    "a stream without an end": (at("/v1/completions stream", of_choice("finish_reason", None)), "8 streamed"),
    "a stream without its counts": (
        at("/v1/completions stream", lambda c: c.pop("usage", None)), "8 streamed",
    ),
    "a mistake without a sentence": (at("/generate", lambda c: c.pop("detail", None)), "9 a wrong body"),
}  # fmt: skip


@pytest.mark.parametrize(("fault", "failing"), FAULTS.values(), ids=list(FAULTS))
def test_a_wrong_answer_fails_its_check(url: str, fault: Fault, failing: str) -> None:
    broken: Any = Broken(endpoint(url), fault)
    states = state_of(check(broken, SHORT))
    assert states[failing] == "FAILED"
    first = next(name for name, state in states.items() if state != "ok")
    assert first == failing


def test_a_sound_endpoint_behind_the_stand_in_holds_every_check(url: str) -> None:
    broken: Any = Broken(endpoint(url), lambda path, content: None)
    assert set(state_of(check(broken, SHORT)).values()) == {"ok"}


@contextlib.contextmanager
def answering(*pieces: bytes, wait_s: float = 0.0) -> Iterator[str]:
    """A server that gives everybody the same bytes, with a pause before each piece, and closes."""
    is_over = threading.Event()

    def serve(listener: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while not is_over.is_set():
                line, _ = listener.accept()
                with line, contextlib.suppress(OSError):
                    line.recv(65536)
                    for piece in pieces:
                        is_over.wait(wait_s)
                        line.sendall(piece)

    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=serve, args=(listener,))
        thread.start()
        try:
            yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        finally:
            is_over.set()
            with contextlib.suppress(OSError):
                socket.create_connection(listener.getsockname(), timeout=5).close()
            thread.join()


JSON_HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\n"


@pytest.mark.parametrize(
    ("pieces", "said"),
    [
        ([JSON_HEAD, b"Content-Length: 15\r\n\r\n", b'{"status"'], "broke off after 9 of 15 bytes"),
        ([JSON_HEAD, b"Transfer-Encoding: chunked\r\n\r\n", b"f\r\n{"], "the answer broke off"),
        ([JSON_HEAD, b"\r\nnothing of JSON"], "the body is no JSON"),
        ([JSON_HEAD, b"\r\n[1]"], "the body is no object"),
        ([b"HTTP/1.1 200 OK\r\nContent-Type: text/html\r\n\r\n<p>"], "expected application/json"),
        ([b"HTTP/1.1 302 Found\r\nLocation: http://127.0.0.1:1/\r\n\r\n"], "answered 302, expected 200"),
        ([b"-ERR unknown command\r\n"], "is no HTTP"),
        ([], "the answer broke off"),
    ],
)
def test_what_is_no_answer_is_said_and_the_rest_is_not_asked(
    pieces: list[bytes], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with answering(*pieces) as address:
        assert main([address]) == 1
    first, *others, last = capsys.readouterr().out.splitlines()
    assert "FAILED" in first and said in first
    assert all("not asked" in line for line in others)
    assert last == "0 of 10 checks held"


def test_a_trickle_ends_with_its_time() -> None:
    """Each byte comes soon, and the answer never."""
    with answering(JSON_HEAD + b"\r\n", *[b" "] * 100, wait_s=0.1) as address:
        began = time.monotonic()
        [first, *others] = check(endpoint(address, timeout_s=0.5), SHORT)
        assert time.monotonic() - began < 5
    assert first.detail == "no whole answer within 0.5 s"
    assert {one.state for one in others} == {"not asked"}


def test_an_answer_without_an_end_is_not_kept() -> None:
    body = b"\r\n" + b" " * (MAX_ANSWER_BYTES + 10)
    with answering(JSON_HEAD + body) as address, pytest.raises(NoAnswerError, match="larger than 4 MiB"):
        endpoint(address).ask("GET", "/health")


def test_what_an_endpoint_says_acts_on_no_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    with answering(b"HTTP/1.1 500 No\r\n\r\n\x1b[2Jgone") as address:
        assert main([address]) == 1
    out = capsys.readouterr().out
    assert "\x1b" not in out and r"\x1b[2Jgone" in out


def test_where_nothing_listens_nothing_is_claimed(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([f"127.0.0.1:{free_port()}"]) == 2
    out, error = capsys.readouterr()
    assert out == "" and error.startswith("error: nothing answers at http://127.0.0.1:")
    with pytest.raises(UnreachableError):
        endpoint(f"127.0.0.1:{free_port()}").ask("GET", "/health")


@pytest.mark.parametrize(
    "url", ["ftp://here", "http://", "http://me:secret@here", "http://here/?key=1", "http://h:99999"]
)
def test_an_address_that_is_none_is_refused_in_one_line(url: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([url]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and len(error.splitlines()) == 1 and "secret" not in error


@pytest.mark.parametrize("text", [None, "", "  \n,\n", "schlüssel-der-tests", "a\x01b"])
def test_a_key_file_without_a_key_is_refused(text: str | None, tmp_path: Path) -> None:
    if text is not None:
        (tmp_path / "keys").write_text(text)
    with pytest.raises(UserError, match="key file"):
        read_key(str(tmp_path / "keys"))
