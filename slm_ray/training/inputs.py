"""What a run is given: its task, and the world around it.

In: from `preflight`, what to train on; from `train`, how the ranks hear of each other. Out: arguments of `loop.fit`.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from slm_ray.config.schema import TrainConfig
from slm_ray.dataset.batches import TokenStream
from slm_ray.runs.history import History
from slm_ray.runs.run_folder import RunFolder
from slm_ray.tokenization.tokenizer import Tokenizer
from slm_ray.tracking.mlflow_runs import Tracker


@dataclasses.dataclass(frozen=True, kw_only=True)
class Surroundings:
    """What the loop needs to know of the world. The defaults are one process alone."""

    rank: int = 0
    world_size: int = 1
    device: torch.device = dataclasses.field(default_factory=lambda: torch.device("cpu"))
    wrap: Callable[[nn.Module], nn.Module] = lambda module: module
    """Makes the gradients of all ranks one (DDP)."""
    all_sum: Callable[[Tensor], Tensor] = lambda values: values
    """Sums a tensor over the ranks."""
    report: Callable[[Mapping[str, Any]], None] = lambda _metrics: None
    """Called by every rank after each validation; a barrier."""
    is_stop_requested: Callable[[], bool] = lambda: False
    """Whether the run is to save and leave after this step; rank 0 is asked, and tells the others."""
    beat: Callable[[], None] = lambda: None
    """Called whenever something was done, for whoever watches over a rank that hangs."""

    @property
    def is_chief(self) -> bool:
        """Rank 0 writes and speaks."""
        return self.rank == 0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Task:
    """One run's input: all that `fit` works on."""

    config: TrainConfig
    max_steps: int
    data_fingerprint: str
    train: TokenStream
    validation: TokenStream
    tokenizer: Tokenizer
    folder: RunFolder
    tracker: Tracker

    @property
    def history(self) -> History:
        """The run's own record."""
        return History(self.folder.path / "metrics.jsonl")

    @property
    def eval_interval(self) -> int:
        """Steps between validations, resolved."""
        return self.config.eval_interval_steps or min(500, -(-self.max_steps // 8))
