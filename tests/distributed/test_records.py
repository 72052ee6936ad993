"""What the driver records of a run: what was typed, and every data set."""

import dataclasses
import json
import shutil
from pathlib import Path

import pytest
import yaml

from slm_ray.config.schema import TrainConfig
from slm_ray.distributed import workers
from slm_ray.distributed.mlflow_run import close_mlflow_run, open_mlflow_run, reopen_mlflow_run
from slm_ray.errors import UserError
from slm_ray.runs import checkpoint
from slm_ray.runs.outcome import clear_outcome
from slm_ray.runs.run_folder import RunFolder
from slm_ray.tokenization.tokenizer import Tokenizer
from slm_ray.tracking import mlflow_runs
from slm_ray.tracking.tracker import NullTracker
from slm_ray.train import parse_config
from slm_ray.training.context import TrainContext
from slm_ray.training.inputs import TrainInputs, load_inputs
from slm_ray.training.loop import fit
from slm_ray.training.preflight import resolve
from tests.support.saved_models import save_talkative


def begin(config: TrainConfig) -> TrainInputs:
    """Inputs with a tracker, as the driver and its workers make them."""
    inputs = load_inputs(resolve(config, lambda: 1), NullTracker())
    return dataclasses.replace(inputs, tracker=open_mlflow_run(inputs, inputs.folder.latest_valid(), ""))


def test_neither_the_environment_nor_the_working_folder_is_in_what_a_run_leaves(
    tiny_config: TrainConfig, tiny_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = f"sqlite:///{tmp_path / 'secret.db'}"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", store)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").symlink_to(tiny_data)
    config = dataclasses.replace(
        tiny_config, data="data", output="runs", tracking_uri="", sample_prompt="", max_steps=4
    )
    inputs = begin(config)
    fit(inputs, TrainContext())
    inputs.tracker.finish()
    assert checkpoint.load_state(inputs.folder.latest).config["tracking_uri"] == ""
    run = mlflow_runs.client(store).get_run(inputs.tracker.run_id)
    given = {name: run.data.params[name] for name in ("data", "output", "tracking_uri")}
    assert given == {"data": "data", "output": "runs", "tracking_uri": ""}
    assert run.data.tags["slm_ray.folder"] == "runs/tiny"
    text = (tmp_path / "mlruns" / inputs.tracker.run_id / "artifacts" / "config.yaml").read_text()
    assert yaml.safe_load(text)["data"] == "data" and str(tmp_path) not in text


def test_a_run_that_goes_on_on_other_stories_names_both_data_sets(tiny_config: TrainConfig) -> None:
    config = dataclasses.replace(tiny_config, sample_prompt="", max_steps=4)
    first = begin(config)
    fit(first, TrainContext())
    first.tracker.finish()
    plan = load_inputs(resolve(dataclasses.replace(config, max_steps=8), lambda: 1), NullTracker())
    other = dataclasses.replace(plan, data_fingerprint="other")
    other = dataclasses.replace(other, tracker=open_mlflow_run(other, other.folder.latest_valid(), ""))
    fit(other, TrainContext())
    other.tracker.finish()
    lineage = [[first.data_fingerprint, 0], ["other", 4]]
    assert json.loads((other.folder.latest / "state.json").read_text())["lineage"] == lineage
    run = mlflow_runs.client(config.tracking_uri).get_run(first.tracker.run_id)
    assert json.loads(run.data.tags["data_lineage"]) == lineage
    artifacts = mlflow_runs.client(config.tracking_uri).list_artifacts(first.tracker.run_id)
    assert {artifact.path for artifact in artifacts} == {"config.yaml", "config-from-step-00000004.yaml"}


def test_a_run_of_a_moved_project_finds_its_data(tiny_config: TrainConfig, tiny_data: Path, tmp_path: Path) -> None:
    home = tmp_path / "home"
    shutil.copytree(tiny_data, home / "data" / "x")
    config = dataclasses.replace(
        tiny_config, data=str(home / "data" / "x"), output=str(home / "runs"), tracking_uri="none", max_steps=4
    )
    fit(load_inputs(resolve(config, lambda: 1), NullTracker()), TrainContext())
    home.rename(tmp_path / "moved")
    again = parse_config(["--resume", "--output", str(tmp_path / "moved" / "runs"), "--name", config.name])
    assert again.data == str(tmp_path / "moved" / "data" / "x")


def test_a_run_of_a_moved_project_finds_its_teachers(
    tiny_config: TrainConfig, tiny_tokenizer: Tokenizer, tmp_path: Path
) -> None:
    home, moved = tmp_path / "home", tmp_path / "moved"
    teacher = save_talkative(home / "runs" / "first" / "best", tiny_tokenizer)
    config = dataclasses.replace(
        tiny_config, teacher=(str(teacher),), output=str(home / "runs"), tracking_uri="none", max_steps=4
    )
    fit(load_inputs(resolve(config, lambda _: 1), NullTracker()), TrainContext())
    home.rename(moved)
    again = parse_config(["--resume", "--output", str(moved / "runs"), "--name", config.name, "--max-steps", "5"])
    assert again.teacher == (str(moved / "runs" / "first" / "best"),)
    fit(load_inputs(resolve(again, lambda _: 1), NullTracker()), TrainContext())


def test_the_report_of_a_failure_holds_no_password(tmp_path: Path) -> None:
    said = workers._failure(RuntimeError("API request to http://me:secret@host/api failed"), RunFolder(tmp_path))
    assert "secret" not in str(UserError(said)) + (tmp_path / "error.txt").read_text()
    assert "http://host/api" in (tmp_path / "error.txt").read_text()


def test_a_server_that_is_away_stops_no_run_and_gets_the_record_when_it_is_back(
    tiny_config: TrainConfig, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """At the end of the run, or when it goes on: one run, each step once."""
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    away = dataclasses.replace(tiny_config, tracking_uri="http://127.0.0.1:9", sample_prompt="", max_steps=4)
    plan = load_inputs(resolve(away, lambda: 1), NullTracker())
    run = dataclasses.replace(plan, tracker=open_mlflow_run(plan, None, ""))
    assert run.tracker.run_id == "" and "goes on without MLflow" in caplog.text
    fit(run, TrainContext())
    assert reopen_mlflow_run(plan, None, "", run.tracker).run_id == ""  # it is still away
    back = dataclasses.replace(away, tracking_uri=tiny_config.tracking_uri)
    plan = load_inputs(resolve(back, lambda: 1), NullTracker())
    tracker = reopen_mlflow_run(plan, None, "", run.tracker)
    close_mlflow_run(plan, tracker, "FINISHED")
    again = open_mlflow_run(plan, plan.folder.latest_valid(), "")  # --resume of what is finished
    close_mlflow_run(plan, again, "FINISHED")
    assert again.run_id == tracker.run_id
    store = mlflow_runs.client(tiny_config.tracking_uri)
    steps = [metric.step for metric in store.get_metric_history(tracker.run_id, "val_loss")]
    assert steps == sorted(set(plan.history.series("val_loss")[0]))
    more = dataclasses.replace(back, max_steps=8)  # a start that is killed before its first checkpoint
    plan = load_inputs(resolve(more, lambda: 1), NullTracker())
    clear_outcome(plan.folder)
    assert open_mlflow_run(plan, plan.folder.latest_valid(), "").run_id == tracker.run_id
