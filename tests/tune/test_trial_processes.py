"""Trials of one worker: Tune's own process trains them, one after another, as each would be trained alone."""

import dataclasses
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from slm_ray.config.schema import TrainConfig
from slm_ray.distributed.worker_process import run_here
from slm_ray.errors import UserError
from slm_ray.locks.lease import LeaseLostError
from slm_ray.runs.run_folder import RunFolder
from slm_ray.tracking import mlflow_runs
from slm_ray.training.preflight import resolve
from tests.support.fault_runs import assert_same_run, losses, run_without_faults, with_dropout
from tune import trials as trials_module
from tune.config import SweepConfig
from tune.running import run_sweep

pytestmark = pytest.mark.ray


def sweep_of(config: TrainConfig, **changes: Any) -> SweepConfig:
    shared = {field.name: getattr(config, field.name) for field in dataclasses.fields(TrainConfig)}
    own = {"tracking_uri": mlflow_runs.OFF, "register": "", "name": "s", "final": False}
    return SweepConfig(**(shared | own | changes))


@pytest.mark.slow
def test_one_process_trains_trial_after_trial_as_if_each_were_alone(
    tiny_config: TrainConfig, local_ray: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = with_dropout(tiny_config)
    real, seen = trials_module.train_trial, tmp_path / "seen"

    def noted(plain: Mapping[str, Any], *rest: Any) -> None:
        with seen.open("a") as file:
            file.write(f"{os.getpid()}\n")
        real(plain, *rest)

    monkeypatch.setattr(trials_module, "train_trial", noted)
    rates, most_cpus = (1e-2, 3e-3, 1e-3), 2.0  # one trial at a time
    trials, _ = run_sweep(sweep_of(config, lr=rates, d_ff=(64,), trial_steps=8, cpus_per_worker=most_cpus))
    assert len(trials) == len(rates)
    pids = seen.read_text().split()
    assert len(pids) == len(rates)
    assert len(set(pids)) == 1, "each trial had a process of its own"
    for lr in rates:
        optim = dataclasses.replace(config.optim, lr=lr)
        model = dataclasses.replace(config.model, d_ff=64)
        alone = dataclasses.replace(config, optim=optim, model=model, name=f"alone-{lr:g}", sample_prompt="")
        trial = RunFolder(Path(config.output) / "s" / "trials" / f"lr{lr:g}-dff64")
        assert_same_run(trial, run_without_faults(alone))


def given_of(config: TrainConfig) -> dict[str, Any]:
    plain = dataclasses.asdict(resolve(config, lambda _: 1))
    return {"config": plain, "run_id": "", "pause_at": 0, "tracking_uri": mlflow_runs.OFF, "lease": ""}


def test_a_run_that_has_become_another_drivers_is_left(tiny_config: TrainConfig, local_ray: Any) -> None:
    config = dataclasses.replace(tiny_config, tracking_uri=mlflow_runs.OFF, log_interval_steps=1, sample_prompt="")
    work = iter(range(100))

    def still_ours() -> None:
        if next(work) == 4:
            raise LeaseLostError("another driver has it")

    with pytest.raises(LeaseLostError):
        run_here(given_of(config), lambda _: None, still_ours)
    folder = RunFolder(Path(config.output) / config.name)
    assert max(losses(folder), default=0) < config.max_steps
    run_here(given_of(config), lambda _: None, lambda: None)  # as the other driver would
    assert max(losses(folder)) == config.max_steps


def test_each_validation_is_told_and_a_mistake_is_left_in_the_folder(tiny_config: TrainConfig, local_ray: Any) -> None:
    config = dataclasses.replace(tiny_config, tracking_uri=mlflow_runs.OFF, sample_prompt="")
    told: list[Mapping[str, Any]] = []
    run_here(given_of(config), told.append, lambda: None)
    assert [one["step"] for one in told] == [4, 8]
    broken = dataclasses.replace(config, name="broken", data=str(Path(config.output) / "nothing"))
    with pytest.raises(UserError):
        run_here(given_of(broken), told.append, lambda: None)
