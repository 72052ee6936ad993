"""What a run tells Prometheus."""

import threading
from typing import Any

import pytest

from slm_ray.distributed import ray_metrics
from slm_ray.distributed.ray_metrics import FAILURES, FailureCounter, RayMetricsTracker


class Seen:
    """In place of Ray's metrics: what was set last, or counted, by name."""

    values: dict[str, float]
    runs: set[str]
    was_set: threading.Event

    def __init__(self, name: str, about: str, tag_keys: tuple[str, ...]) -> None:
        assert tag_keys == ("run",)
        self.name = name

    def set_default_tags(self, tags: dict[str, str]) -> "Seen":
        self.runs.add(tags["run"])
        return self

    def set(self, value: float) -> None:
        self.values[self.name] = value
        self.was_set.set()

    def inc(self, value: float, tags: dict[str, str]) -> None:
        self.runs.add(tags["run"])
        self.values[self.name] = self.values.get(self.name, 0) + value


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> type[Seen]:
    class OfThisTest(Seen):
        values: dict[str, float] = {}  # noqa: RUF012  # one for all instances is what is wanted
        runs: set[str] = set()  # noqa: RUF012
        was_set = threading.Event()

    monkeypatch.setattr(ray_metrics, "Gauge", OfThisTest)
    monkeypatch.setattr(ray_metrics, "Counter", OfThisTest)
    return OfThisTest


def test_gauges_show_the_last_figures_and_what_was_not_measured_is_not_shown(seen: type[Seen]) -> None:
    tracker = RayMetricsTracker("tales", max_steps=100, workers=2)
    tracker.log_metrics({"train_loss": 3.0, "tokens_per_s": 1000.0, "no_gauge": 1.0}, step=10)
    tracker.log_metrics({"val_loss": 2.5}, step=20)
    tracker.show()
    assert seen.runs == {"tales"}
    assert seen.values == {
        "slm_train_max_steps": 100,
        "slm_train_workers": 2,
        "slm_train_step": 20,
        "slm_train_loss": 3.0,
        "slm_train_tokens_per_second": 1000.0,
        "slm_train_validation_loss": 2.5,
    }


def test_gauges_are_set_again_and_again_since_ray_forgets_them(
    seen: type[Seen], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ray_metrics, "SHOW_EVERY_S", 0.01)
    tracker = RayMetricsTracker("tales", max_steps=100, workers=2)
    with tracker.shown():
        for _ in range(3):
            seen.was_set.clear()
            assert seen.was_set.wait(10)
    assert seen.values["slm_train_workers"] == 2


def test_failures_are_counted_in_the_process_that_sees_them(seen: type[Seen]) -> None:
    import cloudpickle

    sent: Any = cloudpickle.loads(cloudpickle.dumps(FailureCounter("tales")))  # as Ray Train sends it to its controller
    assert seen.values == {}
    for _ in range(2):
        sent.after_exception(run_context=None, worker_exceptions={0: OSError()})
    assert (seen.values, seen.runs) == ({FAILURES[0]: 2}, {"tales"})
