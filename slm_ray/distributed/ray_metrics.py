"""What a run tells Prometheus, through Ray's metrics, which each node of a cluster exports.

In: the figures that rank 0 logs, and the failures that Ray Train's controller sees. Out: gauges and a counter, with the
run's name. Prometheus knows each as `ray_` and its name; `infra/monitoring` has a dashboard and alerts over them.
"""

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

from ray.train import UserCallback
from ray.util.metrics import Counter, Gauge

from slm_ray import periodic
from slm_ray.tracking.tracker import NullTracker

FIGURES = {
    "train_loss": ("slm_train_loss", "Training loss of the last interval, nats a token"),
    "val_loss": ("slm_train_validation_loss", "Loss on the validation split, nats a token"),
    "val_bits_per_byte": ("slm_train_validation_bits_per_byte", "Bits per byte on the validation split"),
    "tokens_per_s": ("slm_train_tokens_per_second", "Tokens a second, of all workers"),
    "mfu": ("slm_train_mfu", "Share of the machine's measured peak, 0 to 1"),
    "data_share": ("slm_train_data_share", "Share of rank 0's time spent on reading batches, 0 to 1"),
    "grad_norm": ("slm_train_gradient_norm", "Norm of the gradient before clipping"),
    "lr": ("slm_train_learning_rate", "Learning rate"),
}
"""What the loop logs, and the gauge that shows it."""
FACTS = {
    "step": ("slm_train_step", "Optimizer steps done"),
    "max_steps": ("slm_train_max_steps", "Optimizer steps of the whole run"),
    "workers": ("slm_train_workers", "Workers that train together"),
}
FAILURES = ("slm_train_failures", "Times that the workers of a run failed, and others took their place")
RUN = "run"
SHOW_EVERY_S = 5.0
"""Ray forgets a gauge that was not set within two of its reports, which come every 10 s."""


class RayMetricsTracker(NullTracker):
    """A tracker that sets gauges, on rank 0; they end with its process."""

    def __init__(self, run: str, max_steps: int, workers: int) -> None:
        self._gauges = {
            name: Gauge(*about, tag_keys=(RUN,)).set_default_tags({RUN: run})
            for name, about in (FIGURES | FACTS).items()
        }
        self._values: dict[str, float] = {"max_steps": max_steps, "workers": workers}

    def log_metrics(self, metrics: Mapping[str, float], step: int) -> None:
        """Take the values of now; what has no gauge is left out."""
        self._values |= {name: value for name, value in metrics.items() if name in FIGURES} | {"step": step}

    def show(self) -> None:
        """Set the gauges to the last values."""
        for name, value in self._values.copy().items():
            self._gauges[name].set(value)

    @contextlib.contextmanager
    def shown(self) -> Iterator[None]:
        """Within the block, set the gauges again and again, from a thread."""
        with periodic.every(SHOW_EVERY_S, self.show):
            yield


class FailureCounter(UserCallback):  # type: ignore[misc]  # Ray is not typed
    """Counts the failures of a group of workers, in the process of Ray Train's controller, which outlives them."""

    def __init__(self, run: str) -> None:
        self._run = run
        self._counter: Any = None  # made where it counts: this object is sent there

    def after_exception(self, *_: Any, **__: Any) -> None:
        """Called when workers failed, before others take their place."""
        self._counter = self._counter or Counter(*FAILURES, tag_keys=(RUN,))
        self._counter.inc(1, {RUN: self._run})
