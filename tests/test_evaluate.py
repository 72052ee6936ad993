"""What `evaluate.py` refuses: each in one line and exit code 2, and nothing on standard output."""

import json
import shutil
import sys
from pathlib import Path

import pytest

from slm_ray import evaluate
from slm_ray.tokenization.tokenizer import Tokenizer
from slm_ray.tracking import mlflow_runs
from tests.support.data_sets import write_data
from tests.support.tiny_model import write_tiny_model


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return write_tiny_model(tmp_path / "model")


@pytest.fixture
def data(model: Path, tmp_path: Path) -> Path:
    """A data set with the model's tokenizer, and without stories in its test split."""
    folder = tmp_path / "data"
    folder.mkdir()
    tokenizer = Tokenizer.load(model / "model" / "tokenizer.json")
    write_data(folder, tokenizer, {"train": [(0, 20)], "validation": [(20, 24)]})
    return folder


def refusal(capsys: pytest.CaptureFixture[str], *words: object) -> str:
    """The line that the command ends with."""
    assert evaluate.main([str(word) for word in words]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    (line,) = err.splitlines()
    assert line.startswith("error: ")
    return line


@pytest.mark.parametrize("backend", ["torch", "onnx", "onnx-int8"])
def test_one_line_of_json_on_the_split(
    model: Path, data: Path, backend: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert evaluate.main(["--model", str(model), "--data", str(data), "--split", "train", "--backend", backend]) == 0
    (line,) = capsys.readouterr().out.splitlines()
    found = json.loads(line)
    assert (found["split"], found["backend"]) == ("train", backend)
    assert found["tokens"] > 0
    assert found["loss"] == pytest.approx(5.7, abs=0.1)  # of a model that knows nothing: ln of its 300 tokens


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--model", "no/such"], "no/such"),
        (["--model", "models:/nobody@champion"], "no model registry at sqlite:///"),
        (
            ["--model", "nobody@champion"],
            "expected models:/NAME@ALIAS, models:/NAME/VERSION, hub:OWNER/NAME or a folder",
        ),
        (["--data", "no/such"], "no manifest.json in no/such"),
        (["--split", "test"], "has no stories in its test split"),
        (["--split", "dev"], "invalid choice 'dev'"),
        (["--backend", "tpu"], "invalid choice 'tpu'"),
        (["--tracking-uri", "nonsense://x", "--model", "models:/nobody@champion"], "nonsense"),
        (["--batch-size", "8"], "--batch-size"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_wrong_word_is_refused(
    words: list[str],
    expected: str,
    model: Path,
    data: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    assert expected in refusal(capsys, "--model", model, "--data", data, *words)


def test_a_model_that_the_registry_does_not_know_is_refused(
    data: Path, mlflow_uri: str, capsys: pytest.CaptureFixture[str]
) -> None:
    mlflow_runs.start_run(mlflow_uri, "tests", "a run", {})  # makes the store
    for reference, expected in (
        ("models:/nobody@champion", "nobody"),
        ("models:/nobody", "names no version: write models:/NAME@ALIAS or models:/NAME/VERSION"),
    ):
        assert expected in refusal(capsys, "--model", reference, "--data", data, "--tracking-uri", mlflow_uri)


def test_a_data_set_of_another_tokenizer_is_refused(
    model: Path, tiny_data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    line = refusal(capsys, "--model", model, "--data", tiny_data)
    assert f"{tiny_data} was prepared with another tokenizer than tiny step-12's: pass its own data" in line


def test_a_damaged_shard_and_a_lost_one_are_refused(
    model: Path, data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (shard,) = (data / "validation").glob("*.parquet")
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 1
    shard.write_bytes(content)
    assert shard.name in refusal(capsys, "--model", model, "--data", data)
    shard.unlink()
    assert shard.name in refusal(capsys, "--model", model, "--data", data)


def test_a_damaged_manifest_is_refused(model: Path, data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (data / "manifest.json").write_text("{")
    assert "manifest.json" in refusal(capsys, "--model", model, "--data", data)


@pytest.mark.parametrize("name", ["model/model.safetensors", "model/config.json", "state.json", "complete.json"])
def test_a_damaged_checkpoint_is_refused(
    model: Path, data: Path, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (model / name).write_bytes(b"{")
    assert str(model) in refusal(capsys, "--model", model, "--data", data)
    shutil.rmtree(model)
    model.mkdir()
    assert str(model) in refusal(capsys, "--model", model, "--data", data)


def test_a_backend_that_is_not_installed_is_refused(
    model: Path, data: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    monkeypatch.delitem(sys.modules, "slm_ray.generation.onnx_backend", raising=False)
    line = refusal(capsys, "--model", model, "--data", data, "--backend", "onnx")
    assert "backend onnx needs onnxruntime: pip install 'slm-ray[serve]', or use torch" in line
