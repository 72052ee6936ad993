"""What a run asks of its machines: CPU, memory, disk, network and, where there is one, the GPU.

In: the tracker of a run, on one worker of each node. Out: MLflow's own system metrics (`system/...`, percent and
megabytes) at that run. They are MLflow's collectors; its monitor around them is not used, for it ends with the first
request that fails and may hold up the end of a run for minutes.
"""

import contextlib
import importlib.util
import logging
import os
import time
from collections.abc import Callable, Iterator
from typing import Any

from slm_ray import internals, periodic
from slm_ray.errors import one_line
from slm_ray.tracking.tracker import Tracker

LOGGER = logging.getLogger(__name__)
INTERVAL_S = 10.0
INTERVAL = "MLFLOW_SYSTEM_METRICS_SAMPLING_INTERVAL"


@contextlib.contextmanager
def logged(
    tracker: Tracker,
    *,
    node: str = "",
    interval_s: float = 0.0,
    has_gpu: bool = False,
    warn: Callable[[str], None] = LOGGER.warning,
) -> Iterator[None]:
    """Log this machine's metrics every `interval_s` while the body runs, and once at its end.

    The interval is MLFLOW_SYSTEM_METRICS_SAMPLING_INTERVAL or 10 s when not given. `node` stands in the names where a
    run has several machines: `system/NODE/cpu_utilization_percentage`. The step of a value is its time in Unix
    seconds, which grows over restarts too. `warn` is told once what is not measured; of a GPU only with `has_gpu`.
    """
    if not tracker.run_id:
        yield
        return
    collectors: list[Any] = []
    prefix = f"system/{node}/" if node else "system/"

    def start() -> None:
        collectors.extend(_collectors(has_gpu, warn))
        _sample(collectors)  # of the CPU, a first reading only marks the time from which the next one counts

    def log() -> None:
        values = {prefix + name: value for name, value in _sample(collectors).items()}
        tracker.log_metrics(values, int(time.time()))

    with periodic.every(interval_s or _interval_s(), log, at_start=start):
        yield


def _interval_s() -> float:
    """What the environment says, in seconds, or `INTERVAL_S` where that is no time."""
    with contextlib.suppress(ValueError):
        if (given := float(os.environ.get(INTERVAL) or 0)) > 0:
            return given
    return INTERVAL_S


def _collectors(has_gpu: bool, warn: Callable[[str], None]) -> list[Any]:
    """What there is to measure on this machine; `warn` is told why something is not."""
    collectors: list[Any] = []
    for kind, wants in (("CPU", True), ("Disk", True), ("Network", True), ("GPU", has_gpu)):
        try:
            collectors.append(_collector(kind))
        except Exception as error:  # no GPU, no driver, no nvidia-ml-py: each raises something else
            if wants:
                warn(f"the run has no {kind} metrics: {one_line(error)}")
    return collectors


def _collector(kind: str) -> Any:
    if kind == "GPU" and importlib.util.find_spec("pynvml") is None:
        raise ImportError("nvidia-ml-py is not installed (the extra `gpu` of this project)")
    make = internals.find(f"mlflow.system_metrics.metrics.{kind.lower()}_monitor:{kind}Monitor")
    if make is None:
        raise ImportError("this version of MLflow measures them otherwise")
    return make()


def _sample(collectors: list[Any]) -> dict[str, float]:
    """One reading of each collector; one that fails is left out."""
    values: dict[str, float] = {}
    for collector in collectors:
        with contextlib.suppress(Exception):
            collector.collect_metrics()
            values |= collector.aggregate_metrics()
        collector.clear_metrics()
    return values
