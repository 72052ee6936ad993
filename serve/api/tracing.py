"""Spans of requests, sent to a collector by OTLP: what a request waited for, and how long.

In: an endpoint, and requests with or without W3C's `traceparent`. Out: for each request that asks for stories a span
with its route and status; below it one for each story, with the attributes of OpenTelemetry's conventions for
generative models (model, tokens read and written, why it ended), and below that `queue`, `prefill` and `decode`. Never
a prompt, a story or a key.

A thread of the SDK sends them, in batches. A collector that does not answer is said once; what finds no place in the
queue of the SDK is dropped.
"""

import asyncio
import base64
import contextlib
import contextvars
import dataclasses
import logging
import time
import urllib.parse
from collections.abc import Sequence
from concurrent.futures import Future
from typing import Any

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from serve.api.metrics import PROVIDER, Story
from slm_ray.errors import without_secrets
from slm_ray.generation.request import Completion

LOGGER = logging.getLogger(__name__)
SERVICE = "slm-ray"
SIGNAL_PATH = "/v1/traces"
SEND_TIMEOUT_S = 5.0
RETRY_S = 10.0
"""How long a collector is left alone that did not take spans."""
_OPEN_POLL_S = 0.01
_NOISY = ("opentelemetry.exporter.otlp", "opentelemetry.sdk._shared_internal", "opentelemetry.sdk.trace",
          "opentelemetry.trace", "opentelemetry.util")  # fmt: skip
"""Loggers of a line for each batch, with the address in it, of what strangers send, and of keys that are none."""
_SERVER_ERROR = 500
PHASES = ("queue", "prefill", "decode")
"""Spans below a story's: it waits for a slot, its prompt is read, it is written."""
_REQUEST: contextvars.ContextVar["_Request | None"] = contextvars.ContextVar("request", default=None)


def split_login(endpoint: str) -> tuple[str, dict[str, str]]:
    """The address to which spans are posted, and the headers for the user and the password that were in it.

    `http://me:key@host:4318` -> `("http://host:4318/v1/traces", {"authorization": "Basic bWU6a2V5"})`.
    """
    parts = urllib.parse.urlsplit(endpoint)
    login, _, place = parts.netloc.rpartition("@")
    path = parts.path.rstrip("/")
    path = path if path.endswith(SIGNAL_PATH) else path + SIGNAL_PATH
    address = urllib.parse.urlunsplit((parts.scheme, place, path, parts.query, ""))
    headers = {}
    if login:
        coded = base64.b64encode(urllib.parse.unquote(login).encode()).decode("ascii")
        headers["authorization"] = f"Basic {coded}"
    return address, headers


class Tracer:
    """Makes spans and sends them, until the process ends."""

    def __init__(self, endpoint: str) -> None:
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.resources import OTELResourceDetector, Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor

        for name in _NOISY:
            logging.getLogger(name).setLevel(logging.CRITICAL + 1)
        address, headers = split_login(endpoint)
        exporter = OTLPSpanExporter(address, headers=headers or None, timeout=SEND_TIMEOUT_S)
        named = OTELResourceDetector().detect().attributes  # by the user, in OTEL_SERVICE_NAME or another variable
        self.resource = Resource.create({"service.name": SERVICE, **named})
        self._provider = TracerProvider(resource=self.resource, shutdown_on_exit=True)
        self._provider.add_span_processor(BatchSpanProcessor(sparing(exporter, address)))
        self._tracer = self._provider.get_tracer("serve.api")
        self._open = 0  # spans of requests that have not ended

    def begin(self, name: str, attributes: dict[str, Any], parent: Any = None, began_ns: int | None = None) -> Any:
        """A span that has begun: of a request, or below the span `parent`."""
        from opentelemetry.trace import SpanKind, set_span_in_context

        context = set_span_in_context(parent)
        return self._tracer.start_span(name, context, SpanKind.INTERNAL, attributes, start_time=began_ns)

    def begin_request(self, route: str, headers: dict[str, str]) -> Any:
        """The span of a request, below that of its `traceparent` where there is one."""
        from opentelemetry.trace import SpanKind
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        context = TraceContextTextMapPropagator().extract(headers)
        attributes = {"http.request.method": "POST", "http.route": route}
        self._open += 1
        return self._tracer.start_span(f"POST {route}", context, SpanKind.SERVER, attributes)

    def end_request(self, span: Any) -> None:
        """The answer is sent, or nobody waits for it."""
        span.end()
        self._open -= 1

    def close(self) -> None:
        """Make no more."""
        self._provider.shutdown()

    async def flush(self) -> None:
        """Wait for the last requests, send what there is, and wait for that; all within `SEND_TIMEOUT_S`."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(SEND_TIMEOUT_S / 2):
                while self._open:
                    await asyncio.sleep(_OPEN_POLL_S)
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(asyncio.to_thread(self._provider.force_flush), SEND_TIMEOUT_S / 2)


def sparing(exporter: Any, address: str) -> Any:
    """An exporter around another that leaves a collector alone for a while which does not take spans.

    It says so in one line, and again when it does: for each batch to wait would hold up the end of the process.
    """
    from opentelemetry.sdk.trace.export import SpanExporter, SpanExportResult

    class Sparing(SpanExporter):  # its base class is not there without the extra
        def __init__(self) -> None:
            self._works, self._again_s = True, float("-inf")

        def export(self, spans: Sequence[Any]) -> SpanExportResult:
            if not self._works and time.monotonic() < self._again_s:
                return SpanExportResult.FAILURE
            try:
                result: SpanExportResult = exporter.export(spans)
            except Exception:
                result = SpanExportResult.FAILURE
            works = result is SpanExportResult.SUCCESS
            if works != self._works:
                said = "takes spans again" if works else "takes no spans: they are dropped, and stories go on"
                LOGGER.warning("the collector at %s %s", without_secrets(address), said)
            self._works, self._again_s = works, time.monotonic() + RETRY_S
            return result

        def shutdown(self) -> None:
            exporter.shutdown()

        def force_flush(self, timeout_millis: int = 30_000) -> bool:
            return bool(exporter.force_flush(timeout_millis))

    return Sparing()


@dataclasses.dataclass(frozen=True)
class _Request:
    """The request that is being answered."""

    tracer: Tracer
    span: Any


class StoryTrace:
    """One story of a request that is traced, from now on."""

    def __init__(self, request: _Request) -> None:
        self._request = request
        self._began_s = time.perf_counter()
        self._clock_ns = time.time_ns() - time.perf_counter_ns()  # of now: a machine that slept has another

    def end(self, story: Story, future: "Future[Completion]") -> None:
        """Make its spans, once it is finished, failed or cancelled."""
        ended_s = time.perf_counter()
        attributes: dict[str, Any] = {
            "gen_ai.operation.name": story.operation,
            "gen_ai.provider.name": PROVIDER,
            "gen_ai.request.model": story.model,
            "gen_ai.response.model": story.model,
            "slm_ray.model.version": story.version,
        }
        fault = "cancelled" if future.cancelled() else future.exception()
        if fault is None:
            completion = future.result()
            attributes |= {
                "gen_ai.usage.input_tokens": completion.prompt_tokens,
                "gen_ai.usage.output_tokens": len(completion.tokens),
                "gen_ai.response.finish_reasons": [completion.finish_reason],
            }
        else:
            attributes["error.type"] = fault if isinstance(fault, str) else type(fault).__name__
        span = self._span(f"{story.operation} {story.model}", self._began_s, self._request.span, attributes)
        if fault is None:
            times_s = (self._began_s, *completion.reading_s, ended_s)
            for name, began_s, until_s in zip(PHASES, times_s, times_s[1:]):
                self._span(name, began_s, span, {}).end(self._epoch_ns(until_s))
        span.end(self._epoch_ns(ended_s))

    def _span(self, name: str, began_s: float, parent: Any, attributes: dict[str, Any]) -> Any:
        return self._request.tracer.begin(name, attributes, parent, self._epoch_ns(began_s))

    def _epoch_ns(self, perf_counter_s: float) -> int:
        return int(perf_counter_s * 1e9) + self._clock_ns


def story_trace() -> StoryTrace | None:
    """That of a story of the request which is being answered; None where requests are not traced."""
    request = _REQUEST.get()
    return None if request is None else StoryTrace(request)


class TraceMiddleware:
    """Makes a span of every POST to one of `routes`."""

    def __init__(self, app: ASGIApp, tracer: Tracer, routes: frozenset[str]) -> None:
        self._app, self._tracer, self._routes = app, tracer, routes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one connection."""
        if scope["type"] != "http" or scope["method"] != "POST" or scope["path"] not in self._routes:
            return await self._app(scope, receive, send)
        span = self._tracer.begin_request(scope["path"], _trace_headers(scope))

        async def note(message: Message) -> None:
            if message["type"] == "http.response.start":
                _note_status(span, message["status"])
            await send(message)

        token = _REQUEST.set(_Request(self._tracer, span))
        try:
            await self._app(scope, receive, note)
        except Exception as error:  # it is answered outside of all middlewares
            _note_status(span, _SERVER_ERROR, type(error).__name__)
            raise
        finally:
            _REQUEST.reset(token)
            self._tracer.end_request(span)
        return None


def _note_status(span: Any, status: int, error: str = "") -> None:
    from opentelemetry.trace import StatusCode

    span.set_attribute("http.response.status_code", status)
    if status >= _SERVER_ERROR:
        span.set_attribute("error.type", error or str(status))
        span.set_status(StatusCode.ERROR)


def _trace_headers(scope: Scope) -> dict[str, str]:
    """W3C's; of a `traceparent` that is there twice nobody knows which is meant."""
    names = [name for name, _ in scope["headers"]]
    if names.count(b"traceparent") != 1:
        return {}
    return {
        name.decode("latin-1"): value.decode("latin-1")
        for name, value in scope["headers"]
        if name in (b"traceparent", b"tracestate")
    }
