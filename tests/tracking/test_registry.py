"""Registered versions, and the references that lead to models."""

from pathlib import Path
from typing import Any

import pytest
import torch
from mlflow import MlflowClient

from slm_ray.config.schema import ModelConfig
from slm_ray.errors import UserError
from slm_ray.model.decoder import Decoder
from slm_ray.runs import checkpoint
from slm_ray.runs.checkpoint import TrainState
from slm_ray.runs.train_state import Evaluation
from slm_ray.tokenization.tokenizer import Tokenizer
from slm_ray.tracking import mlflow_runs, registry, tracker


def write_checkpoint(folder: Path, tokenizer: Tokenizer, step: int, **state: Any) -> Path:
    """A checkpoint whose weights follow from its step."""
    torch.manual_seed(step)
    model = Decoder(ModelConfig(vocab_size=tokenizer.vocab_size, seq_len=8, n_layers=1, d_model=8, n_heads=2, d_ff=8))
    evaluation = Evaluation(val_loss=2.0, val_perplexity=7.4, val_bits_per_byte=0.75)
    fields = {"config": {"name": "tiny"}, "run_id": "r1", "data_fingerprint": "abc", "metrics": evaluation} | state
    checkpoint.save(
        folder, model, tokenizer, TrainState(step=step, samples_seen=step, seed=0, world_size=1, **fields), {}
    )
    return folder


@pytest.fixture
def folder(tmp_path: Path, tiny_tokenizer: Tokenizer) -> Path:
    return write_checkpoint(tmp_path / "checkpoint", tiny_tokenizer, step=7)


def start(mlflow_uri: str) -> tracker.Tracker:
    return mlflow_runs.start_run(mlflow_uri, "tests", "a run", {"model.d_ff": 512})


def test_a_registered_version_carries_its_lineage_and_is_found_as_champion(
    mlflow_uri: str, folder: Path, tiny_tokenizer: Tokenizer
) -> None:
    run = start(mlflow_uri)
    first = registry.register(mlflow_uri, "stories", folder, run.run_id)
    second = registry.register(mlflow_uri, "stories", folder, run.run_id)
    assert (first, second) == ("1", "2")
    tags = mlflow_runs.client(mlflow_uri).get_model_version("stories", "2").tags
    assert tags["data_fingerprint"] == "abc"
    assert tags["step"] == "7"
    assert tags["val_bits_per_byte"] == "0.75"
    assert tags["tokenizer_sha256"] == tiny_tokenizer.sha256
    found = registry.resolve_model("models:/stories@champion", mlflow_uri)
    assert (found.name, found.version, found.run_id, found.step) == ("stories", "2", run.run_id, 7)
    checkpoint.load_model(found.path)
    assert not (found.path / checkpoint.OPTIMIZER).exists()
    assert registry.resolve_model("models:/stories/1", mlflow_uri).version == "1"


def test_a_folder_is_a_reference_too(folder: Path) -> None:
    found = registry.resolve_model(str(folder))
    assert (found.name, found.version, found.run_id, found.data_fingerprint) == ("tiny", "step-7", "r1", "abc")


@pytest.mark.parametrize(
    "reference",
    ["models:/nobody@champion", "models:/nobody/3", "models:/nobody", "models:/", "models:/a@b@c", "no/such/folder"],
)
def test_what_is_not_there_is_one_clear_line(mlflow_uri: str, reference: str) -> None:
    start(mlflow_uri)
    with pytest.raises(UserError) as caught:
        registry.resolve_model(reference, mlflow_uri)
    assert "\n" not in str(caught.value)


def test_asking_an_absent_store_does_not_make_one(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no model registry"):
        registry.resolve_model("models:/stories@champion", f"sqlite:///{tmp_path / 'none.db'}")
    assert not list(tmp_path.iterdir())


def test_a_damaged_checkpoint_is_not_registered(mlflow_uri: str, folder: Path) -> None:
    (folder / "model" / "config.json").write_text("{}", encoding="utf-8")
    with pytest.raises(UserError, match="corrupt"):
        registry.register(mlflow_uri, "stories", folder, start(mlflow_uri).run_id)


def test_a_second_version_of_a_run_leaves_the_files_of_the_first(
    mlflow_uri: str, tmp_path: Path, tiny_tokenizer: Tokenizer
) -> None:
    run_id = start(mlflow_uri).run_id
    weights = {}
    for step in (8, 16):
        folder = write_checkpoint(tmp_path / f"step-{step}", tiny_tokenizer, step)
        version = registry.register(mlflow_uri, "twice", folder, run_id)
        weights[version] = (folder / "model" / "model.safetensors").read_bytes()
    for version, content in weights.items():
        found = registry.resolve_model(f"models:/twice/{version}", mlflow_uri)
        assert found.step == 8 * int(version)
        assert (found.path / "model" / "model.safetensors").read_bytes() == content


def test_what_was_broken_off_while_it_was_registered_is_kept_whole_the_next_time(
    mlflow_uri: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_id = start(mlflow_uri).run_id
    with monkeypatch.context() as patch:
        patch.setattr(MlflowClient, "log_artifact", broken)
        with pytest.raises(UserError, match="the disk is full"):
            registry.register(mlflow_uri, "broken-off", folder, run_id)
    registry.register(mlflow_uri, "broken-off", folder, run_id)
    checkpoint.load_model(registry.resolve_model("models:/broken-off@champion", mlflow_uri).path)
    with monkeypatch.context() as patch:
        patch.setattr(MlflowClient, "log_artifacts", broken)  # nothing is written to what is there
        registry.register(mlflow_uri, "broken-off", folder, run_id)


def broken(*_: object) -> None:
    raise OSError("the disk is full")
