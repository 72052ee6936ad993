"""The metrics of a replica as Ray's own, so that one look at every node sees all replicas.

In: what `GET /metrics` of the replica says. Out: a gauge for each of its values, with the replica's name. Prometheus
knows each as `ray_` and its name: `ray_slm_requests_total`. They end with the replica's process.
"""

import logging
import time
from collections.abc import Callable

from fastapi import FastAPI
from prometheus_client.parser import text_string_to_metric_families
from ray.util.metrics import Gauge

from serve.api.metrics import Metrics

LOGGER = logging.getLogger(__name__)
EVERY_S = 5.0
"""Ray forgets a gauge that was not set within two of its reports, which come every 10 s."""
REPLICA = "replica"


def metrics_of(api: FastAPI) -> Metrics:
    """The counters of an application, which its middleware holds."""
    [found] = [held for one in api.user_middleware if isinstance(held := one.kwargs.get("metrics"), Metrics)]
    return found


class ReplicaMetrics:
    """Copies the values of one replica. Buckets and counts are copied as they are: nothing is counted twice."""

    def __init__(self, read: Callable[[], bytes], replica: str) -> None:
        self._read, self._replica = read, replica
        self._gauges: dict[str, Gauge] = {}
        self._copied_s = float("-inf")

    def look(self) -> None:
        """Copy the values of now, unless that was done a few seconds ago. A fault is logged: it must end no replica."""
        now = time.monotonic()
        if now - self._copied_s < EVERY_S:
            return
        self._copied_s = now
        try:
            self._copy()
        except Exception:
            LOGGER.exception("the metrics of this replica could not be copied")

    def _copy(self) -> None:
        for family in text_string_to_metric_families(self._read().decode()):
            for sample in family.samples:
                if not sample.name.endswith("_created"):
                    self._set(sample.name, family.documentation, sample.labels, sample.value)

    def _set(self, name: str, about: str, labels: dict[str, str], value: float) -> None:
        if name not in self._gauges:
            self._gauges[name] = Gauge(name, about, tag_keys=(REPLICA, *labels))
        self._gauges[name].set(value, {REPLICA: self._replica, **labels})
