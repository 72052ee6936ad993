"""Spans of requests, as a collector gets them over HTTP."""

import asyncio
import contextlib
import dataclasses
import gzip
import json
import logging
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import httpx
import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.sdk.trace.export import SpanExportResult

from serve.api import tracing
from serve.api.settings import ApiSettings, check_otlp_endpoint, key_digests
from serve.options import app_config
from slm_ray.errors import UserError
from tests.support.http_server import running
from tests.support.ports import free_port
from tests.support.tiny_model import write_endless_model

PARENT = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
UNSAMPLED = "00-0af7651916cd43dd8448eb211c80319d-b7ad6b7169203331-00"
SECRET = "the purple aardvark"


@dataclasses.dataclass
class Collector:
    """What was posted to it."""

    url: str
    paths: list[str] = dataclasses.field(default_factory=list)
    logins: list[str | None] = dataclasses.field(default_factory=list)
    bodies: list[bytes] = dataclasses.field(default_factory=list)

    @property
    def spans(self) -> list[Any]:
        requests = [ExportTraceServiceRequest.FromString(body) for body in self.bodies]
        scopes = [scope for one in requests for resource in one.resource_spans for scope in resource.scope_spans]
        return [span for scope in scopes for span in scope.spans]

    def wait_for(self, is_enough: Callable[[list[Any]], bool]) -> list[Any]:
        deadline = time.monotonic() + 60
        while not is_enough(self.spans):
            assert time.monotonic() < deadline, [span.name for span in self.spans]
            time.sleep(0.02)
        return self.spans


@pytest.fixture
def collector() -> Iterator[Collector]:
    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            found.paths.append(self.path)
            found.logins.append(self.headers["Authorization"])
            found.bodies.append(gzip.decompress(body) if self.headers["Content-Encoding"] == "gzip" else body)
            self.send_response(200)
            self.send_header("Content-Type", "application/x-protobuf")
            self.send_header("Content-Length", "0")
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        found = Collector(f"http://127.0.0.1:{server.server_port}")
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield found
        server.shutdown()
        thread.join()


@pytest.fixture(autouse=True)
def at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Batches are sent after 50 ms, not five seconds."""
    monkeypatch.setenv("OTEL_BSP_SCHEDULE_DELAY", "50")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_endless_model(tmp_path_factory.mktemp("tracing") / "tiny")


@contextlib.contextmanager
def traced(model: Path, endpoint: str) -> Iterator[str]:
    with running(model, ApiSettings(otlp_endpoint=endpoint)) as url:
        yield url


def attributes(span: Any) -> dict[str, Any]:
    found = {}
    for one in span.attributes:
        value = one.value
        kind = value.WhichOneof("value")
        found[one.key] = (
            [v.string_value for v in value.array_value.values] if kind == "array_value" else getattr(value, kind)
        )
    return found


def children(span: Any, spans: list[Any]) -> list[Any]:
    below = [one for one in spans if one.parent_span_id == span.span_id]
    assert all(one.trace_id == span.trace_id for one in below)
    return sorted(below, key=lambda one: int(one.start_time_unix_nano))


def test_a_request_is_a_tree_of_spans_below_that_of_its_caller(model: Path, collector: Collector) -> None:
    with traced(model, collector.url) as url:
        before = time.time_ns()
        body = {"prompt": SECRET, "max_tokens": 6, "seed": 1}
        answer = httpx.post(f"{url}/generate", json=body, headers={"traceparent": PARENT}).json()
        spans = collector.wait_for(lambda spans: len(spans) == 5)
        after = time.time_ns()
    (request,) = [span for span in spans if span.name == "POST /generate"]
    assert (request.trace_id.hex(), request.parent_span_id.hex()) == tuple(PARENT.split("-")[1:3])
    assert request.kind == request.SPAN_KIND_SERVER
    expected = {"http.request.method": "POST", "http.route": "/generate", "http.response.status_code": 200}
    assert attributes(request) == expected
    (story,) = children(request, spans)
    assert story.name == "text_completion tiny"
    assert attributes(story) == {
        "gen_ai.operation.name": "text_completion",
        "gen_ai.provider.name": "slm-ray",
        "gen_ai.request.model": "tiny",
        "gen_ai.response.model": "tiny",
        "slm_ray.model.version": "step-12",
        "gen_ai.usage.input_tokens": answer["usage"]["prompt_tokens"],
        "gen_ai.usage.output_tokens": 6,
        "gen_ai.response.finish_reasons": ["length"],
    }
    phases = children(story, spans)
    assert [span.name for span in phases] == ["queue", "prefill", "decode"]
    times = [story.start_time_unix_nano, *(span.end_time_unix_nano for span in phases)]
    assert times == sorted(times) and times[-1] == story.end_time_unix_nano
    assert [span.start_time_unix_nano for span in phases] == times[:-1]
    assert before <= request.start_time_unix_nano and times[-1] <= after
    said = b"".join(collector.bodies)
    assert SECRET.encode() not in said and answer["story"][-20:].encode() not in said
    assert set(collector.paths) == {"/v1/traces"}


def test_each_of_several_stories_has_its_own_and_chat_is_named_so(model: Path, collector: Collector) -> None:
    with traced(model, collector.url) as url:
        said = {"model": "tiny", "messages": [{"role": "user", "content": "Once"}], "max_tokens": 3, "n": 2}
        assert httpx.post(f"{url}/v1/chat/completions", json=said | {"stream": True}).status_code == 200
        spans = collector.wait_for(lambda spans: len(spans) == 9)
        (request,) = [span for span in spans if not span.parent_span_id]
        assert request.name == "POST /v1/chat/completions"
        stories = children(request, spans)
        assert [span.name for span in stories] == ["chat tiny"] * 2
        assert all(len(children(story, spans)) == 3 for story in stories)


@pytest.mark.parametrize(
    "headers",
    [{"traceparent": "nonsense"}, {"traceparent": PARENT.replace("0af7", "zzzz")}, [("traceparent", PARENT)] * 2],
)
def test_a_parent_that_is_none_is_not_believed(headers: Any, model: Path, collector: Collector) -> None:
    with traced(model, collector.url) as url:
        httpx.post(f"{url}/generate", json={"prompt": "Once", "max_tokens": 2}, headers=headers)
        spans = collector.wait_for(lambda spans: len(spans) == 5)
    assert sum(not span.parent_span_id for span in spans) == 1
    assert len({span.trace_id for span in spans}) == 1


def test_what_the_caller_does_not_record_is_not_recorded(model: Path, collector: Collector) -> None:
    with traced(model, collector.url) as url:
        body = {"prompt": "Once", "max_tokens": 2}
        httpx.post(f"{url}/generate", json=body, headers={"traceparent": UNSAMPLED})
        httpx.get(f"{url}/health")
        httpx.post(f"{url}/secret/route", json=body)
        httpx.post(f"{url}/generate", json=body, headers={"traceparent": PARENT})
        spans = collector.wait_for(lambda spans: len(spans) >= 5)
    assert {span.trace_id.hex() for span in spans} == {PARENT.split("-")[1]}


def test_refused_failed_and_abandoned_requests_say_so(model: Path, collector: Collector) -> None:
    def fail(*_: object) -> None:
        raise ValueError(SECRET)

    with traced(model, collector.url) as url:
        httpx.post(f"{url}/generate", json={"prompt": "Once", "max_tokens": -1})
        (refused,) = collector.wait_for(lambda spans: len(spans) == 1)
        assert attributes(refused)["http.response.status_code"] == 422
        body = {"prompt": "Once", "max_tokens": 2048, "stream": True}
        with httpx.stream("POST", f"{url}/generate", json=body) as answer:
            next(answer.iter_lines())
        spans = collector.wait_for(lambda spans: len(spans) == 3)
        assert [attributes(one)["error.type"] for one in spans if one.name.startswith("text")] == ["cancelled"]
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("slm_ray.generation.onnx_backend.OnnxBackend.decode", fail)
            httpx.post(f"{url}/generate", json={"prompt": "Once"})
        spans = collector.wait_for(lambda spans: len(spans) == 5)
        (failed,) = [one for one in spans if attributes(one).get("http.response.status_code") == 500]
        assert failed.status.code == failed.status.STATUS_CODE_ERROR
        assert attributes(children(failed, spans)[0])["error.type"] == "EngineError"
    assert SECRET.encode() not in b"".join(collector.bodies)


def test_times_are_those_of_the_request_where_the_clock_was_set_since_the_start(
    model: Path, collector: Collector, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a machine that slept, where perf_counter stands still meanwhile."""
    clock, later_ns = time.time_ns, 8 * 3600 * 10**9
    monkeypatch.setattr("opentelemetry.sdk.trace.time_ns", lambda: clock() + later_ns)
    monkeypatch.setattr(tracing.time, "time_ns", lambda: clock() + later_ns)
    with traced(model, collector.url) as url:
        httpx.post(f"{url}/generate", json={"prompt": "Once", "max_tokens": 2})
        spans = collector.wait_for(lambda spans: len(spans) == 5)
    (request,) = [span for span in spans if not span.parent_span_id]
    (story,) = children(request, spans)
    assert request.start_time_unix_nano <= story.start_time_unix_nano <= request.end_time_unix_nano


def test_who_has_no_key_writes_nothing_into_our_traces(model: Path, collector: Collector) -> None:
    key = "a-key-of-many-letters"
    settings = ApiSettings(otlp_endpoint=collector.url, key_digests=key_digests({"SLM_API_KEYS": key}))
    body = {"prompt": "Once", "max_tokens": 2}
    with running(model, settings) as url:
        assert httpx.post(f"{url}/generate", json=body, headers={"traceparent": PARENT}).status_code == 401
        own = {"Authorization": f"Bearer {key}"}
        assert httpx.post(f"{url}/generate", json=body, headers=own).status_code == 200
        spans = collector.wait_for(lambda spans: len(spans) >= 5)
    assert PARENT.split("-")[1] not in {span.trace_id.hex() for span in spans}


def test_what_a_stranger_sends_as_a_trace_is_not_logged(
    model: Path, collector: Collector, caplog: pytest.LogCaptureFixture
) -> None:
    with traced(model, collector.url) as url:
        for state in (SECRET, "a=1," * 300):
            headers = {"traceparent": PARENT, "tracestate": state}
            httpx.post(f"{url}/generate", json={"prompt": "Once", "max_tokens": 2}, headers=headers)
        httpx.post(f"{url}/generate", json={"prompt": "Once", "max_tokens": 2}, headers={"traceparent": "0" * 600})
    assert [record.getMessage() for record in caplog.records if "opentelemetry" in record.name] == []


@pytest.mark.parametrize("name", ["OTEL_EXPORTER_OTLP_HEADERS", "OTEL_EXPORTER_OTLP_TRACES_HEADERS"])
def test_a_key_in_another_form_is_refused_without_it(
    name: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    for value in ("Authorization: Bearer secret", "a=1, =secret"):
        monkeypatch.setenv(name, value)
        with pytest.raises(UserError, match=f"^{name} must hold headers as NAME=VALUE") as refused:
            app_config({"otlp_endpoint": "http://127.0.0.1:4318"})
        assert "secret" not in str(refused.value)
        app_config({})
    monkeypatch.setenv(name, 'a=1, b=Bearer c%3D, d="secret"')  # what only the SDK finds wrong
    app_config({"otlp_endpoint": "http://127.0.0.1:4318"})
    tracing.Tracer("http://127.0.0.1:4318").close()
    assert "secret" not in caplog.text


@pytest.mark.parametrize(
    ("variables", "name"),
    [
        ({}, "slm-ray"),
        ({"OTEL_SERVICE_NAME": "tales"}, "tales"),
        ({"OTEL_RESOURCE_ATTRIBUTES": "service.name=tales,a=b"}, "tales"),
    ],
)
def test_the_service_is_named_as_the_user_names_it(
    variables: dict[str, str], name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for variable, value in variables.items():
        monkeypatch.setenv(variable, value)
    tracer = tracing.Tracer("http://127.0.0.1:4318")
    tracer.close()
    assert tracer.resource.attributes["service.name"] == name


def test_spans_of_the_last_requests_are_sent_before_the_end(
    model: Path, collector: Collector, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The process that runs the server ends its replicas as soon as they are drained."""
    monkeypatch.setenv("OTEL_BSP_SCHEDULE_DELAY", "3600000")
    tracer = tracing.Tracer(collector.url)
    span = tracer.begin_request("/generate", {})

    async def end() -> None:
        flushed = asyncio.ensure_future(tracer.flush())
        await asyncio.sleep(0.05)
        assert not flushed.done() and collector.spans == []
        tracer.end_request(span)
        await flushed

    asyncio.run(end())
    assert [one.name for one in collector.spans] == ["POST /generate"]
    tracer.close()


def test_a_login_in_the_address_is_sent_and_never_said(
    model: Path, collector: Collector, caplog: pytest.LogCaptureFixture
) -> None:
    endpoint = collector.url.replace("//", "//me:pass%40word@")
    with caplog.at_level(logging.DEBUG), traced(model, endpoint) as url:
        httpx.post(f"{url}/generate", json={"prompt": "Once", "max_tokens": 2})
        collector.wait_for(lambda spans: len(spans) == 5)
    assert set(collector.logins) == {"Basic bWU6cGFzc0B3b3Jk"}
    shown = caplog.text + repr(ApiSettings(otlp_endpoint=endpoint)) + repr(app_config({"otlp_endpoint": endpoint}))
    assert "pass" not in shown and "bWU6" not in shown


def test_a_collector_that_is_away_is_said_once_and_costs_no_answer(
    model: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tracing, "SEND_TIMEOUT_S", 0.3)
    away = f"http://me:password@127.0.0.1:{free_port()}"
    with caplog.at_level(logging.WARNING), traced(model, away) as url:
        deadline = time.monotonic() + 60
        while "takes no spans" not in caplog.text:
            answer = httpx.post(f"{url}/generate", json={"prompt": "Once", "max_tokens": 2})
            assert answer.status_code == 200 and time.monotonic() < deadline
        for _ in range(3):
            assert httpx.post(f"{url}/generate", json={"prompt": "Once", "max_tokens": 2}).status_code == 200
    lines = [
        record.getMessage()
        for record in caplog.records
        if "opentelemetry" in record.name or "span" in record.getMessage()
    ]
    assert lines == [f"the collector at {away.replace('me:password@', '')}/v1/traces takes no spans: they are dropped, "
                     "and stories go on"]  # fmt: skip
    assert "password" not in caplog.text


def test_a_collector_that_took_nothing_is_left_alone_for_a_while(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else each of the last batches would wait for it when the process ends."""
    results: list[SpanExportResult | Exception] = [SpanExportResult.FAILURE, OSError(), SpanExportResult.SUCCESS]
    now = [100.0]

    class Inner:
        def export(self, spans: Any) -> SpanExportResult:
            if isinstance(result := results.pop(0), Exception):
                raise result
            return result

    monkeypatch.setattr(tracing.time, "monotonic", lambda: now[0])
    exporter = tracing.sparing(Inner(), "http://h/v1/traces")
    for later_s, left in ((0, 2), (tracing.RETRY_S / 2, 2), (tracing.RETRY_S, 1), (1, 1), (tracing.RETRY_S, 0)):
        now[0] += later_s
        exporter.export([])
        assert len(results) == left
    assert [record.getMessage().split(" ", 4)[4] for record in caplog.records] == [
        "takes no spans: they are dropped, and stories go on",
        "takes spans again",
    ]


@pytest.mark.parametrize(
    ("endpoint", "address"),
    [
        ("http://h:4318", "http://h:4318/v1/traces"),
        ("https://h/otlp/", "https://h/otlp/v1/traces"),
        ("http://h:4318/v1/traces", "http://h:4318/v1/traces"),
        ("http://key@h?a=1", "http://h/v1/traces?a=1"),
    ],
)
def test_the_address_is_that_of_traces(endpoint: str, address: str) -> None:
    assert tracing.split_login(endpoint)[0] == address
    check_otlp_endpoint(endpoint)


@pytest.mark.parametrize("endpoint", ["127.0.0.1:4318", "grpc://h:4317", "http://", "http://h:x", "http://[", "pass@h"])
def test_what_is_no_address_is_one_line_without_it(endpoint: str) -> None:
    with pytest.raises(UserError, match=r"^otlp_endpoint must be an address such as http://127\.") as refused:
        app_config({"otlp_endpoint": endpoint})
    assert json.dumps(endpoint) not in str(refused.value)


def test_without_the_packages_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"slm-ray\[otlp\]"):
        check_otlp_endpoint("http://127.0.0.1:4318")


def test_without_an_endpoint_nothing_is_made(model: Path) -> None:
    assert tracing.story_trace() is None
    app_config({})
