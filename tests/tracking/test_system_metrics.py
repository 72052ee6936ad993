"""What a run asks of its machine, at MLflow."""

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


def test_nothing_runs_where_nothing_is_tracked() -> None:
    with system_metrics.logged(NullTracker()):
        pass
