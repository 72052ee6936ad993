"""Runs: what they keep, and that no store holds a training up."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest
from mlflow import MlflowClient
from mlflow.exceptions import MlflowException
from mlflow.protos.databricks_pb2 import ErrorCode

from slm_ray.config.schema import TrainConfig
from slm_ray.errors import UserError
from slm_ray.tracking import mlflow_runs, system_metrics
from slm_ray.tracking.store_faults import StoreAwayError, store_fault
from slm_ray.tracking.tracker import NullTracker, Tracker
from slm_ray.training.context import TrainContext
from slm_ray.training.inputs import load_inputs
from slm_ray.training.loop import fit
from slm_ray.training.preflight import resolve


def start(mlflow_uri: str, **more: Any) -> Tracker:
    return mlflow_runs.start_run(mlflow_uri, "tests", "a run", {"model.d_ff": 512}, {"data_fingerprint": "abc"}, **more)


def test_a_run_keeps_parameters_metrics_texts_and_its_parent(mlflow_uri: str) -> None:
    parent = start(mlflow_uri)
    run = start(mlflow_uri, parent_run_id=parent.run_id)
    worker = mlflow_runs.continue_run(mlflow_uri, run.run_id)
    worker.log_metrics({"val_loss": 2.5}, step=10)
    worker.close()
    run.log_text("Once", "samples/step-10.txt")
    run.finish()
    kept = mlflow_runs.client(mlflow_uri).get_run(run.run_id)
    assert kept.data.params["model.d_ff"] == "512"
    assert kept.data.metrics["val_loss"] == 2.5
    assert kept.data.tags["mlflow.parentRunId"] == parent.run_id
    assert kept.info.status == "FINISHED"
    assert mlflow_runs.client(mlflow_uri).list_artifacts(run.run_id)[0].path == "samples"
    assert Path(kept.info.artifact_uri.removeprefix("file://")).is_relative_to(
        Path(mlflow_uri.removeprefix("sqlite:///")).parent
    )


def test_the_store_is_the_option_then_the_variable_then_a_file_here(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    assert mlflow_runs.resolve_uri("") == f"sqlite:///{tmp_path / 'mlflow.db'}"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:5000")
    assert mlflow_runs.resolve_uri("") == "http://127.0.0.1:5000"
    assert mlflow_runs.resolve_uri("sqlite:////x/y.db") == "sqlite:////x/y.db"


def test_a_store_that_fails_does_not_end_a_run_and_is_warned_of_once(mlflow_uri: str) -> None:
    said: list[str] = []
    tracker = mlflow_runs.MlflowTracker(mlflow_uri, "no such run", said.append)
    for step in range(3):
        tracker.log_metrics({"val_loss": 1.0}, step)
    tracker.log_text("Once", "sample.txt")
    tracker.finish()
    assert len(said) == 2 and "did not take" in said[1]  # that it fails, and at the end how much is missing
    assert said[0].startswith("MLflow does not take the records, the run goes on without: ")
    assert "no such run" in said[0]


def test_a_store_that_cannot_be_opened_by_a_worker_does_not_end_a_run() -> None:
    said: list[str] = []
    assert isinstance(mlflow_runs.continue_run("gopher://nowhere", "r1", said.append), NullTracker)
    assert said[0].startswith("the run goes on without MLflow: ")


def test_a_training_goes_on_when_its_server_is_gone(tiny_config: TrainConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    said: list[str] = []
    tracker = mlflow_runs.continue_run("http://127.0.0.1:9", "r1", said.append)
    inputs = load_inputs(resolve(dataclasses.replace(tiny_config, sample_prompt=""), lambda _: 1), tracker)
    with system_metrics.logged(tracker):
        assert fit(inputs, TrainContext()).status == "finished"
    tracker.close()
    assert len(said) == 2 and "did not take" in said[1]  # that it fails, and at the end how much is missing
    assert said[0].startswith("MLflow does not take the records, the run goes on without: ")


def test_a_run_that_had_ended_is_shown_as_running_again(mlflow_uri: str) -> None:
    run = start(mlflow_uri)
    run.finish()
    again = mlflow_runs.continue_run(mlflow_uri, run.run_id)
    again.set_running()
    again.close()
    assert mlflow_runs.client(mlflow_uri).get_run(run.run_id).info.status == "RUNNING"


def test_tracking_can_be_turned_off() -> None:
    tracker = mlflow_runs.start_run(mlflow_runs.OFF, "tests", "a run", {})
    tracker.log_metrics({"val_loss": 1.0}, 1)
    assert tracker.run_id == ""
    assert isinstance(mlflow_runs.continue_run(mlflow_runs.OFF, "x"), NullTracker)


@pytest.mark.parametrize("bad", ["gopher://nowhere", "http://127.0.0.1:9"])
def test_an_unusable_store_is_one_clear_line(bad: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    with pytest.raises(UserError, match="cannot be used") as caught:
        mlflow_runs.start_run(bad, "tests", "a run", {})
    assert "\n" not in str(caught.value)


def test_a_store_that_is_no_database_is_one_clear_line_and_in_a_worker_a_warning(tmp_path: Path) -> None:
    (tmp_path / "mlflow.db").write_bytes(b"no database " * 500)
    uri = f"sqlite:///{tmp_path / 'mlflow.db'}"
    with pytest.raises(UserError, match="cannot be used: "):
        mlflow_runs.start_run(uri, "experiment", "run", {})
    with pytest.raises(UserError, match="cannot be used: "):  # nobody can say whether the run is there
        mlflow_runs.has_run(uri, "some-run")
    warnings: list[str] = []
    tracker = mlflow_runs.continue_run(uri, "some-run", warnings.append)
    tracker.log_metrics({"loss": 1.0}, 1)
    tracker.close()
    assert warnings


def test_a_run_that_was_deleted_cannot_go_on_and_a_deleted_experiment_is_named_with_the_way_out(
    mlflow_uri: str, caplog: pytest.LogCaptureFixture
) -> None:
    store = mlflow_runs.client(mlflow_uri)
    run_id = mlflow_runs.start_run(mlflow_uri, "doomed", "a run", {}).run_id
    assert mlflow_runs.has_run(mlflow_uri, run_id)
    assert not mlflow_runs.has_run(mlflow_uri, "0" * 32)
    assert "does not know run 000" in caplog.text
    store.delete_run(run_id)
    assert not mlflow_runs.has_run(mlflow_uri, run_id)
    store.delete_experiment(store.get_experiment_by_name("doomed").experiment_id)
    with pytest.raises(UserError, match=r"'doomed' .* was deleted: restore it .*--experiment"):
        mlflow_runs.start_run(mlflow_uri, "doomed", "a run", {})


def test_a_saved_address_is_that_of_the_variable_with_its_password(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://me:secret@host")
    assert mlflow_runs.resolve_uri("http://host") == "http://me:secret@host"
    assert mlflow_runs.resolve_uri("http://other") == "http://other"
    assert mlflow_runs.ui_command("http://me:secret@host") == "http://host"


def test_a_place_that_cannot_be_looked_at_is_not_taken_for_an_absent_one(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(_: Path) -> bool:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "exists", refuse)
    with pytest.raises(UserError, match="keeps files in /root/mlruns, which cannot be read: Permission denied"):
        mlflow_runs.lost_place("sqlite:////home/me/mlflow.db?timeout=9", "file:///root/mlruns")
    assert mlflow_runs.sqlite_file("sqlite:////home/me/mlflow.db?timeout=9") == Path("/home/me/mlflow.db")


@pytest.mark.parametrize(
    ("code", "is_away"),
    [("UNAUTHENTICATED", False), ("PERMISSION_DENIED", False), ("ENDPOINT_NOT_FOUND", False),
     ("INTERNAL_ERROR", True), ("TEMPORARILY_UNAVAILABLE", True), ("REQUEST_LIMIT_EXCEEDED", True)],
)  # fmt: skip
def test_a_server_that_refuses_is_not_away(code: str, is_away: bool) -> None:
    """A wrong password or address is said before the training, not after it."""
    error = MlflowException("no", error_code=ErrorCode.Value(code))
    assert isinstance(store_fault("http://host", error, is_server=True), StoreAwayError) == is_away
    assert not isinstance(store_fault("sqlite:///x.db", error, is_server=False), StoreAwayError)


def test_a_server_that_goes_away_between_run_and_parameters_has_one_run(
    mlflow_uri: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls, real = [], MlflowClient.log_batch

    def fail_once(self: MlflowClient, *words: Any, **given: Any) -> Any:
        calls.append(1)
        if len(calls) == 1:
            raise MlflowException("gone", error_code=ErrorCode.Value("TEMPORARILY_UNAVAILABLE"))
        return real(self, *words, **given)

    monkeypatch.setattr(MlflowClient, "log_batch", fail_once)
    monkeypatch.setattr(mlflow_runs, "sqlite_file", lambda uri: None)
    tracker = mlflow_runs.start_run(mlflow_uri, "tests", "one", {"lr": 0.5})
    tracker.close()
    assert mlflow_runs.client(mlflow_uri).get_run(tracker.run_id).data.params == {"lr": "0.5"}
