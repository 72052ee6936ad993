"""Stories as they come over a real socket; clients that disconnect; what is counted; the documented interface."""

import asyncio
import json
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Iterator
from concurrent.futures import Future
from pathlib import Path
from types import SimpleNamespace

import httpx
import pytest

from serve.api import streaming
from serve.api.metrics import Metrics
from serve.api.streaming import EventStream
from slm_ray.generation.engine import Engine
from slm_ray.generation.engine_thread import Load
from slm_ray.generation.onnx_backend import OnnxBackend
from slm_ray.generation.request import Chunk, Completion
from slm_ray.generation.sampling import SamplingParams
from slm_ray.generation.torch_backend import TorchBackend
from slm_ray.runs.checkpoint import load_model
from tests.support.http_server import running
from tests.support.tiny_model import write_endless_model

CHECKS = "not_a_server_error,status_code_conformance,content_type_conformance,response_schema_conformance"
LONG = {"prompt": "Once", "max_tokens": 2048, "seed": 3}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_endless_model(tmp_path_factory.mktemp("streaming") / "tiny")


@pytest.fixture(scope="module")
def url(model: Path) -> Iterator[str]:
    with running(model, rows=8, waiting=20) as address:
        yield address


def events(lines: list[str]) -> list[dict[str, object]]:
    return [json.loads(line.removeprefix("data: ")) for line in lines if line]


def test_a_stream_is_the_story_in_chunks_with_chances_and_a_last_word(url: str, model: Path) -> None:
    body = {"prompt": "The cat", "max_tokens": 20, "seed": 5, "logprobs": 2, "stream": True}
    with httpx.stream("POST", f"{url}/generate", json=body) as answer:
        assert answer.headers["Content-Type"].startswith("text/event-stream")
        got = events(list(answer.iter_lines()))
    weights, tokenizer = load_model(model)
    params = SamplingParams(max_tokens=20, seed=5, logprobs=2)
    (own,) = Engine(TorchBackend(weights), tokenizer).generate(["The cat"], [params])
    assert "".join(str(event["text"]) for event in got[:-1]) == own.text
    tokens = [token for event in got[:-1] for token in event["tokens"]]  # type: ignore[attr-defined]
    assert [token["text"] for token in tokens] == [one.text for one in own.logprobs]
    assert all(len(token["top"]) == 2 for token in tokens)
    last = got[-1]
    assert last["done"] and last["finish_reason"] == own.finish_reason
    assert last["usage"]["completion_tokens"] == len(own.tokens)  # type: ignore[index]
    assert last["model"]["version"] == "step-12"  # type: ignore[index]


def test_chunks_come_while_the_story_is_being_written(url: str) -> None:
    with httpx.stream("POST", f"{url}/generate", json=LONG | {"stream": True}) as answer:
        lines = answer.iter_lines()
        next(lines)
        assert running_stories(url) == 1
    wait_until_idle(url)


def running_stories(url: str) -> int:
    lines = httpx.get(f"{url}/metrics").text.splitlines()
    return int(float(next(line.split()[1] for line in lines if line.startswith("slm_running_stories "))))


def wait_until_idle(url: str, within_s: float = 20) -> None:
    deadline = time.monotonic() + within_s
    while running_stories(url):
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_a_client_that_left_before_the_first_event_stops_the_story() -> None:
    stopped: list[bool] = []

    async def events() -> AsyncIterator[bytes]:
        yield b"never asked for"

    async def leave() -> dict[str, str]:
        return {"type": "http.disconnect"}

    async def send(_: object) -> None:
        await asyncio.Event().wait()  # nobody reads

    stream = EventStream(events(), lambda: stopped.append(True))
    asyncio.run(stream({}, leave, send))
    assert stopped == [True]


def test_two_hundred_clients_leave_and_the_next_is_answered_at_once(url: str) -> None:
    async def leave(client: httpx.AsyncClient, number: int) -> int:
        async with client.stream("POST", f"{url}/generate", json=LONG | {"stream": number % 2 == 0}) as answer:
            async for _ in answer.aiter_bytes():
                break
            return answer.status_code

    async def all_leave() -> None:
        async with httpx.AsyncClient(limits=httpx.Limits(max_connections=200), timeout=60) as client:
            tasks = [asyncio.create_task(leave(client, number)) for number in range(200)]
            await asyncio.wait(tasks, timeout=3)
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    asyncio.run(all_leave())
    steps: list[int] = []
    whole = OnnxBackend.decode
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(OnnxBackend, "decode", lambda self, tokens: (steps.append(1), whole(self, tokens))[1])
        wait_until_idle(url)
    assert len(steps) < 100  # left alone, those that were taken would have gone on for thousands
    began = time.monotonic()
    answer = httpx.post(f"{url}/generate", json={"prompt": "Once", "max_tokens": 2}, timeout=30)
    assert answer.status_code == 200
    assert time.monotonic() - began < 10
    wait_until_idle(url)


def test_a_hundred_at_once_are_written_whole_or_asked_to_retry(url: str) -> None:
    async def ask() -> list[httpx.Response]:
        async with httpx.AsyncClient(limits=httpx.Limits(max_connections=100), timeout=60) as client:
            body = {"prompt": "Once", "max_tokens": 40, "seed": 1}
            return await asyncio.gather(*(client.post(f"{url}/generate", json=body) for _ in range(100)))

    answers = asyncio.run(ask())
    assert {answer.status_code for answer in answers} <= {200, 429}
    whole = {answer.json()["story"] for answer in answers if answer.status_code == 200}
    assert len(whole) == 1
    assert sum(answer.status_code == 200 for answer in answers) >= 8


@pytest.mark.parametrize("stop", ["x" * 257, 5, ["a"] * 1000, {"a": 1}, [5]])
def test_strange_stop_lists_are_refused(url: str, stop: object) -> None:
    said = [{"role": "user", "content": "Once"}]
    bodies = {
        "/generate": {"prompt": "Once"},
        "/v1/completions": {"prompt": "Once", "model": "tiny"},
        "/v1/chat/completions": {"messages": said, "model": "tiny"},
    }
    for path, body in bodies.items():
        answer = httpx.post(f"{url}{path}", json={"stop": stop, "max_tokens": 2} | body)
        assert answer.status_code in (400, 422), stop


def test_metrics_count_by_route_and_version(url: str) -> None:
    httpx.post(f"{url}/generate", json={"prompt": "Once", "max_tokens": 2, "seed": 1})
    httpx.get(f"{url}/secret/{'x' * 50}")
    text = httpx.get(f"{url}/metrics").text
    assert 'slm_requests_total{route="/generate",status="200"}' in text
    assert 'slm_requests_total{route="other",status="404"}' in text and "secret" not in text
    for name in ("completion_tokens_total", "prompt_tokens_total"):
        assert f'slm_{name}{{version="step-12"}}' in text
    for name in ("time_to_first_token", "time_per_output_token", "request_duration"):
        assert f'gen_ai_server_{name}_seconds_count{{gen_ai_operation_name="text_completion",' in text
    assert (
        'gen_ai_request_model="tiny",gen_ai_response_model="tiny",gen_ai_token_type="output",version="step-12"' in text
    )


def test_a_streamed_story_is_counted_once(url: str) -> None:
    def total(name: str) -> float:
        lines = httpx.get(f"{url}/metrics").text.splitlines()
        return sum(float(line.split()[1]) for line in lines if line.startswith(name))

    def written() -> float:
        return total("slm_completion_tokens_total")

    while total("slm_running_stories") + total("slm_waiting_stories"):  # those of tests before
        time.sleep(0.01)
    before = written()
    body = {"model": "tiny", "max_tokens": 7, "stream": True, "stream_options": {"include_usage": True}}
    httpx.post(f"{url}/v1/completions", json=body | {"prompt": "Once"})
    assert written() == before + 7
    httpx.post(f"{url}/v1/chat/completions", json=body | {"messages": [{"role": "user", "content": "Once"}]})
    assert written() == before + 14
    text = httpx.get(f"{url}/metrics").text
    assert 'gen_ai_server_request_duration_seconds_count{gen_ai_operation_name="chat",' in text
    assert 'slm_requests_total{route="/v1/chat/completions",status="200"}' in httpx.get(f"{url}/metrics").text


def test_a_client_that_reads_slowly_makes_no_story_slow(monkeypatch: pytest.MonkeyPatch) -> None:
    now, metrics = [100.0], Metrics()
    monkeypatch.setattr(streaming.time, "perf_counter", lambda: now[0])

    async def read() -> float:
        request, future = streaming.StreamingRequest(metrics), Future[Completion]()
        request.follow(SimpleNamespace(version=SimpleNamespace(name="m", version="2")), future)  # type: ignore[arg-type]
        now[0] = 101.0
        request.receive(Chunk("a"))
        now[0] = 103.0
        future.set_result(Completion(text="abc", tokens=(5, 6, 7), prompt_tokens=1, finish_reason="length"))
        now[0] = 163.0
        assert [chunk.text async for chunk in request.chunks()] == ["a"]
        await request.completion()
        return request.seconds

    assert asyncio.run(read()) == 3
    lines = [line for line in metrics.text(Load(0, 0)).decode().splitlines() if "_seconds_sum" in line]
    assert [float(line.split()[-1]) for line in lines] == [1, 1, 3]


def test_a_backend_that_fails_is_reported_in_the_form_of_the_route_and_counted(model: Path) -> None:
    class FailError(Exception):
        """As ONNX Runtime's, which is no RuntimeError."""

    def fail(*_: object) -> None:
        raise FailError("out of memory")

    with running(model) as url, pytest.MonkeyPatch.context() as patch:
        patch.setattr("slm_ray.generation.onnx_backend.OnnxBackend.decode", fail)
        own = httpx.post(f"{url}/generate", json={"prompt": "Once"})
        assert (own.status_code, own.json()) == (500, {"detail": "the model failed in the middle of the story"})
        other = httpx.post(f"{url}/v1/completions", json={"model": "tiny", "prompt": "Once"})
        assert other.status_code == 500 and other.json()["error"]["type"] == "server_error"
        said = {"model": "tiny", "messages": [{"role": "user", "content": "Once"}]}
        chat = httpx.post(f"{url}/v1/chat/completions", json=said)
        assert chat.status_code == 500 and chat.json()["error"]["type"] == "server_error"
        lines = httpx.post(f"{url}/v1/chat/completions", json=said | {"stream": True}).text.splitlines()
        assert json.loads(lines[-2].removeprefix("data: "))["error"]["type"] == "server_error"
        streamed = httpx.post(f"{url}/generate", json={"prompt": "Once", "stream": True})
        assert events(streamed.text.splitlines()) == [{"error": {"detail": "the model failed"}}]
        streamed = httpx.post(f"{url}/v1/completions", json={"model": "tiny", "prompt": "Once", "stream": True})
        assert "the model stopped" in str(events(streamed.text.splitlines())[-1]["error"])
        assert 'slm_requests_total{route="/generate",status="500"} 1.0' in httpx.get(f"{url}/metrics").text


def test_ready_and_model_say_what_is_served(url: str) -> None:
    assert httpx.get(f"{url}/ready").json() == {"status": "ok"}
    described = httpx.get(f"{url}/model").json()
    assert described["rollout"]["state"] == "serving" and described["evaluation"] == {}


def test_nothing_undocumented_is_answered(url: str) -> None:
    """Requests made up from our own OpenAPI description, good and bad: no 5xx, no status or shape it does not name."""
    command = [sys.executable, "-m", "schemathesis.cli", "run", f"{url}/openapi.json", "--seed", "1"]
    command += ["--max-examples", "30", "--phases", "examples,coverage,fuzzing", "--checks", CHECKS, "--no-color"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    paths = httpx.get(f"{url}/openapi.json").json()["paths"]
    assert {"/v1/completions", "/v1/chat/completions", "/v1/models/{name}"} <= set(paths)
