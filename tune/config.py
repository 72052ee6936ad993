"""What a sweep is: the config that its runs share, and the grid.

In: fields, from presets and the command line. Out: a `SweepConfig`, checked once.
"""

import dataclasses
import itertools

from slm_ray.config.schema import TrainConfig

MODEL_NAME = "tinystories"


@dataclasses.dataclass(frozen=True, kw_only=True)
class SweepConfig(TrainConfig):
    """A sweep: what every run shares, and the grid."""

    lr: tuple[float, ...] = (1e-3, 3e-3)
    """Learning rates of the grid."""
    d_ff: tuple[int, ...] = (512, 1024)
    """Inner widths of the feed-forward block of the grid."""
    trial_steps: int = 0
    """Optimizer steps of a trial; 0 means a fifth of the full run, at most 200."""
    trial_workers: int = 1
    """Workers of a trial; as many trials run at once as the cluster has room for."""
    final: bool = True
    """Train the best point at the full budget and register it."""
    register: str = MODEL_NAME
    """Name under which the final model is registered; it becomes the champion if it is better than the one before."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.lr or not self.d_ff:
            raise ValueError("the grid is empty: give at least one --lr and one --d-ff")
        if self.trial_steps < 0 or self.trial_workers < 1:
            raise ValueError("trial_steps must not be negative, and trial_workers at least 1")

    @property
    def points(self) -> list[tuple[float, int]]:
        """The grid, in order, each (lr, d_ff) once."""
        return list(dict.fromkeys(itertools.product(self.lr, self.d_ff)))
