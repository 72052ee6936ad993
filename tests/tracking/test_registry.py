"""Registered versions, and the references that lead to models."""

from pathlib import Path

import pytest

from slm_ray.config.schema import ModelConfig
from slm_ray.errors import UserError
from slm_ray.model.decoder import Decoder
from slm_ray.runs import checkpoint
from slm_ray.runs.checkpoint import TrainState
from slm_ray.runs.train_state import Evaluation
from slm_ray.tokenization.tokenizer import Tokenizer
from slm_ray.tracking import mlflow_runs, registry, tracker


@pytest.fixture
def folder(tmp_path: Path, tiny_tokenizer: Tokenizer) -> Path:
    model = Decoder(
        ModelConfig(vocab_size=tiny_tokenizer.vocab_size, seq_len=8, n_layers=1, d_model=8, n_heads=2, d_ff=8)
    )
    state = TrainState(
        step=7,
        samples_seen=7,
        seed=0,
        world_size=1,
        data_fingerprint="abc",
        config={"name": "tiny"},
        metrics=Evaluation(val_loss=2.0, val_perplexity=7.4, val_bits_per_byte=0.75),
        run_id="r1",
    )
    checkpoint.save(tmp_path / "checkpoint", model, tiny_tokenizer, state, {})
    return tmp_path / "checkpoint"


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
