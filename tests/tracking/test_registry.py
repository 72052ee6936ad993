"""Registered versions, and the references that lead to models."""

from pathlib import Path
from typing import Any

import mlflow
import pytest
import torch
from mlflow import MlflowClient
from mlflow.exceptions import MlflowException
from mlflow.protos.databricks_pb2 import RESOURCE_DOES_NOT_EXIST

from slm_ray.config.resuming import EARLIER
from slm_ray.config.schema import ModelConfig
from slm_ray.errors import UserError
from slm_ray.generation.backend_choice import make_backend
from slm_ray.generation.engine import Engine
from slm_ray.generation.sampling import SamplingParams
from slm_ray.model.decoder import Decoder
from slm_ray.runs import checkpoint, verification
from slm_ray.runs.checkpoint import TrainState
from slm_ray.runs.train_state import Evaluation
from slm_ray.tokenization.tokenizer import Tokenizer
from slm_ray.tracking import mlflow_runs, registration, registry, tracker
from slm_ray.tracking.mlflow_model import write_mlflow_model
from slm_ray.tracking.registry import RegistryError
from tests.support.champions import register_champion
from tests.support.paths import ROOT


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
    first = register_champion(mlflow_uri, "told", folder, run.run_id)
    second = register_champion(mlflow_uri, "told", folder, run.run_id)
    assert (first, second) == ("1", "2")
    tags = mlflow_runs.client(mlflow_uri).get_model_version("told", "2").tags
    assert tags["data_fingerprint"] == "abc"
    assert tags["step"] == "7"
    assert tags["val_bits_per_byte"] == "0.75"
    assert tags["tokenizer_sha256"] == tiny_tokenizer.sha256
    found = registry.resolve_model("models:/told@champion", mlflow_uri)
    assert (found.name, found.version, found.run_id, found.step) == ("told", "2", run.run_id, 7)
    checkpoint.load_model(found.path)
    assert not (found.path / checkpoint.OPTIMIZER).exists()
    assert registry.resolve_model("models:/told/1", mlflow_uri).version == "1"


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
        register_champion(mlflow_uri, "stories", folder, start(mlflow_uri).run_id)


def test_a_second_version_of_a_run_leaves_the_files_of_the_first(
    mlflow_uri: str, tmp_path: Path, tiny_tokenizer: Tokenizer
) -> None:
    run_id = start(mlflow_uri).run_id
    weights = {}
    for step in (8, 16):
        folder = write_checkpoint(tmp_path / f"step-{step}", tiny_tokenizer, step)
        version = register_champion(mlflow_uri, "twice", folder, run_id)
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
            register_champion(mlflow_uri, "broken-off", folder, run_id)
    register_champion(mlflow_uri, "broken-off", folder, run_id)
    checkpoint.load_model(registry.resolve_model("models:/broken-off@champion", mlflow_uri).path)
    with monkeypatch.context() as patch:
        patch.setattr(MlflowClient, "log_artifacts", broken)  # nothing is written to what is there
        register_champion(mlflow_uri, "broken-off", folder, run_id)


def broken(*_: object) -> None:
    raise OSError("the disk is full")


def test_a_name_with_a_quote_is_registered(mlflow_uri: str, folder: Path) -> None:
    assert register_champion(mlflow_uri, "it's", folder, start(mlflow_uri).run_id) == "1"
    assert registry.resolve_model("models:/it's@champion", mlflow_uri).version == "1"


def test_what_is_registered_names_no_place_of_its_maker(
    mlflow_uri: str, tmp_path: Path, tiny_tokenizer: Tokenizer
) -> None:
    places = {"data": "/home/me/data/mice", "output": "/home/me/runs", "tracking_uri": "http://me:secret@host"}
    folder = write_checkpoint(tmp_path / "one", tiny_tokenizer, 4, config={"name": "tiny", "seed": 3} | places)
    assert "secret" not in (folder / "state.json").read_text()
    register_champion(mlflow_uri, "placeless", folder, start(mlflow_uri).run_id)
    found = registry.resolve_model("models:/placeless@champion", mlflow_uri)
    assert checkpoint.load_state(found.path).config == {**EARLIER, "name": "tiny", "seed": 3, "data": "mice"}
    text = "".join(path.read_text() for path in found.path.rglob("*.json"))
    assert "/home/me" not in text and "host" not in text


def test_a_version_names_every_data_set_of_its_run(mlflow_uri: str, tmp_path: Path, tiny_tokenizer: Tokenizer) -> None:
    lineage = [("first", 0), ("second", 4)]
    folder = write_checkpoint(tmp_path / "one", tiny_tokenizer, 8, data_fingerprint="second", lineage=lineage)
    run_id = start(mlflow_uri).run_id
    version = register_champion(mlflow_uri, "two-sets", folder, run_id)
    tags = mlflow_runs.client(mlflow_uri).get_model_version("two-sets", version).tags
    assert tags["data_lineage"] == '[["first", 0], ["second", 4]]'
    assert registration.registered_version(mlflow_uri, "two-sets", folder, run_id) == version


def test_a_version_of_before_that_has_fewer_tags_is_known(mlflow_uri: str, folder: Path) -> None:
    store, run_id = mlflow_runs.client(mlflow_uri), start(mlflow_uri).run_id
    tags = {name: registration.lineage(folder)[name] for name in ("data_fingerprint", "step", "tokenizer_sha256")}
    store.create_registered_model("before")
    version = store.create_model_version("before", source=folder.as_uri(), run_id=run_id, tags=tags)
    store.set_registered_model_alias("before", "champion", version.version)
    assert registration.registered_version(mlflow_uri, "before", folder, run_id) == "1"
    assert registration.registered_version(mlflow_uri, "before", folder, "another") == ""


def test_a_store_that_is_away_is_named_without_its_password(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    with pytest.raises(registry.RegistryError, match=r"not available from http://127.0.0.1:9") as caught:
        registry.resolve_model("models:/stories@champion", "http://me:secret@127.0.0.1:9")
    assert "secret" not in str(caught.value)


def test_a_project_that_was_moved_is_said_with_the_way_out(tmp_path: Path, tiny_tokenizer: Tokenizer) -> None:
    home, moved = tmp_path / "home", tmp_path / "moved"
    home.mkdir()
    uri = f"sqlite:///{home / 'mlflow.db'}"
    run_id = start(uri).run_id
    register_champion(uri, "stories", write_checkpoint(tmp_path / "one", tiny_tokenizer, 4), run_id)
    home.rename(moved)
    with pytest.raises(UserError, match=f"{uri} is not there, and run .* --tracking-uri"):
        mlflow_runs.has_run(uri, run_id)
    assert not home.exists()

    uri = f"sqlite:///{moved / 'mlflow.db'}"
    with pytest.raises(registry.RegistryError, match=f"were kept in {home}.*moved"):
        registry.resolve_model("models:/stories@champion", uri)
    with pytest.raises(UserError, match=f"'tests' .* keeps its files in {home}.*--experiment"):
        mlflow_runs.has_run(uri, run_id)
    with pytest.raises(UserError, match=f"'tests' .* keeps its files in {home}.*--experiment"):
        start(uri)
    assert not mlflow_runs.has_run(uri, run_id, "another")
    assert mlflow_runs.start_run(uri, "another", "a run", {}).run_id
    assert not home.exists()
    home.symlink_to(moved)  # a way out that was named
    assert registry.resolve_model("models:/stories@champion", uri).step == 4


def test_the_marker_of_a_folder_is_read_up_to_a_bound(folder: Path) -> None:
    with (folder / verification.MARKER).open("ab") as file:
        file.truncate(2**40)  # a hole: it takes no room
    for ask in (registry.locate, registry.resolve_model):
        with pytest.raises(RegistryError, match="is larger than"):
            ask(str(folder))


def test_a_place_that_cannot_be_looked_at_may_answer_later(
    folder: Path, mlflow_uri: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A server that waits for a model goes on waiting."""
    run = start(mlflow_uri)
    register_champion(mlflow_uri, "unreadable", folder, run.run_id)

    def stale(*_: object, **__: object) -> bool:
        raise OSError(116, "Stale file handle")

    with monkeypatch.context() as patch, pytest.raises(RegistryError, match="Stale"):
        patch.setattr(Path, "is_dir", stale)
        registry.locate(str(folder))
    with monkeypatch.context() as patch, pytest.raises(RegistryError, match="Stale"):
        patch.setattr(Path, "exists", stale)
        registry.locate("models:/unreadable@champion", mlflow_uri)
    with monkeypatch.context() as patch, pytest.raises(RegistryError, match="cannot be read: Stale"):
        patch.setattr(Path, "open", stale)
        registry.locate(str(folder))

    def cannot_say(*_: object) -> None:
        raise UserError("its files cannot be read: Stale file handle")

    with monkeypatch.context() as patch, pytest.raises(RegistryError, match="Stale"):
        patch.setattr(registry, "lost_place", cannot_say)
        registry.resolve_model("models:/unreadable@champion", mlflow_uri)


def test_a_store_that_is_away_does_not_say_that_nothing_is_registered(
    folder: Path, mlflow_uri: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Or a finished run that is resumed would be registered a second time."""
    assert registration.registered_version(mlflow_uri, "nobody", folder, "r1") == ""
    run = start(mlflow_uri)
    registration.register(mlflow_uri, "once", folder, run.run_id)
    assert registration.registered_version(mlflow_uri, "once", folder, run.run_id) == "1"

    def away(*_: object) -> None:
        raise MlflowException("connection refused")

    monkeypatch.setattr(MlflowClient, "search_model_versions", away)
    with pytest.raises(RegistryError, match="connection refused"):
        registration.registered_version(mlflow_uri, "once", folder, run.run_id)


def test_a_version_opens_in_mlflow_alone_and_writes_what_the_engine_writes(
    mlflow_uri: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing of it is a pickle: one that were read would fail the test."""
    register_champion(mlflow_uri, "opened", folder, start(mlflow_uri).run_id)
    model, tokenizer = checkpoint.load_model(registry.resolve_model("models:/opened@champion", mlflow_uri).path)
    options = SamplingParams(max_tokens=5, temperature=0.7, top_k=50, seed=3)
    prompts = ["Once upon", "The"]
    expected = Engine(make_backend(model, 8), tokenizer).generate(prompts, [options] * 2)

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("a pickle was read")

    for name in ("pickle.load", "pickle.loads", "cloudpickle.load", "cloudpickle.loads"):
        monkeypatch.setattr(name, refuse)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", mlflow_uri)
    opened = mlflow.pyfunc.load_model("models:/opened@champion")
    told = opened.predict(prompts, params={"max_tokens": 5, "seed": 3})
    assert told == [prompt + one.text for prompt, one in zip(prompts, expected, strict=True)]
    assert len(opened.predict(["Once"])) == 1


def test_a_registered_model_names_no_place_of_its_maker_in_mlflows_files(tmp_path: Path, folder: Path) -> None:
    write_mlflow_model(folder, tmp_path / "model")
    text = "".join(path.read_text() for path in (tmp_path / "model").iterdir() if path.is_file())
    assert str(tmp_path) not in text and str(ROOT) not in text


def test_two_runs_that_are_the_first_at_once_both_register(
    mlflow_uri: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each has seen that there is no experiment and no model of the name; the other is faster."""
    first = mlflow_runs.start_run(mlflow_uri, "at once", "one", {})
    registration.register(mlflow_uri, "at once", folder, first.run_id)
    seen = {"get_experiment_by_name": 0, "get_registered_model": 0}

    def unseen(name: str, answer: Any) -> None:
        real = getattr(MlflowClient, name)

        def ask(self: MlflowClient, *given: Any) -> Any:
            seen[name] += 1
            return answer() if seen[name] == 1 else real(self, *given)

        monkeypatch.setattr(MlflowClient, name, ask)

    def missing() -> None:
        raise MlflowException("no such model", error_code=RESOURCE_DOES_NOT_EXIST)

    unseen("get_experiment_by_name", lambda: None)
    unseen("get_registered_model", missing)
    second = mlflow_runs.start_run(mlflow_uri, "at once", "two", {})
    assert registration.register(mlflow_uri, "at once", folder, second.run_id) == "2"
    homes = {MlflowClient(mlflow_uri).get_run(run.run_id).info.experiment_id for run in (first, second)}
    assert len(homes) == 1 and set(seen.values()) <= {1, 2}


class UploadFailedError(Exception):
    """As boto3's, which is neither an OSError nor MLflow's."""


def test_an_error_of_the_store_of_files_is_one_line_whatever_its_kind(
    mlflow_uri: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = start(mlflow_uri)
    registration.register(mlflow_uri, "files", folder, run.run_id)

    def fail(*_: Any, **__: Any) -> None:
        raise UploadFailedError("the bucket of http://me:secret@store is gone")

    monkeypatch.setattr(MlflowClient, "get_model_version_download_uri", lambda *_: "s3://bucket/model")
    monkeypatch.setattr("mlflow.artifacts.download_artifacts", fail)
    with pytest.raises(RegistryError, match=r"models:/files/1 is not available .*the bucket of http://store is gone"):
        registry.resolve_model("models:/files/1", mlflow_uri)
    monkeypatch.setattr(MlflowClient, "list_artifacts", lambda *_: [])
    monkeypatch.setattr(MlflowClient, "log_artifacts", fail)
    with pytest.raises(UserError, match=r"cannot register files at .*the bucket of http://store is gone"):
        registration.register(mlflow_uri, "files", folder, run.run_id)
