"""Runs that begin with given weights, without Ray."""

import dataclasses
from pathlib import Path
from typing import Any

from slm_ray.config.schema import TrainConfig
from slm_ray.dataset.manifest import load_manifest
from slm_ray.runs.outcome import RunSummary
from slm_ray.tracking.tracker import NullTracker
from slm_ray.training.context import TrainContext
from slm_ray.training.inputs import TrainInputs, load_inputs, plan_run
from slm_ray.training.loop import fit
from slm_ray.training.preflight import resolve
from slm_ray.training.starting_point import begun_from, starting_point


def begin(config: TrainConfig, origin: Path | str, name: str = "begun", **changes: Any) -> TrainInputs:
    """A run with the weights and the shape of a model, at step 0: what the driver does before any worker starts."""
    config = begun_from(dataclasses.replace(config, name=name, tracking_uri="none"), "", ["--init-from", str(origin)])
    shape = dataclasses.replace(config.model, **changes.pop("model", {}))
    config = resolve(dataclasses.replace(config, model=shape, **changes), lambda _: 1)
    starting_point(plan_run(config, load_manifest(config.data))).write("")
    return go_on(config)


def go_on(config: TrainConfig, **changes: Any) -> TrainInputs:
    """What a worker reads."""
    return load_inputs(dataclasses.replace(config, **changes), NullTracker())


def train(inputs: TrainInputs) -> RunSummary:
    return fit(inputs, TrainContext())
