"""What the tests of faults share: a small run, the same run without a fault, and what must be equal in the end."""

import dataclasses
from pathlib import Path
from typing import Any

import torch

from slm_ray.config.schema import TrainConfig
from slm_ray.runs import checkpoint, verification
from slm_ray.runs.history import History
from slm_ray.runs.ownership import MARK
from slm_ray.runs.run_folder import CORRUPT, RunFolder
from slm_ray.tracking import mlflow_runs
from slm_ray.tracking.tracker import NullTracker
from slm_ray.training.context import TrainContext
from slm_ray.training.inputs import TrainInputs, load_inputs
from slm_ray.training.loop import fit
from slm_ray.training.preflight import resolve


def with_dropout(config: TrainConfig) -> TrainConfig:
    """The run with dropout on, and without tracker and stories on the way."""
    model = dataclasses.replace(config.model, dropout=0.1)
    return dataclasses.replace(config, model=model, tracking_uri=mlflow_runs.OFF, sample_prompt="")


def inputs_of(config: TrainConfig, **changes: Any) -> TrainInputs:
    return load_inputs(resolve(dataclasses.replace(config, **changes), lambda _: 1), NullTracker())


def folder_of(config: TrainConfig) -> RunFolder:
    return RunFolder(Path(config.output) / config.name)


def losses(folder: RunFolder, name: str = "train_loss") -> dict[int, float]:
    return dict(zip(*History(folder.path / "metrics.jsonl").series(name), strict=True))


def assert_same_run(folder: RunFolder, expected: RunFolder) -> None:
    """The same losses and the same weights, to the last bit."""
    assert losses(folder) == losses(expected)
    assert losses(folder, "val_loss") == losses(expected, "val_loss")
    ours, theirs = (checkpoint.load_model(one.latest)[0].state_dict() for one in (folder, expected))
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in ours.items())


def assert_no_orphans(folder: RunFolder) -> None:
    """Nothing but the run: its record, its links, and complete checkpoints, no more than it is to keep."""
    allowed = {"best", "latest", "checkpoints", "metrics.jsonl", "summary.json", "loss.png", "mlflow.id", MARK}
    assert {path.name for path in folder.path.iterdir()} <= allowed
    assert len(folder.checkpoints()) <= 3
    there = sorted(path for path in (folder.path / "checkpoints").iterdir() if path.suffix != CORRUPT)
    assert folder.checkpoints() == there
    for path in folder.checkpoints():
        verification.verify(path)


def messages(folder: RunFolder) -> list[str]:
    return [line["message"] for line in History(folder.path / "metrics.jsonl").lines() if "message" in line]


def run_without_faults(config: TrainConfig) -> RunFolder:
    """The same run with one worker in this process, uninterrupted, under another name."""
    inputs = inputs_of(config, name=f"{config.name}-without-faults")
    fit(inputs, TrainContext())
    return inputs.folder
