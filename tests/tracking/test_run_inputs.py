"""What a run was made from, as MLflow shows it."""

import json
from pathlib import Path

import pytest

from slm_ray.dataset.manifest import load_manifest
from slm_ray.tracking import mlflow_runs, run_inputs


def test_a_data_set_is_an_input_with_its_fingerprint_and_counts_and_without_a_path(
    mlflow_uri: str, tiny_data: Path
) -> None:
    manifest = load_manifest(str(tiny_data))
    run_id = mlflow_runs.start_run(mlflow_uri, "tests", "fed", {}).run_id
    for _ in range(2):  # a resumed run says it again
        run_inputs.log_data_set(mlflow_uri, run_id, manifest, tiny_data.name)
    (found,) = mlflow_runs.client(mlflow_uri).get_run(run_id).inputs.dataset_inputs
    assert found.dataset.name == tiny_data.name
    assert manifest.fingerprint.startswith(found.dataset.digest) and len(found.dataset.digest) == 36
    profile = json.loads(found.dataset.profile)
    assert profile["fingerprint"] == manifest.fingerprint
    assert profile["train_stories"] == manifest.splits["train"].rows
    assert profile["train_tokens"] == manifest.splits["train"].tokens
    assert str(tiny_data.parent) not in f"{found.dataset.source}{found.dataset.profile}"


def test_the_report_is_kept_where_there_is_one(mlflow_uri: str, tmp_path: Path) -> None:
    run_id = mlflow_runs.start_run(mlflow_uri, "tests", "reported", {}).run_id
    run_inputs.log_report(mlflow_uri, run_id, tmp_path)
    assert mlflow_runs.client(mlflow_uri).list_artifacts(run_id) == []
    (tmp_path / "report").mkdir()
    (tmp_path / "report" / "report.html").write_text("<p>figures</p>", encoding="utf-8")
    run_inputs.log_report(mlflow_uri, run_id, tmp_path)
    assert [artifact.path for artifact in mlflow_runs.client(mlflow_uri).list_artifacts(run_id, "data")] == [
        "data/report.html"
    ]


def test_a_store_that_fails_costs_a_warning_and_none_nothing(
    tiny_data: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    manifest = load_manifest(str(tiny_data))
    run_inputs.log_data_set("none", "r1", manifest, "tiny")
    run_inputs.log_report("none", "r1", tiny_data)
    assert not caplog.records
    run_inputs.log_data_set("http://127.0.0.1:9", "r1", manifest, "tiny")
    (record,) = caplog.records
    assert "does not take the data set" in record.getMessage() and "\n" not in record.getMessage()


def test_the_environment_names_versions() -> None:
    found = run_inputs.environment()
    assert found["environment.torch"].startswith("2.") and found["environment.python"].startswith("3.")
