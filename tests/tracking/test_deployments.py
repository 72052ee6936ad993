"""Evaluations and deployments of a version, as MLflow shows them."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import psutil
import pytest
from mlflow.entities import Run

from slm_ray.dataset.manifest import load_manifest
from slm_ray.locks.process_identity import is_gone, own_process
from slm_ray.tracking import deployments, mlflow_runs
from slm_ray.tracking.deployments import DeploymentLog, Served
from slm_ray.tracking.evaluation_runs import record_evaluation
from slm_ray.tracking.registry import ResolvedModel

SAYS_WHO_IT_IS = "from slm_ray.locks.process_identity import is_gone, own_process; print(own_process())"


def children(uri: str, run_id: str, kind: str) -> list[Run]:
    store = mlflow_runs.client(uri)
    home = store.get_run(run_id).info.experiment_id
    mine = f"tags.`mlflow.parentRunId` = '{run_id}' AND tags.`slm_ray.kind` = '{kind}'"
    return sorted(store.search_runs([home], mine), key=lambda run: run.info.start_time)


def registered(uri: str, name: str, folder: Path, count: int) -> tuple[Any, str]:
    store = mlflow_runs.client(uri)
    run_id = mlflow_runs.start_run(uri, "tests", name, {}).run_id
    store.create_registered_model(name)
    for _ in range(count):
        store.create_model_version(name, source=folder.as_uri(), run_id=run_id)
    return store, run_id


def test_a_deployment_is_a_run_for_as_long_as_a_version_is_served(mlflow_uri: str, tmp_path: Path) -> None:
    store, run_id = registered(mlflow_uri, "deployed", tmp_path, 2)
    log = DeploymentLog(mlflow_uri, "127.0.0.1:8000 replica a")
    log.serve(Served("deployed", "1", run_id))
    log.serve(Served("deployed", "2", run_id))
    log.flush()
    first, second = children(mlflow_uri, run_id, "deployment")
    assert (first.info.status, second.info.status) == ("FINISHED", "RUNNING")
    assert second.data.tags["model_version"] == "models:/deployed/2"
    assert second.data.tags["place"] == "127.0.0.1:8000 replica a"
    tag = store.get_model_version("deployed", "2").tags["deployment"]
    assert tag.startswith("127.0.0.1:8000 replica a since 20") and tag.endswith(second.info.run_id)
    log.end()
    assert [run.info.status for run in children(mlflow_uri, run_id, "deployment")] == ["FINISHED"] * 2
    log.end()  # once is enough


def test_a_deployment_that_the_store_did_not_take_is_told_again(
    mlflow_uri: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, run_id = registered(mlflow_uri, "again", tmp_path, 1)
    log = DeploymentLog(mlflow_uri, "here")
    with monkeypatch.context() as away:
        away.setattr(deployments, "client", lambda _: (_ for _ in ()).throw(OSError("away")))
        log.serve(Served("again", "1", run_id))
        log.flush()
    log.repeat()  # too early
    log.flush()
    assert children(mlflow_uri, run_id, "deployment") == []
    monkeypatch.setattr(deployments, "RETRY_S", 0.0)
    for _ in range(3):
        log.repeat()
        log.flush()
    assert len(children(mlflow_uri, run_id, "deployment")) == 1


def test_a_tag_that_cannot_be_set_makes_no_second_run(
    mlflow_uri: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, run_id = registered(mlflow_uri, "untagged", tmp_path, 1)
    store.delete_model_version("untagged", "1")
    monkeypatch.setattr(deployments, "RETRY_S", 0.0)
    log = DeploymentLog(mlflow_uri, "here")
    log.serve(Served("untagged", "1", run_id))
    log.flush()
    for _ in range(3):
        log.repeat()
        log.flush()
    assert len(children(mlflow_uri, run_id, "deployment")) == 1


def test_an_end_that_the_store_did_not_take_is_told_again(
    mlflow_uri: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, run_id = registered(mlflow_uri, "ended", tmp_path, 2)
    log = DeploymentLog(mlflow_uri, "here")
    log.serve(Served("ended", "1", run_id))
    log.flush()
    with monkeypatch.context() as away:
        away.setattr("mlflow.MlflowClient.set_terminated", lambda *_: (_ for _ in ()).throw(OSError("away")))
        log.serve(Served("ended", "2", run_id))
        log.flush()
    monkeypatch.setattr(deployments, "RETRY_S", 0.0)
    log.repeat()
    log.flush()
    assert [run.info.status for run in children(mlflow_uri, run_id, "deployment")] == ["FINISHED", "RUNNING"]


def test_setting_the_clock_ends_no_process(monkeypatch: pytest.MonkeyPatch) -> None:
    known = own_process()
    created = psutil.Process.create_time
    monkeypatch.setattr(psutil.Process, "create_time", lambda self: created(self) + 3600)
    assert not is_gone(known)


def test_a_deployment_whose_process_was_killed_is_ended_by_the_next(mlflow_uri: str, tmp_path: Path) -> None:
    """And no other: one of another machine may be alive."""
    store, run_id = registered(mlflow_uri, "killed", tmp_path, 4)
    gone = subprocess.run([sys.executable, "-c", SAYS_WHO_IT_IS], capture_output=True, text=True, check=True)
    alive = own_process()
    processes = [gone.stdout.strip(), alive, f"elsewhere {alive.split(' ', 1)[1]}", alive + "0 0"]
    made = []
    for version, process in enumerate(processes, 1):
        DeploymentLog(mlflow_uri, "here")._begin(Served("killed", str(version), run_id))
        run = children(mlflow_uri, run_id, "deployment")[-1]
        store.set_tag(run.info.run_id, "process", process)
        made.append(run.info.run_id)
    DeploymentLog(mlflow_uri, "here")._begin(Served("killed", "4", run_id))
    assert [store.get_run(one).info.status for one in made] == ["KILLED", "RUNNING", "RUNNING", "RUNNING"]


def test_a_deployment_that_was_deleted_hides_no_later_one(mlflow_uri: str, tmp_path: Path) -> None:
    store, run_id = registered(mlflow_uri, "hidden", tmp_path, 2)
    log = DeploymentLog(mlflow_uri, "here")
    log.serve(Served("hidden", "1", run_id))
    log.flush()
    (first,) = children(mlflow_uri, run_id, "deployment")
    store.delete_run(first.info.run_id)  # in MLflow's pages
    log.serve(Served("hidden", "2", run_id))
    log.end()
    (second,) = children(mlflow_uri, run_id, "deployment")
    assert second.data.tags["model_version"] == "models:/hidden/2"


def test_a_server_without_a_store_serves(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    for uri in ("none", "http://me:secret@127.0.0.1:9"):
        log = DeploymentLog(uri, "here")
        log.serve(Served("deployed", "1", "r1"))
        log.end()
    first, last = (record.getMessage() for record in caplog.records)
    assert "does not take the records" in first and "secret" not in first
    assert last == "MLflow did not take 1 record"


def test_an_evaluation_is_a_run_with_its_data_set_and_its_figures_are_tags_of_the_version(
    mlflow_uri: str, tmp_path: Path, tiny_data: Path
) -> None:
    store, run_id = registered(mlflow_uri, "measured", tmp_path, 1)
    model = ResolvedModel(tmp_path, "measured", "1", run_id, "abc", 7, "id")
    figures = {"bits_per_byte": 0.75, "tokens": 120, "split": "test", "measure": "stories"}
    found = record_evaluation(mlflow_uri, model, figures, load_manifest(str(tiny_data)), "tiny")
    (run,) = children(mlflow_uri, run_id, "evaluation")
    assert (run.info.run_id, run.info.status) == (found, "FINISHED")
    assert run.data.metrics == {"bits_per_byte": 0.75, "tokens": 120.0}
    assert run.data.params == {"split": "test", "measure": "stories"}
    (data_set,) = run.inputs.dataset_inputs
    assert data_set.dataset.name == "tiny"
    tags = store.get_model_version("measured", "1").tags
    assert tags["evaluation.bits_per_byte"] == "0.75" and tags["evaluation.run"] == found
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
        assert record_evaluation("http://127.0.0.1:9", model, figures, load_manifest(str(tiny_data)), "tiny") == ""
