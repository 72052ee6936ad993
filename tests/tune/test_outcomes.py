"""What a trial's folder says of it: at a rung, on the way, at its end."""

import dataclasses
from pathlib import Path

from slm_ray.config.schema import TrainConfig
from slm_ray.runs.outcome import RunStatus
from slm_ray.runs.run_folder import RunFolder
from slm_ray.tracking import mlflow_runs
from slm_ray.tracking.tracker import NullTracker
from slm_ray.training.context import TrainContext
from slm_ray.training.inputs import load_inputs
from slm_ray.training.loop import fit
from slm_ray.training.preflight import resolve
from tune.outcomes import failed_trial, trial_at, validations
from tune.results import TrialStatus


def train(config: TrainConfig, pause_at: int = 0, stop_at: int = 0) -> RunStatus:
    inputs = load_inputs(resolve(config, lambda _: 1), NullTracker())
    steps = iter(range(1, 1000))
    context = TrainContext(is_stop_requested=lambda: next(steps) == stop_at)
    return fit(dataclasses.replace(inputs, pause_at=pause_at), context).status


def test_a_trial_that_pauses_at_its_rungs_ends_as_one_that_does_not(tiny_config: TrainConfig) -> None:
    config = dataclasses.replace(
        tiny_config, tracking_uri=mlflow_runs.OFF, sample_prompt="", eval_interval_steps=2, log_interval_steps=3
    )
    point = {"optim.lr": config.optim.lr}
    assert trial_at(config, point, 2) is None
    assert train(config, pause_at=2) == RunStatus.STOPPED
    at_rung = trial_at(config, point, 2)
    assert at_rung is not None
    assert (at_rung.status, at_rung.step, at_rung.tokens) == (TrialStatus.STOPPED, 2, 2 * 8 * 32)
    assert trial_at(config, point, 4) is None
    assert trial_at(config, point, 8) is None
    assert train(config, pause_at=2) == RunStatus.STOPPED  # killed before it was known: nothing is trained twice
    assert train(config, pause_at=4, stop_at=1) == RunStatus.STOPPED  # at step 3
    assert trial_at(config, point, 4) is None
    failed = failed_trial(config, point, "killed")
    assert (failed.step, failed.status, failed.metrics) == (3, TrialStatus.FAILED, {})
    assert train(config, pause_at=4) == RunStatus.STOPPED
    assert train(config) == RunStatus.FINISHED

    whole = dataclasses.replace(config, name="whole")
    assert train(whole, pause_at=8) == RunStatus.FINISHED  # the last step is no pause
    folders = [RunFolder(Path(config.output) / name) for name in (config.name, "whole")]
    assert validations(config) == validations(whole)
    weights = [(folder.latest / "model" / "model.safetensors").read_bytes() for folder in folders]
    assert weights[0] == weights[1]
    for step in (2, 4, 6, 8):  # the early rungs stay what they were
        paused, straight = trial_at(config, point, step), trial_at(whole, point, step)
        assert paused is not None
        assert paused == straight
    assert trial_at(config, point, 2) == at_rung
