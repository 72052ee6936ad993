"""The metrics of `GET /metrics`: requests, tokens, queue and times, by version of the model.

In: what happened. Out: Prometheus' text form. Each replica has its own: a scrape through the proxy reaches one of them.

What OpenTelemetry's conventions for generative models have a name for has it, in Prometheus' spelling
(https://opentelemetry.io/docs/specs/semconv/gen-ai/gen-ai-metrics/): `gen_ai.server.time_to_first_token` in seconds is
`gen_ai_server_time_to_first_token_seconds`. The rest begins with `slm_`.
"""

import dataclasses
from typing import Any, Literal, TypeVar

import prometheus_client as prometheus
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from slm_ray.generation.engine_thread import Load
from slm_ray.generation.request import Completion

_Metric = TypeVar("_Metric", Counter, Gauge, Histogram)
CONTENT_TYPE = prometheus.CONTENT_TYPE_LATEST
FIRST_SECONDS = (0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 30, 60)
"""The convention's, and two beyond, for a long queue."""
SECONDS = (0.01, 0.02, 0.04, 0.08, 0.16, 0.32, 0.64, 1.28, 2.56, 5.12, 10.24, 20.48, 40.96, 81.92, 163.84, 327.68)
"""The convention's, and two beyond, up to the longest time of a request."""
TOKEN_SECONDS = (0.0005, 0.001, 0.002, 0.004, 0.008, 0.016, 0.032, 0.064, 0.128, 0.256, 0.512)
"""Those of the convention begin at 0.01, which is slow for a small model."""
TOKENS = (1, 4, 16, 64, 256, 1024, 4096, 16384)
"""The convention's, as far as contexts go."""
PROVIDER = "slm-ray"
"""`gen_ai.provider.name`."""

LABELS = (
    "gen_ai_operation_name", "gen_ai_provider_name", "gen_ai_request_model", "gen_ai_response_model", "version"
)  # fmt: skip
"""Of the convention's metrics; `version` is ours, the registered version of the model."""
Operation = Literal["text_completion", "chat"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Story:
    """What was asked for, and of which model."""

    operation: Operation = "text_completion"
    model: str
    version: str


class Metrics:
    """Counters of one application, in a registry of its own."""

    def __init__(self) -> None:
        self._registry = CollectorRegistry()

        def make(kind: type[_Metric], name: str, about: str, *labels: str, **options: Any) -> _Metric:
            return kind(f"slm_{name}", about, labels, registry=self._registry, **options)

        self._requests = make(Counter, "requests", "Requests by route and status", "route", "status")
        self._prompt_tokens = make(Counter, "prompt_tokens", "Tokens of prompts read", "version")
        self._tokens = make(Counter, "completion_tokens", "Tokens written", "version")
        self._first = self._histogram("server_time_to_first_token_seconds", "From request to first text", FIRST_SECONDS)
        self._each = self._histogram(
            "server_time_per_output_token_seconds", "Between tokens after the first", TOKEN_SECONDS
        )
        self._seconds = self._histogram(
            "server_request_duration_seconds", "From request to last token of a story", SECONDS
        )
        self._usage = self._histogram("client_token_usage", "Tokens of a story", TOKENS, "gen_ai_token_type")
        self._running = make(Gauge, "running_stories", "Stories being written")
        self._waiting = make(Gauge, "waiting_stories", "Stories that wait for a row")

    def _histogram(self, name: str, about: str, buckets: tuple[float, ...], *labels: str) -> Histogram:
        names = (*LABELS, *labels)
        return Histogram(f"gen_ai_{name}", about, names, registry=self._registry, buckets=buckets)

    def count_story(self, story: Story, completion: Completion, *, first_s: float, all_s: float) -> None:
        """Count a finished story."""
        written, labels = len(completion.tokens), (story.operation, PROVIDER, story.model, story.model, story.version)
        self._prompt_tokens.labels(story.version).inc(completion.prompt_tokens)
        self._tokens.labels(story.version).inc(written)
        self._usage.labels(*labels, "input").observe(completion.prompt_tokens)
        self._usage.labels(*labels, "output").observe(written)
        self._first.labels(*labels).observe(first_s)
        self._seconds.labels(*labels).observe(all_s)
        if written > 1:
            self._each.labels(*labels).observe((all_s - first_s) / (written - 1))

    def count_answer(self, route: str, status: int) -> None:
        """Count an answer."""
        self._requests.labels(route, str(status)).inc()

    def text(self, load: Load) -> bytes:
        """Everything, in Prometheus' text form, with the load of now."""
        self._running.set(load.running)
        self._waiting.set(load.waiting)
        content: bytes = prometheus.generate_latest(self._registry)
        return content
