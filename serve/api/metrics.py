"""The metrics of `GET /metrics`: requests, tokens, queue and times, by version of the model.

In: what happened. Out: Prometheus' text form. Each replica has its own: a scrape through the proxy reaches one of them.
"""

from typing import Any, TypeVar

import prometheus_client as prometheus
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from slm_ray.generation.engine_thread import Load
from slm_ray.generation.request import Completion

_Metric = TypeVar("_Metric", Counter, Gauge, Histogram)
CONTENT_TYPE = prometheus.CONTENT_TYPE_LATEST
SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 300)
TOKEN_SECONDS = (0.0005, 0.001, 0.002, 0.004, 0.008, 0.016, 0.032, 0.064, 0.128, 0.256, 0.512)


class Metrics:
    """Counters of one application, in a registry of its own."""

    def __init__(self) -> None:
        self._registry = CollectorRegistry()

        def make(kind: type[_Metric], name: str, about: str, *labels: str, **options: Any) -> _Metric:
            return kind(f"slm_{name}", about, labels, registry=self._registry, **options)

        self._requests = make(Counter, "requests", "Requests by route and status", "route", "status")
        self._prompt_tokens = make(Counter, "prompt_tokens", "Tokens of prompts read", "version")
        self._tokens = make(Counter, "completion_tokens", "Tokens written", "version")
        self._first = make(
            Histogram, "time_to_first_token_seconds", "From request to first text", "version", buckets=SECONDS
        )
        self._each = make(
            Histogram, "time_per_token_seconds", "Between tokens after the first", "version", buckets=TOKEN_SECONDS
        )
        self._seconds = make(Histogram, "story_seconds", "From request to last token", "version", buckets=SECONDS)
        self._running = make(Gauge, "running_stories", "Stories being written")
        self._waiting = make(Gauge, "waiting_stories", "Stories that wait for a row")

    def count_story(self, version: str, completion: Completion, *, first_s: float, all_s: float) -> None:
        """Count a finished story."""
        written = len(completion.tokens)
        self._prompt_tokens.labels(version).inc(completion.prompt_tokens)
        self._tokens.labels(version).inc(written)
        self._first.labels(version).observe(first_s)
        self._seconds.labels(version).observe(all_s)
        if written > 1:
            self._each.labels(version).observe((all_s - first_s) / (written - 1))

    def count_answer(self, route: str, status: int) -> None:
        """Count an answer."""
        self._requests.labels(route, str(status)).inc()

    def text(self, load: Load) -> bytes:
        """Everything, in Prometheus' text form, with the load of now."""
        self._running.set(load.running)
        self._waiting.set(load.waiting)
        content: bytes = prometheus.generate_latest(self._registry)
        return content
