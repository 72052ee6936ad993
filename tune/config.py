"""What a sweep is: the config that its runs share, what is varied, and how.

In: fields, from presets and the command line. Out: a `SweepConfig`, checked once.
"""

import dataclasses
from collections.abc import Collection
from typing import Any, Literal

from slm_ray.config.fields import replaced
from slm_ray.config.schema import TrainConfig
from tune.space import Choices, Point, Space, load_space

MODEL_NAME = "tinystories"
LOWER_RATE = 0.43
NEEDS = {"--reduction-factor": ("scheduler", "asha"), "--batch-trials": ("search", "optuna")}
"""Options of a sweep that change nothing without a value of another one."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class SweepConfig(TrainConfig):
    """A sweep: what every run shares, and what is varied."""

    lr: tuple[float, ...] = (3e-3, 7e-3)
    """Learning rates of the grid; when not given, that of the preset and about half of it or less."""
    d_ff: tuple[int, ...] = (512, 1024)
    """Inner widths of the feed-forward block of the grid."""
    space: str = ""
    """YAML file of fields by their dotted names, each with a list of values or a range, log_range or int_range; instead
    of lr and d_ff."""
    search: Literal["grid", "random", "optuna"] = "grid"
    """All combinations, random ones, or those that Optuna (TPE) suggests after what came before."""
    num_trials: int = 0
    """Trials of a random or Optuna search."""
    batch_trials: int = 4
    """Trials that Optuna suggests at once; the next suggestions wait for the ends of all of them."""
    scheduler: Literal["none", "asha"] = "none"
    """asha: only the best of the trials go on behind each rung, by bits per byte (successive halving)."""
    reduction_factor: int = 3
    """With asha: one trial of so many goes on, and the next rung is so many times as far."""
    trial_steps: int = 0
    """Optimizer steps of a trial; 0 means a fifth of the full run, at most 200."""
    trial_workers: int = 1
    """Workers of a trial; as many trials run at once as the cluster has room for."""
    trial_retries: int = 1
    """Times that a trial that failed is tried again before it counts as failed."""
    heat_map: tuple[str, ...] = ()
    """Two fields of the space for the heat map; by default the two with the most values."""
    final: bool = True
    """Train the best point at the full budget and register it."""
    register: str = MODEL_NAME
    """Name under which the final model is registered; it becomes the champion if it is better than the one before."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.lr or not self.d_ff:
            raise ValueError("the grid is empty: give at least one --lr and one --d-ff")
        for name in ("trial_steps", "trial_retries", "num_trials"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} ({getattr(self, name)}) must not be negative")
        for name, least in (("trial_workers", 1), ("batch_trials", 1), ("reduction_factor", 2)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} ({getattr(self, name)}) must be at least {least}")
        if self.heat_map and len(set(self.heat_map)) != 2:
            raise ValueError("heat_map takes two fields of the space")


def rates_around(lr: float) -> tuple[float, float]:
    """The grid's own learning rates for a preset's: 7e-3 -> (3e-3, 7e-3)."""
    return float(f"{LOWER_RATE * lr:.0e}"), lr


def space_of(sweep: SweepConfig) -> Space:
    """What a sweep varies. Raises: UserError when its space file is not there or refused."""
    if sweep.space:
        return load_space(sweep.space)
    rates = {"optim.lr": Choices(tuple(dict.fromkeys(sweep.lr)))}
    if sweep.init_from and sweep.d_ff == SweepConfig.d_ff:  # given weights have one width
        return dict(rates)
    return rates | {"model.d_ff": Choices(tuple(dict.fromkeys(sweep.d_ff)))}


def run_config(sweep: SweepConfig, point: Point, **changes: Any) -> TrainConfig:
    """The training run of one point: what the sweep's runs share, and the point's values.

    Raises:
        ValueError: the config does not accept them.
    """
    shared = {field.name: getattr(sweep, field.name) for field in dataclasses.fields(TrainConfig)}
    values = dict(point)
    if "optim.lr" in point and sweep.optim.min_lr is not None and "optim.min_lr" not in point:
        values["optim.min_lr"] = min(sweep.optim.min_lr, point["optim.lr"])
    return replaced(TrainConfig(**(shared | changes)), values)


def ignored_option(words: Collection[str], sweep: SweepConfig) -> str:
    """Why an option of the command line changes nothing; empty where each does. `words` as in `fields_set_twice`."""
    for option, (field, value) in NEEDS.items():
        if option in words and getattr(sweep, field) != value:
            return f"{option[2:].replace('-', '_')} goes with --{field} {value}"
    return ""


def fields_set_twice(words: Collection[str], space: Space, is_short: bool) -> str:
    """Why an option of the command line contradicts the space; empty where none does.

    `words` are the options that were given, `--d-ff` and `--d_ff` alike as `--d-ff`.
    """
    for field in space:
        option = f"--{field.replace('_', '-')}"
        if option in words:
            instead = f"--{option.rpartition('.')[2]}" if is_short else "it in the space file"
            return f"{option} is what is swept: give {instead} its values"
    if given := [] if is_short else [option for option in ("--lr", "--d-ff") if option in words]:
        return f"{given[0]} is of the short form: with --space, give its values in the file"
    return ""
