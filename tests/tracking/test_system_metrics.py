"""What a run asks of its machine, at MLflow."""

import sys
import threading

import pytest

from slm_ray import internals
from slm_ray.tracking import mlflow_runs, system_metrics
from slm_ray.tracking.tracker import NullTracker

CPU = "system/cpu_utilization_percentage"


def test_a_run_has_the_metrics_of_its_machine_however_short_it_was(mlflow_uri: str) -> None:
    tracker = mlflow_runs.start_run(mlflow_uri, "tests", "a run", {})
    with system_metrics.logged(tracker):
        pass
    with system_metrics.logged(tracker, node="node-1", interval_s=0.01):
        pass
    tracker.close()
    store = mlflow_runs.client(mlflow_uri)
    metrics = store.get_run(tracker.run_id).data.metrics
    assert 0 <= metrics[CPU] <= 100
    assert metrics["system/system_memory_usage_megabytes"] > 0
    assert 0 < metrics["system/node-1/system_memory_usage_percentage"] <= 100


def test_nothing_runs_where_nothing_is_tracked(monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*given: object) -> None:
        raise AssertionError("measured for nobody")

    monkeypatch.setattr(internals, "find", never)
    before = threading.enumerate()
    with system_metrics.logged(NullTracker(), has_gpu=True, warn=never):
        assert threading.enumerate() == before


class Recorder(NullTracker):
    """A tracker of a run, which keeps the names of what it is given."""

    run_id = "a run"

    def __init__(self) -> None:
        self.names: set[str] = set()

    def log_metrics(self, metrics: object, step: int) -> None:
        self.names.update(metrics)


@pytest.mark.parametrize(("has_gpu", "expected"), [(True, 1), (False, 0)])
def test_a_gpu_that_cannot_be_measured_is_said_once_and_only_where_there_is_one(
    has_gpu: bool, expected: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", None)
    said, tracker = list[str](), Recorder()
    with system_metrics.logged(tracker, interval_s=0.01, has_gpu=has_gpu, warn=said.append):
        pass
    assert len(said) == expected
    assert all(text.startswith("the run has no GPU metrics: nvidia-ml-py is not installed") for text in said)
    assert CPU in tracker.names


def test_a_mlflow_without_its_collectors_costs_those_metrics_and_a_line_each(monkeypatch: pytest.MonkeyPatch) -> None:
    find = internals.find
    monkeypatch.setattr(internals, "find", lambda name: None if "cpu_" in name or "disk_" in name else find(name))
    said, tracker = list[str](), Recorder()
    with system_metrics.logged(tracker, warn=said.append):
        pass
    assert [text.partition(" metrics")[0] for text in said] == ["the run has no CPU", "the run has no Disk"]
    assert tracker.names and CPU not in tracker.names


@pytest.mark.parametrize(("given", "expected"), [("3", 3.0), ("", 10.0), ("soon", 10.0), ("-1", 10.0)])
def test_the_interval_is_that_of_the_environment(given: str, expected: float, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = list[float]()
    every = system_metrics.periodic.every
    monkeypatch.setenv(system_metrics.INTERVAL, given)
    monkeypatch.setattr(
        system_metrics.periodic, "every", lambda interval_s, *rest, **more: seen.append(interval_s) or every(60, *rest)
    )
    with system_metrics.logged(Recorder()):
        pass
    assert seen == [expected]
