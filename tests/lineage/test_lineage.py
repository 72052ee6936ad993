"""Where a model comes from: the chain of a checkpoint, and the stories of each of its run's steps."""

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from slm_ray import evaluate
from slm_ray.config.schema import TrainConfig
from slm_ray.dataset.batches import TrainBatches
from slm_ray.dataset.manifest import MANIFEST, load_manifest
from slm_ray.lineage.chain import trace
from slm_ray.runs import checkpoint
from slm_ray.runs.code_version import CodeVersion, code_version
from slm_ray.runs.train_state import TrainState
from slm_ray.tokenization.tokenizer import Tokenizer
from slm_ray.tracking import mlflow_runs, registration
from slm_ray.training import checkpointing
from slm_ray.training.context import TrainContext
from slm_ray.training.inputs import TrainInputs
from slm_ray.training.loop import fit
from tests.support.data_sets import write_data
from tests.support.fault_runs import folder_of, inputs_of, with_dropout


def train(inputs: TrainInputs) -> None:
    fit(inputs, TrainContext())


CODE = CodeVersion(commit="c0ffee" + "0" * 34, is_dirty=True)


@pytest.fixture(scope="module")
def other_data(tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer: Tokenizer) -> Path:
    """Other stories with the same tokenizer."""
    folder = tmp_path_factory.mktemp("other-data")
    write_data(folder, tiny_tokenizer, {"train": [(200, 230), (230, 290)], "validation": [(290, 300)]})
    return folder


def explain(capsys: pytest.CaptureFixture[str], *words: object) -> dict[str, Any]:
    assert evaluate.main(["--json", "--explain", *map(str, words)]) == 0
    content: dict[str, Any] = json.loads(capsys.readouterr().out)
    return content


def refusal(capsys: pytest.CaptureFixture[str], *words: object) -> str:
    assert evaluate.main(["--explain", *map(str, words)]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1
    return err


class Recorder:
    """The windows that the loader gave to a run, by step."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.windows: dict[int, list[list[int]]] = {}
        original = TrainBatches.at

        def at(batches: TrainBatches, step: int) -> Any:
            batch = original(batches, step)
            self.windows[step + 1] = np.concatenate([batch.inputs, batch.targets[:, -1:]], axis=1).tolist()
            return batch

        monkeypatch.setattr(TrainBatches, "at", at)


def test_the_stories_of_every_step_are_those_that_the_run_was_given_across_a_resume_with_other_data(
    tiny_config: TrainConfig, other_data: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(checkpointing, "code_version", lambda: CODE)
    recorder = Recorder(monkeypatch)
    config = with_dropout(tiny_config)
    train(inputs_of(config, max_steps=4))
    train(inputs_of(config, max_steps=8, resume=True, force=True, data=str(other_data), batch_size=4, seed=9))
    folder = folder_of(config).latest
    first, second = load_manifest(config.data).fingerprint, load_manifest(other_data).fingerprint

    chain = explain(capsys, folder)
    assert (chain["steps"], chain["samples_seen"]) == (8, 4 * 8 + 4 * 4)
    assert chain["data_lineage"] == [[first, 0], [second, 4]]
    assert [one["after_step"] for one in chain["attempts"]] == [0, 4]
    assert [(one["seed"], one["batch_size"], one["workers"]) for one in chain["attempts"]] == [(0, 8, 1), (9, 4, 1)]
    assert chain["attempts"][1]["commit"] == CODE.commit and chain["attempts"][1]["is_dirty"]
    assert chain["config_differences"]["batch_size"]["run"] == 4
    assert "teacher" not in chain["config_differences"]  # a list where it was saved, and none in either
    assert "data" not in chain["config_differences"] and "model.vocab_size" not in chain["config_differences"]

    tokenizer = Tokenizer.load(other_data / "tokenizer.json")
    for step in range(1, 9):
        data = Path(config.data) if step <= 4 else other_data
        found = explain(capsys, folder, "--step", step, "--data", data)["step"]
        assert found["attempt"] == (1 if step <= 4 else 2)
        assert len(found["windows"]) == found["batch_size"] == (8 if step <= 4 else 4)
        for window, given in zip(found["windows"], recorder.windows[step], strict=True):
            named = [token for story in window["stories"] for token in tokens_of(data, story)]
            assert given == ([tokenizer.eos_id] if window["number"] == 0 else []) + named
            assert "".join(story["text"] for story in window["stories"]) == tokenizer.decode(given)
            assert all(story["story_id"] == f"sample#{story['source_row']}" for story in window["stories"])

    assert "was trained on " + first[:12] in refusal(capsys, folder, "--step", 4, "--data", other_data)
    assert f"was trained on {second[:12]} from step 5 on" in refusal(capsys, folder, "--step", 5, "--data", config.data)
    assert str(other_data) in evaluate_text(capsys, folder, "--step", 8)  # where the run was given it


def tokens_of(data: Path, story: dict[str, Any]) -> list[int]:
    import pyarrow.parquet as pq

    row = pq.read_table(data / story["shard"]).slice(story["row"], 1).to_pylist()[0]
    assert row["story_id"] == story["story_id"] and len(row["tokens"]) == story["story_tokens"]
    tokens: list[int] = row["tokens"][slice(*story["tokens"])]
    return tokens


def evaluate_text(capsys: pytest.CaptureFixture[str], *words: object) -> str:
    assert evaluate.main(["--explain", *map(str, words)]) == 0
    return capsys.readouterr().out


def test_a_run_records_the_code_that_it_ran(tiny_config: TrainConfig) -> None:
    config = with_dropout(tiny_config)
    train(inputs_of(config, max_steps=1))
    (attempt,) = checkpoint.load_state(folder_of(config).latest).attempts
    assert attempt.code_version == code_version()


@pytest.fixture
def run(tiny_config: TrainConfig, monkeypatch: pytest.MonkeyPatch) -> TrainInputs:
    monkeypatch.setattr(checkpointing, "code_version", lambda: CODE)
    inputs = inputs_of(dataclasses.replace(tiny_config, sample_prompt=""), max_steps=4)
    train(inputs)
    return inputs


def test_the_text_says_all_that_the_chain_has(run: TrainInputs, capsys: pytest.CaptureFixture[str]) -> None:
    text = evaluate_text(capsys, run.folder.latest, "--step", 1)
    for part in (
        f"none: {run.folder.latest} is a folder", "4, after 32 samples", "batches of 8, seed 0, 1 worker(s), ",
        f"commit {CODE.commit}, with changes that were not committed", "model.d_ff 64 (there ",
        f"{run.data_fingerprint} from step 1 on", "of attempt 1: 8 windows of 32 targets", "sample 8   window ",
        "read and not predicted",
    ):  # fmt: skip
        assert part in text, part


@pytest.mark.parametrize(("words", "message"), [
    (["--step", "0"], "step (0) must be from 1 to 4"), (["--step", "5"], "step (5) must be from 1 to 4"),
    (["--step", "-1"], "step (-1) must be from 1 to 4"), (["--step", "two"], "two"),
    (["--step", "1", "--data", "absent"], "no manifest.json in absent"), (["--data", "x"], "name a step"),
    (["--split", "test"], "--split"), (["--step", "1", "--data", "\0"], "zero byte"),
])  # fmt: skip
def test_a_mistake_is_one_line(
    run: TrainInputs, words: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert message in refusal(capsys, run.folder.latest, *words)


def test_an_option_without_a_model_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert evaluate.main(["--explai", "x"]) == 2
    assert evaluate.main(["--explain"]) == 2
    assert evaluate.main(["--explain="]) == 2
    assert capsys.readouterr().err.count("\n") == 3


def test_a_data_set_that_was_cut_otherwise_under_its_old_fingerprint_is_refused(
    run: TrainInputs, tmp_path: Path, tiny_tokenizer: Tokenizer, capsys: pytest.CaptureFixture[str]
) -> None:
    cut = tmp_path / "cut"
    write_data(cut, tiny_tokenizer, {"train": [(0, 70), (70, 110)], "validation": [(110, 120)]})
    assert "was trained on" in refusal(capsys, run.folder.latest, "--step", 1, "--data", cut)
    manifest = json.loads((cut / MANIFEST).read_text())
    (cut / MANIFEST).write_text(json.dumps(manifest | {"fingerprint": run.data_fingerprint}))
    assert "manifest.json was altered" in refusal(capsys, run.folder.latest, "--step", 1, "--data", cut)


def test_an_altered_shard_or_checkpoint_is_named(
    run: TrainInputs, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = shutil.copytree(run.config.data, tmp_path / "data")
    (data / "train/00001.parquet").write_bytes(b"altered")
    found = refusal(capsys, run.folder.latest, "--step", 1, "--data", data)
    assert "00001.parquet was truncated or altered" in found
    copy = shutil.copytree(run.folder.latest, tmp_path / "copy")
    state = json.loads((copy / "state.json").read_text())
    (copy / "state.json").write_text(json.dumps(state | {"seed": 3}))
    assert "state.json is not what was written" in refusal(capsys, copy)


def test_a_model_without_its_state_is_refused(run: TrainInputs, capsys: pytest.CaptureFixture[str]) -> None:
    model = run.folder.latest / "model"
    assert f"{model} is a model without state.json" in refusal(capsys, model)
    assert "no model 'nowhere'" in refusal(capsys, "nowhere")


def test_a_registered_version_names_its_aliases_and_explains_a_step(
    run: TrainInputs, mlflow_uri: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", mlflow_uri)
    tracked = mlflow_runs.start_run(mlflow_uri, "tests", "a run", {})
    version = registration.register(mlflow_uri, "explained", run.folder.latest, tracked.run_id)
    store = mlflow_runs.client(mlflow_uri)
    store.set_registered_model_alias("explained", "challenger", version)
    reference = f"models:/explained/{version}"
    chain = explain(capsys, reference, "--step", 2, "--data", run.config.data)
    assert (chain["name"], chain["version"], chain["run_id"]) == ("explained", version, tracked.run_id)
    assert "challenger" in chain["aliases"]
    assert len(chain["step"]["windows"]) == 8
    assert f"{version} of explained" in evaluate_text(capsys, reference)
    assert "name its folder with --data" in refusal(capsys, reference, "--step", 2)  # it knows no place of its maker
    shutil.copytree(run.config.data, "data/tinystories")
    assert explain(capsys, reference, "--step", 2)["step"] == chain["step"]


def old_version(run: TrainInputs, folder: Path, **changes: Any) -> Path:
    """The run's checkpoint as an earlier version wrote it: without attempts."""
    latest = checkpoint.Checkpoint.open(run.folder.latest.resolve())
    state: TrainState = dataclasses.replace(latest.state, attempts=[], **changes)
    checkpoint.save(folder, latest.model(), run.tokenizer, state, {})
    return folder


def test_a_checkpoint_of_an_earlier_version_is_explained_as_far_as_it_can_be(
    run: TrainInputs, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    now = explain(capsys, run.folder.latest, "--step", 3)
    before = explain(capsys, old_version(run, tmp_path / "old"), "--step", 3)
    assert before["step"] == now["step"]
    assert now["are_attempts_recorded"] and not before["are_attempts_recorded"]
    other = old_version(run, tmp_path / "other", samples_seen=20)
    assert "saw 20 samples, and its record accounts for 32" in refusal(capsys, other, "--step", 3)
    config = {name: value for name, value in checkpoint.load_state(other).config.items() if name != "batch_size"}
    bare = old_version(run, tmp_path / "bare", config=config)
    assert "does not say how it was trained: config.batch_size is missing" in refusal(capsys, bare)


def test_a_story_cannot_act_on_the_terminal(run: TrainInputs, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.setattr(Tokenizer, "decode", lambda self, ids: "\x1b[2J")
    text = evaluate_text(capsys, run.folder.latest, "--step", 1)
    assert "\x1b" not in text and r"\x1b[2J" in text


def test_the_preset_of_a_run_is_found(run: TrainInputs) -> None:
    chain = trace(str(run.folder.latest))
    assert chain.differences["model.d_ff"][1] == 64
    assert chain.differences["optim.warmup_steps"][1] == 2
