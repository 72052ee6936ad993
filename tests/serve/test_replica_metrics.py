"""What a replica counts, as Ray's metrics."""

import logging
from typing import Any

import pytest

from serve import replica_metrics
from serve.api.metrics import Metrics, Story
from serve.api.routes import create_api
from serve.api.settings import ApiSettings
from serve.replica_metrics import ReplicaMetrics, metrics_of
from slm_ray.generation.engine_thread import Load
from slm_ray.generation.request import Completion

Values = dict[tuple[str, ...], float]


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> Values:
    """What was set, by name and labels."""
    values: Values = {}

    class Gauge:
        def __init__(self, name: str, about: str, tag_keys: tuple[str, ...]) -> None:
            self.name, self.tag_keys = name, tag_keys

        def set(self, value: float, tags: dict[str, str]) -> None:
            assert set(tags) == set(self.tag_keys)
            values[(self.name, *(f"{key}={tags[key]}" for key in sorted(tags)))] = value

    monkeypatch.setattr(replica_metrics, "Gauge", Gauge)
    return values


def story(metrics: Metrics, version: str) -> None:
    completion = Completion(text="a b", tokens=(5, 6), prompt_tokens=3, finish_reason="length")
    metrics.count_story(Story(model="m", version=version), completion, first_s=0.02, all_s=0.04)


def test_every_value_is_copied_with_its_labels_and_the_replica(seen: Values) -> None:
    metrics = Metrics()
    story(metrics, "1")
    story(metrics, "2")
    metrics.count_answer("/generate", 429)
    ReplicaMetrics(lambda: metrics.text(Load(2, 7)), "r1").look()
    assert seen["slm_completion_tokens_total", "replica=r1", "version=2"] == 2
    assert seen["slm_requests_total", "replica=r1", "route=/generate", "status=429"] == 1
    named = ["gen_ai_operation_name=text_completion", "gen_ai_provider_name=slm-ray", "gen_ai_request_model=m"]
    named += ["gen_ai_response_model=m"]
    first = "gen_ai_server_time_to_first_token_seconds_bucket"
    assert seen[(first, *named, "le=0.02", "replica=r1", "version=1")] == 1
    assert seen[(first, *named, "le=0.01", "replica=r1", "version=1")] == 0
    usage = ("gen_ai_client_token_usage_sum", *named)
    assert seen[(*usage, "gen_ai_token_type=output", "replica=r1", "version=2")] == 2
    assert seen[(*usage, "gen_ai_token_type=input", "replica=r1", "version=2")] == 3
    assert seen["slm_waiting_stories", "replica=r1"] == 7
    assert not any(name.endswith("_created") for name, *_ in seen)


def test_it_is_not_copied_more_often_than_needed(seen: Values, monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr(replica_metrics.time, "monotonic", lambda: now[0])
    metrics = Metrics()
    copy = ReplicaMetrics(lambda: metrics.text(Load(0, 0)), "r1")
    copy.look()
    metrics.count_answer("/", 200)
    now[0] += replica_metrics.EVERY_S / 2
    copy.look()
    counted = ("slm_requests_total", "replica=r1", "route=/", "status=200")
    assert counted not in seen
    now[0] += replica_metrics.EVERY_S
    copy.look()
    assert seen[counted] == 1


def test_a_fault_ends_no_replica(seen: Values, caplog: pytest.LogCaptureFixture) -> None:
    def read() -> bytes:
        raise RuntimeError("no numbers today")

    with caplog.at_level(logging.ERROR):
        ReplicaMetrics(read, "r1").look()
    assert "could not be copied" in caplog.text


def test_the_counters_of_an_application_are_found() -> None:
    rollout: Any = None  # asked for at the first request only
    assert isinstance(metrics_of(create_api(rollout, ApiSettings())), Metrics)
