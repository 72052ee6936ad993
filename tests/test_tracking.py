"""Runs, registered versions, and the references that lead to them."""

from pathlib import Path
from typing import Any

import pytest

from slm_ray import checkpoint, tracking
from slm_ray.checkpoint import TrainState
from slm_ray.config import ModelConfig
from slm_ray.errors import UserError
from slm_ray.model import Decoder
from slm_ray.tokenizer import Tokenizer


@pytest.fixture(scope="module")
def uri(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A store of the module's own: making one takes seconds."""
    return f"sqlite:///{tmp_path_factory.mktemp('store') / 'mlflow.db'}"


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
        metrics={"val_bits_per_byte": 0.75},
        run_id="r1",
    )
    checkpoint.save(tmp_path / "checkpoint", model, tiny_tokenizer, state, {})
    return tmp_path / "checkpoint"


def start(uri: str, **more: Any) -> tracking.Tracker:
    return tracking.start_run(uri, "tests", "a run", {"model.d_ff": 512}, {"data_fingerprint": "abc"}, **more)


def test_a_run_keeps_parameters_metrics_texts_and_its_parent(uri: str) -> None:
    parent = start(uri)
    run = start(uri, parent_run_id=parent.run_id)
    tracking.continue_run(uri, run.run_id).log_metrics({"val_loss": 2.5}, step=10)
    run.log_text("Once", "samples/step-10.txt")
    run.finish()
    kept = tracking.client(uri).get_run(run.run_id)
    assert kept.data.params["model.d_ff"] == "512"
    assert kept.data.metrics["val_loss"] == 2.5
    assert kept.data.tags["mlflow.parentRunId"] == parent.run_id
    assert kept.info.status == "FINISHED"
    assert tracking.client(uri).list_artifacts(run.run_id)[0].path == "samples"
    assert Path(kept.info.artifact_uri.removeprefix("file://")).is_relative_to(
        Path(uri.removeprefix("sqlite:///")).parent
    )


def test_a_registered_version_carries_its_lineage_and_is_found_as_champion(
    uri: str, folder: Path, tiny_tokenizer: Tokenizer
) -> None:
    run = start(uri)
    first = tracking.register(uri, "stories", folder, run.run_id)
    second = tracking.register(uri, "stories", folder, run.run_id)
    assert (first, second) == ("1", "2")
    tags = tracking.client(uri).get_model_version("stories", "2").tags
    assert tags["data_fingerprint"] == "abc"
    assert tags["step"] == "7"
    assert tags["val_bits_per_byte"] == "0.75"
    assert tags["tokenizer_sha256"] == tiny_tokenizer.sha256
    found = tracking.resolve_model("models:/stories@champion", uri)
    assert (found.name, found.version, found.run_id, found.step) == ("stories", "2", run.run_id, 7)
    checkpoint.load_model(found.path)
    assert not (found.path / checkpoint.OPTIMIZER).exists()
    assert tracking.resolve_model("models:/stories/1", uri).version == "1"


def test_a_folder_is_a_reference_too(folder: Path) -> None:
    found = tracking.resolve_model(str(folder))
    assert (found.name, found.version, found.run_id, found.data_fingerprint) == ("tiny", "step-7", "r1", "abc")


@pytest.mark.parametrize(
    "reference",
    ["models:/nobody@champion", "models:/nobody/3", "models:/nobody", "models:/", "models:/a@b@c", "no/such/folder"],
)
def test_what_is_not_there_is_one_clear_line(uri: str, reference: str) -> None:
    start(uri)
    with pytest.raises(UserError) as caught:
        tracking.resolve_model(reference, uri)
    assert "\n" not in str(caught.value)


def test_asking_an_absent_store_does_not_make_one(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no model registry"):
        tracking.resolve_model("models:/stories@champion", f"sqlite:///{tmp_path / 'none.db'}")
    assert not list(tmp_path.iterdir())


def test_a_damaged_checkpoint_is_not_registered(uri: str, folder: Path) -> None:
    (folder / "model" / "config.json").write_text("{}", encoding="utf-8")
    with pytest.raises(UserError, match="damaged"):
        tracking.register(uri, "stories", folder, start(uri).run_id)


def test_the_store_is_the_option_then_the_variable_then_a_file_here(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    assert tracking.resolve_uri("") == f"sqlite:///{tmp_path / 'mlflow.db'}"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:5000")
    assert tracking.resolve_uri("") == "http://127.0.0.1:5000"
    assert tracking.resolve_uri("sqlite:////x/y.db") == "sqlite:////x/y.db"


def test_a_store_that_fails_does_not_end_a_run(uri: str, caplog: pytest.LogCaptureFixture) -> None:
    tracking.MlflowTracker(uri, "no such run").log_metrics({"val_loss": 1.0}, 1)
    assert "the run goes on" in caplog.text


def test_tracking_can_be_turned_off() -> None:
    tracker = tracking.start_run(tracking.OFF, "tests", "a run", {})
    tracker.log_metrics({"val_loss": 1.0}, 1)
    assert tracker.run_id == ""
    assert isinstance(tracking.continue_run(tracking.OFF, "x"), tracking.NullTracker)


@pytest.mark.parametrize("bad", ["gopher://nowhere", "http://127.0.0.1:9"])
def test_an_unusable_store_is_one_clear_line(bad: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    with pytest.raises(UserError, match="cannot be used") as caught:
        tracking.start_run(bad, "tests", "a run", {})
    assert "\n" not in str(caught.value)
