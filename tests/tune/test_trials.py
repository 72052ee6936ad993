"""What a trial's process makes of its end, and what is kept of a failure: without a Ray."""

import dataclasses
import os
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from ray.exceptions import ActorDiedError, OutOfMemoryError, RayTaskError

from slm_ray.config.schema import TrainConfig
from slm_ray.errors import UserError
from slm_ray.runs.remote_identity import MLFLOW_ID
from slm_ray.tracking import mlflow_runs
from slm_ray.tracking.tracker import NullTracker
from slm_ray.training.context import TrainContext
from slm_ray.training.inputs import load_inputs
from slm_ray.training.loop import fit
from slm_ray.training.preflight import resolve
from tune import trials
from tune.outcomes import ended_trial
from tune.results import TrialStatus
from tune.shown.view import Lines

pytestmark = pytest.mark.ray


@pytest.fixture
def config(tiny_config: TrainConfig, monkeypatch: pytest.MonkeyPatch) -> TrainConfig:
    monkeypatch.setattr(os, "environ", os.environ.copy())  # which a trial's process changes
    monkeypatch.setattr(trials, "TuneReportCallback", lambda: None)  # it is of Tune's processes
    return dataclasses.replace(tiny_config, tracking_uri=mlflow_runs.OFF, sample_prompt="")


def test_a_trial_that_diverges_has_a_result_and_has_not_failed(
    config: TrainConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = dataclasses.replace(config, optim=dataclasses.replace(config.optim, lr=1e6))

    def run(resumed: TrainConfig, **_: Any) -> None:
        here = dataclasses.replace(resumed, tracking_uri=mlflow_runs.OFF)
        raise UserError(fit(load_inputs(resolve(here, lambda _: 1), NullTracker()), TrainContext()).reason)

    monkeypatch.setattr(trials, "run_training", run)
    trials.train_trial(dataclasses.asdict(config), "", mlflow_runs.OFF, config.max_steps, "")
    trial = ended_trial(config, {"optim.lr": 1e6})
    assert trial is not None
    assert trial.status == TrialStatus.DIVERGED
    assert trial.reason


def test_any_other_mistake_is_a_failure(config: TrainConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    def run(*_: object, **__: object) -> None:
        raise UserError("another driver has it")

    monkeypatch.setattr(trials, "run_training", run)
    with pytest.raises(UserError, match="another driver has it"):
        trials.train_trial(dataclasses.asdict(config), "", mlflow_runs.OFF, config.max_steps, "")


def test_why_a_trial_failed_is_one_line_that_names_its_log(config: TrainConfig) -> None:
    log = Path(config.output) / "tiny.log"
    killed = trials._keep_failure(config, ActorDiedError())
    assert killed == f"its process was killed (ActorDiedError) (all of it in {log})"
    cause = OSError(28, "No space left on device")
    failed = trials._keep_failure(config, RayTaskError("train", "Traceback:\n  of many lines", cause))
    assert failed == f"[Errno 28] No space left on device (all of it in {log})"
    assert "of many lines" in log.read_text(encoding="utf-8")


def run_with(
    fit: Callable[[], list[Any]], config: TrainConfig, monkeypatch: pytest.MonkeyPatch, uri: str
) -> tuple[str, Callable[[], dict[str, str]]]:
    """A trial that has an MLflow run, and what runs it with a stand-in of Tune."""
    run_id = mlflow_runs.start_run(uri, "tests", "killed", {}).run_id
    folder = trials.run_folder(config)
    folder.path.mkdir(parents=True)
    (folder.path / MLFLOW_ID).write_text(run_id, encoding="ascii")
    monkeypatch.setattr(trials.tune, "Tuner", lambda *_, **__: SimpleNamespace(fit=fit))
    pinned: dict[str, Any] = {"origin_sha256": "", "teacher_sha256": (), "tracking_uri": uri}
    runner = trials.TrialRunner(folder=folder, at_once=1, parent_run_id="", view=Lines(1), **pinned)
    return run_id, lambda: runner.run({"one": config}, 8)


@pytest.mark.parametrize("how", [ActorDiedError(), OutOfMemoryError("of the node")])
def test_the_mlflow_run_of_a_trial_whose_process_was_killed_is_ended(
    how: Exception, config: TrainConfig, monkeypatch: pytest.MonkeyPatch, mlflow_uri: str
) -> None:
    """It was the run's driver too: nobody else can say that it failed."""
    killed = SimpleNamespace(config={"trial": "one"}, error=how)
    run_id, run = run_with(lambda: [killed], dataclasses.replace(config, workers=2), monkeypatch, mlflow_uri)
    assert "its process was killed" in run()["one"]
    assert mlflow_runs.client(mlflow_uri).get_run(run_id).info.status == "FAILED"


def test_the_mlflow_runs_of_trials_are_ended_when_the_sweep_is_interrupted(
    config: TrainConfig, monkeypatch: pytest.MonkeyPatch, mlflow_uri: str
) -> None:
    def fit() -> list[Any]:
        raise KeyboardInterrupt

    run_id, run = run_with(fit, dataclasses.replace(config, workers=2), monkeypatch, mlflow_uri)
    with pytest.raises(KeyboardInterrupt):
        run()
    assert mlflow_runs.client(mlflow_uri).get_run(run_id).info.status == "KILLED"


def test_the_mlflow_run_of_a_trial_that_another_driver_has_is_left_to_it(
    config: TrainConfig, monkeypatch: pytest.MonkeyPatch, mlflow_uri: str
) -> None:
    """Its process lived to say so; had the run been its own, it would have ended it."""
    refused = SimpleNamespace(config={"trial": "one"}, error=RayTaskError("train", "", UserError("another has it")))
    run_id, run = run_with(lambda: [refused], dataclasses.replace(config, workers=2), monkeypatch, mlflow_uri)
    assert run()["one"].startswith("another has it")
    assert mlflow_runs.client(mlflow_uri).get_run(run_id).info.status == "RUNNING"


def test_a_store_that_is_away_is_not_waited_for_once_a_trial(
    config: TrainConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []

    def hang(_uri: str, run_id: str, _status: str) -> None:
        asked.append(run_id)
        raise OSError("no answer")

    folder = trials.run_folder(config)
    folder.path.mkdir(parents=True)
    (folder.path / MLFLOW_ID).write_text("r1", encoding="ascii")
    monkeypatch.setattr(trials, "end_lost_run", hang)
    monkeypatch.setattr(trials, "AWAY_S", 0.0)
    pinned: dict[str, Any] = {"origin_sha256": "", "teacher_sha256": (), "tracking_uri": "http://127.0.0.1:9"}
    runner = trials.TrialRunner(folder=folder, at_once=1, parent_run_id="", view=Lines(1), **pinned)
    runner._end_lost_runs([config] * 3, "KILLED")
    assert asked == ["r1"]
