"""A model given away as a folder, and what is left of one that had to be fetched from an object store."""

import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from slm_ray import evaluate, export, generate
from slm_ray.runs import checkpoint
from slm_ray.tokenization.tokenizer import Tokenizer
from slm_ray.tracking import mlflow_runs
from tests.support.champions import register_champion
from tests.support.data_sets import write_data
from tests.support.tiny_model import write_tiny_model


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return write_tiny_model(tmp_path / "tiny")


def test_what_a_user_has_beside_the_export_stays(model: Path, tmp_path: Path) -> None:
    mine = tmp_path / "export.partial"
    mine.mkdir()
    (mine / "diary.txt").write_text("mine")
    for form in ("hf", "checkpoint"):
        output = tmp_path / form / "export"
        (tmp_path / form).mkdir()
        mine.rename(tmp_path / form / mine.name)
        mine = tmp_path / form / mine.name
        assert export.main(["--model", str(model), "--output", str(output), "--format", form]) == 0
        assert {path.name for path in (tmp_path / form).iterdir()} == {"export", "export.partial"}
        assert (mine / "diary.txt").read_text() == "mine"
    checkpoint.load_model(tmp_path / "checkpoint" / "export")


def test_no_folder_of_a_fetched_model_is_left(
    model: Path,
    s3: Callable[..., Any],
    mlflow_uri: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The store is one in which artifacts lie in a bucket, as on a server."""
    mlflow_runs.client(mlflow_uri).create_experiment("far", artifact_location="s3://stories/mlruns")
    run_id = mlflow_runs.start_run(mlflow_uri, "far", "a run", {}).run_id
    register_champion(mlflow_uri, "far", model, run_id)
    data = tmp_path / "data"
    data.mkdir()
    tokenizer = Tokenizer.load(model / "model" / "tokenizer.json")
    write_data(data, tokenizer, {"train": [(0, 20)], "validation": [(20, 24)]})

    scratch = tmp_path / "scratch"
    scratch.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(scratch))
    source = ["--model", "models:/far@champion", "--tracking-uri", mlflow_uri]
    assert export.main([*source, "--output", str(tmp_path / "export")]) == 0
    assert generate.main([*source, "--max-tokens", "2"]) == 0
    assert evaluate.main([*source, "--data", str(data)]) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["model"] == "far 1"
    assert generate.main([*source, "--max-tokens", "2", "--prompt", "x" * 999]) == 2
    assert list(scratch.glob("slm-model-*")) == []
