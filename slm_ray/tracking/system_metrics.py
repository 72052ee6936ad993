"""What a run asks of its machines: CPU, memory, disk, network and, where there is one, the GPU.

In: the tracker of a run, on one worker of each node. Out: MLflow's own system metrics (`system/...`, percent and
megabytes) at that run. They are MLflow's collectors; its monitor around them is not used, for it ends with the first
request that fails and may hold up the end of a run for minutes.
"""

import contextlib
import threading
import time
from collections.abc import Iterator
from typing import Any

from slm_ray.tracking.mlflow_runs import Tracker

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
    is_over = threading.Event()
    thread = threading.Thread(target=_follow, args=(tracker, node, interval_s, is_over), daemon=True)
    thread.start()
    try:
        yield
    finally:
        is_over.set()
        thread.join()


def _follow(tracker: Tracker, node: str, interval_s: float, is_over: threading.Event) -> None:
    from mlflow.environment_variables import MLFLOW_SYSTEM_METRICS_SAMPLING_INTERVAL

    interval_s = interval_s or MLFLOW_SYSTEM_METRICS_SAMPLING_INTERVAL.get() or INTERVAL_S
    collectors = _collectors()
    _sample(collectors)  # of the CPU, a first reading only marks the time from which the next one counts
    is_last = False
    while not is_last:
        is_last = is_over.wait(interval_s)
        values = _sample(collectors)
        prefix = f"system/{node}/" if node else "system/"
        tracker.log_metrics({prefix + name: value for name, value in values.items()}, int(time.time()))


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
