"""A sweep whose MLflow server is away: it goes on, and its tree is whole once the server answers."""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from slm_ray.config.schema import TrainConfig
from slm_ray.distributed import mlflow_run
from slm_ray.tracking import mlflow_runs
from slm_ray.tracking.mlflow_runs import PARENT
from slm_ray.tracking.store_faults import StoreAwayError
from slm_ray.training.context import TrainContext
from slm_ray.training.inputs import load_inputs
from slm_ray.training.loop import fit
from slm_ray.training.preflight import resolve
from tune.config import SweepConfig
from tune.mlflow_sweep import open_sweep, send_what_lacks
from tune.outcomes import ended_trial
from tune.planning import Plan, plan_sweep
from tune.record import read_record
from tune.results import Trial


@pytest.fixture
def away(monkeypatch: pytest.MonkeyPatch) -> Callable[[bool], None]:
    """Lets the store be away as a server is, or come back."""
    real = mlflow_runs.start_run

    def refuse(*_: Any, **__: Any) -> None:
        raise StoreAwayError("the MLflow store does not answer")

    def switch(is_away: bool) -> None:
        monkeypatch.setattr(mlflow_runs, "start_run", refuse if is_away else real)

    return switch


def planned(config: TrainConfig) -> Plan:
    shared = {field.name: getattr(config, field.name) for field in dataclasses.fields(TrainConfig)}
    shared |= {"sample_prompt": "", "lr": (1e-3, 1e-2), "d_ff": (32,), "trial_steps": 2, "register": "tiny"}
    plan = plan_sweep(SweepConfig(**shared))
    plan.run_folder.path.mkdir(parents=True, exist_ok=True)
    return plan


def train(plan: Plan, parent_run_id: str) -> list[Trial]:
    """Every trial as its driver runs it, in this process."""
    trials = []
    for lr in (1e-3, 1e-2):
        point = {"optim.lr": lr, "model.d_ff": 32}
        config = plan.trial_config(point)
        inputs = load_inputs(resolve(config, lambda _: 1), mlflow_run.NullTracker())
        tracker = mlflow_run.open_mlflow_run(inputs, None, parent_run_id)
        fit(dataclasses.replace(inputs, tracker=tracker), TrainContext())
        mlflow_run.close_mlflow_run(inputs, tracker, "FINISHED")
        trial = ended_trial(config, point)
        assert trial is not None
        trials.append(trial)
    return trials


def children(plan: Plan, run_id: str) -> dict[str, Any]:
    store = mlflow_runs.client(plan.sweep.tracking_uri)
    home = store.get_run(run_id).info.experiment_id
    found = store.search_runs([home], f"tags.`{PARENT}` = '{run_id}'")
    return {run.info.run_name: run for run in found}


def test_trials_that_ended_while_the_server_was_away_are_sent_when_it_is_back(
    tiny_config: TrainConfig, away: Callable[[bool], None], caplog: pytest.LogCaptureFixture
) -> None:
    plan = planned(tiny_config)
    away(True)
    parent = open_sweep(plan)
    assert parent.run_id == ""
    assert caplog.text.count("goes on without MLflow") == 1
    trials = train(plan, parent.run_id)
    assert [trial.run_id for trial in trials] == ["", ""]
    still, same = send_what_lacks(plan, parent, trials)  # it is still away
    assert (still.run_id, same) == ("", trials)
    away(False)
    parent, sent = send_what_lacks(plan, parent, trials)
    assert (read_record(plan.folder) or {})["run_id"] == parent.run_id
    found = children(plan, parent.run_id)
    assert {run.info.run_id for run in found.values()} == {trial.run_id for trial in sent}
    assert set(found) == {trial.name for trial in sent}
    for run in found.values():
        assert (run.info.status, run.data.tags["status"]) == ("FINISHED", "finished")
        assert run.data.metrics["val_loss"] > 0
        assert run.data.tags["best_step"] == "2"
    again = [ended_trial(plan.trial_config(trial.point), trial.point) for trial in trials]
    assert again == sent  # the folders know their runs: nothing is sent twice
    assert send_what_lacks(plan, parent, sent) == (parent, sent)


def test_trials_that_diverged_or_failed_while_the_server_was_away_are_sent_as_such(
    tiny_config: TrainConfig, away: Callable[[bool], None]
) -> None:
    plan = planned(tiny_config)
    away(True)
    parent, (diverged, failed) = open_sweep(plan), train(plan, "")
    for trial, change in ((diverged, {"status": "diverged", "reason": "the loss exploded"}), (failed, None)):
        summary = Path(str(plan.folder)) / "trials" / trial.name / "summary.json"
        content = json.loads(summary.read_text())
        summary.unlink()  # what a killed worker leaves has none
        if change:
            summary.write_text(json.dumps(content | change))
    away(False)
    parent, _ = send_what_lacks(plan, parent, [diverged, failed])
    found = children(plan, parent.run_id)
    told = {name: (run.info.status, run.data.tags["status"]) for name, run in found.items()}
    assert told == {diverged.name: ("FAILED", "diverged"), failed.name: ("FAILED", "failed")}
    assert "best_step" not in found[failed.name].data.tags


def test_trials_that_found_the_server_before_their_sweep_did_come_below_it(
    tiny_config: TrainConfig, away: Callable[[bool], None]
) -> None:
    plan = planned(tiny_config)
    away(True)
    parent = open_sweep(plan)
    away(False)
    trials = train(plan, parent.run_id)
    assert all(trial.run_id for trial in trials)
    parent, same = send_what_lacks(plan, parent, trials)
    assert same == trials
    assert {run.info.run_id for run in children(plan, parent.run_id).values()} == {trial.run_id for trial in trials}


def test_a_sweep_that_goes_on_while_the_server_is_away_keeps_its_run(
    tiny_config: TrainConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = planned(tiny_config)
    begun = open_sweep(plan)
    begun.finish()

    def refuse(*_: Any) -> None:
        raise StoreAwayError("the MLflow store does not answer")

    monkeypatch.setattr(mlflow_runs, "has_run", refuse)
    assert open_sweep(plan).run_id == begun.run_id
    assert (read_record(plan.folder) or {})["run_id"] == begun.run_id
