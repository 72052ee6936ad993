"""What a run asks of its machines: CPU, memory, disk, network and, where there is one, the GPU.

In: the tracker of a run, on one worker of each node. Out: MLflow's own system metrics (`system/...`, percent and
megabytes) at that run. They are MLflow's collectors; its monitor around them is not used, for it ends with the first
request that fails and may hold up the end of a run for minutes.
"""

import contextlib
import time
from collections.abc import Iterator
from typing import Any

from slm_ray import periodic
from slm_ray.tracking.tracker import Tracker

INTERVAL_S = 10.0


@contextlib.contextmanager
def logged(tracker: Tracker, *, node: str = "", interval_s: float = 0.0) -> Iterator[None]:
    """Log this machine's metrics every `interval_s` while the body runs, and once at its end.

    The interval is MLFLOW_SYSTEM_METRICS_SAMPLING_INTERVAL or 10 s when not given. `node` stands in the names where a
    run has several machines: `system/NODE/cpu_utilization_percentage`. The step of a value is its time in Unix
    seconds, which grows over restarts too.
    """
    if not tracker.run_id:
        yield
        return
    from mlflow.environment_variables import MLFLOW_SYSTEM_METRICS_SAMPLING_INTERVAL

    collectors: list[Any] = []
    prefix = f"system/{node}/" if node else "system/"

    def start() -> None:
        collectors.extend(_collectors())
        _sample(collectors)  # of the CPU, a first reading only marks the time from which the next one counts

    def log() -> None:
        values = {prefix + name: value for name, value in _sample(collectors).items()}
        tracker.log_metrics(values, int(time.time()))

    interval_s = interval_s or MLFLOW_SYSTEM_METRICS_SAMPLING_INTERVAL.get() or INTERVAL_S
    with periodic.every(interval_s, log, at_start=start):
        yield


def _collectors() -> list[Any]:
    from mlflow.system_metrics.metrics.cpu_monitor import CPUMonitor
    from mlflow.system_metrics.metrics.disk_monitor import DiskMonitor
    from mlflow.system_metrics.metrics.gpu_monitor import GPUMonitor
    from mlflow.system_metrics.metrics.network_monitor import NetworkMonitor

    collectors: list[Any] = [CPUMonitor(), DiskMonitor(), NetworkMonitor()]
    with contextlib.suppress(Exception):  # no GPU, no driver, or no nvidia-ml-py: each raises something else
        collectors.append(GPUMonitor())
    return collectors


def _sample(collectors: list[Any]) -> dict[str, float]:
    """One reading of each collector; one that fails is left out."""
    values: dict[str, float] = {}
    for collector in collectors:
        with contextlib.suppress(Exception):
            collector.collect_metrics()
            values |= collector.aggregate_metrics()
        collector.clear_metrics()
    return values
