"""A run on several data sets: exact resume with other workers, every sample named, bad mixtures refused."""

import dataclasses
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from slm_ray import evaluate, train
from slm_ray.config.schema import IGNORED_TARGET, TrainConfig
from slm_ray.dataset.manifest import MixedManifest, load_manifest
from slm_ray.errors import UserError
from slm_ray.exports.data_card import SAMPLE, data_lines, data_source, hub_names
from slm_ray.runs import checkpoint
from slm_ray.tokenization.tokenizer import Tokenizer
from slm_ray.tokenization.training import train_bpe
from slm_ray.tracking.registration import lineage
from slm_ray.training.context import TrainContext
from slm_ray.training.inputs import TrainInputs
from slm_ray.training.loop import fit
from slm_ray.training.trainer import Trainer
from tests.support.data_sets import write_data
from tests.support.ranks import fit_in_ranks, samples_by_step
from tests.training.test_whole_stories import inputs_of, losses, tokens_of


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer: Tokenizer) -> Path:
    """Other stories in the same tokens."""
    folder = tmp_path_factory.mktemp("other") / "more-data"
    write_data(folder, tiny_tokenizer, {"train": [(500, 530)], "validation": [(530, 534)]})
    return folder


@pytest.fixture(params=["windows", "stories"])
def config(tiny_config: TrainConfig, other: Path, request: pytest.FixtureRequest) -> TrainConfig:
    data = f"{tiny_config.data}=0.7 {other}=0.3"
    return dataclasses.replace(tiny_config, data=data, packing=request.param, sample_prompt="")


def test_it_goes_on_with_other_workers_exact_to_the_sample(config: TrainConfig) -> None:
    alone, changed = (dataclasses.replace(config, name=name) for name in ("alone", "changed"))
    fit_in_ranks(alone, 1)
    fit_in_ranks(dataclasses.replace(changed, workers=2), 2, stop_at=3)
    fit_in_ranks(dataclasses.replace(changed, resume=True), 1)
    first, second = inputs_of(alone), inputs_of(changed)
    assert samples_by_step(second.folder) == samples_by_step(first.folder)
    assert losses(second) == pytest.approx(losses(first), abs=1e-4)


def test_every_sample_is_named(config: TrainConfig, other: Path, capsys: pytest.CaptureFixture[str]) -> None:
    inputs = inputs_of(config)
    fit(inputs, TrainContext())
    trainer, seen = Trainer(inputs, TrainContext(), "fp32", is_compiled=False), set()
    for step in (1, 5, 8):
        assert evaluate.main(["--json", "--explain", str(inputs.folder.latest), "--step", str(step)]) == 0
        found = json.loads(capsys.readouterr().out)["step"]
        for window, targets in zip(found["windows"], trainer.batches.at(step - 1).targets, strict=True):
            seen.add(window["data"])
            named = [one for story in window["stories"] for one in tokens_of(Path(window["data"]), story)]
            assert named == targets[targets != IGNORED_TARGET].tolist()
    assert seen == {config.data.split("=")[0], str(other)}


def test_validation_has_the_stories_of_all(config: TrainConfig, other: Path) -> None:
    inputs = inputs_of(config)
    parts = [load_manifest(place).splits["validation"] for place in (config.data.split("=")[0], str(other))]
    assert inputs.validation.n_targets == sum(part.tokens for part in parts)
    assert len(inputs.validation.stories) == sum(part.rows for part in parts)
    assert inputs.validation.n_bytes == sum(part.bytes for part in parts)
    ends = inputs.validation.tokens[1:][np.asarray(inputs.validation.stories.ends[1:]) - 1]
    assert set(ends.tolist()) == {inputs.tokenizer.eos_id}


def test_weights_and_data_sets_decide_what_it_is(config: TrainConfig, other: Path) -> None:
    def mark(data: str) -> str:
        return load_manifest(data).fingerprint

    one = config.data.split("=")[0]
    assert mark(f"{one}=7 {other}=3") == mark(config.data) != mark(f"{one}=0.6 {other}=0.4")
    assert mark(f"{one}=0.7 {other}=0.3") not in (mark(one), mark(str(other)))


def test_a_run_says_what_its_samples_are_and_is_resumed_on_its_own_mixture(
    config: TrainConfig, capsys: pytest.CaptureFixture[str]
) -> None:
    inputs: TrainInputs = inputs_of(config, max_steps=2)
    fit(inputs, TrainContext())
    said = [line["message"] for line in inputs.history.lines() if "message" in line]
    assert any(text.startswith("samples: 70.00% of ") and "30.00% of more-data" in text for text in said)
    words: list[Any] = ["--resume", "--output", config.output, "--name", config.name, "--max-steps", 4, "--data"]
    changed = [word.replace("=0.7", "=0.5") for word in config.data.split()]
    assert train.main([*map(str, words), *changed]) == 2
    assert "a run is resumed on its own data" in capsys.readouterr().err


@pytest.mark.parametrize(("words", "message"), [
    (["{one}=1", "{other}=-1"], "must be FOLDER=WEIGHT with a weight above 0"),
    (["{one}=1", "{other}=0"], "must be FOLDER=WEIGHT"), (["{one}=1", "{other}=much"], "must be FOLDER=WEIGHT"),
    (["{one}=1", "{one}=2"], "is named twice"), (["{one}=1", "{copy}=2"], "are one data set"),
    (["{one}=1", "{foreign}=2"], "has another tokenizer than"), (["{one}=1", "{other}=1e-9"], "is too small a share"),
    (["{one}=1", "nowhere=2"], "nowhere: run `python pipelines/prepare.py` first"),
])  # fmt: skip
def test_a_bad_mixture_is_one_line(
    words: list[str], message: str, tiny_data: Path, other: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    foreign = train_bpe(["a b c d e f g h"] * 3, vocab_size=300)
    write_data(tmp_path / "foreign", foreign, {"train": [(0, 9)], "validation": [(9, 12)]})
    (tmp_path / "copy").symlink_to(tiny_data)
    places = {"one": tiny_data, "other": other, "copy": tmp_path / "copy", "foreign": tmp_path / "foreign"}
    assert train.main(["--data", *(word.format(**places) for word in words), "--tracking-uri", "none"]) == 2
    err = capsys.readouterr().err
    assert message in err and err.count("\n") == 1


@pytest.mark.parametrize("measure", ["stories", "windows"])
def test_a_model_is_measured_on_the_stories_of_all_as_training_validates(
    config: TrainConfig, other: Path, capsys: pytest.CaptureFixture[str], measure: Any
) -> None:
    inputs = inputs_of(config, max_steps=1, validation=measure)
    fit(inputs, TrainContext())
    words = ["--model", str(inputs.folder.latest), "--measure", measure, "--json", "--data"]
    assert evaluate.main([*words, *config.data.split()]) == 0
    found = json.loads(capsys.readouterr().out)
    validated = checkpoint.load_state(inputs.folder.latest).metrics
    assert validated is not None
    assert found["loss"] == pytest.approx(validated.val_loss) and found["measure"] == validated.val_measure
    assert found["bits_per_byte"] == pytest.approx(validated.val_bits_per_byte)
    assert found["data_fingerprint"] == load_manifest(config.data).fingerprint
    if measure == "stories":
        names = [(row["data_set"], row["stories"]) for row in found["by_data_set"]]
        assert names == [(Path(config.data.split("=")[0]).name, 10), (other.name, 4)]
        assert sum(row["loss"] * row["tokens"] for row in found["by_data_set"]) == pytest.approx(
            found["loss"] * found["tokens"]
        )


def test_records_name_each_data_set_with_its_fingerprint_and_weight(
    config: TrainConfig, other: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    inputs = inputs_of(config, max_steps=1)
    fit(inputs, TrainContext())
    state, folders = checkpoint.load_state(inputs.folder.latest), (config.data.split("=")[0], str(other))
    (shares,) = state.mixtures.values()
    weighted = zip(folders, (0.7, 0.3))
    wanted = [(Path(one).name, load_manifest(one).fingerprint, weight) for one, weight in weighted]
    assert [(one.name, one.fingerprint, one.weight) for one in shares] == wanted
    mark = state.data_fingerprint
    tag = json.loads(lineage(inputs.folder.latest.resolve())["data_mixtures"])
    assert [tuple(one.values()) for one in tag[mark]] == wanted
    assert evaluate.main(["--explain", str(inputs.folder.latest)]) == 0
    explained = capsys.readouterr().out
    assert f"30.00% of more-data, {wanted[1][1]}" in explained
    card = "\n".join(data_lines(SimpleNamespace(manifest=None, state=state)))  # type: ignore[arg-type]
    assert f"**Mixture** `{mark}`, from step 1 on" in card
    assert f"**30.00%** of its samples from `more-data`, data set `{wanted[1][1]}`" in card
    assert "mixtures" not in dataclasses.replace(state, mixtures={}).to_record()


def test_a_run_that_goes_on_with_other_weights_knows_both_mixtures(config: TrainConfig) -> None:
    inputs = inputs_of(config, max_steps=1)
    fit(inputs, TrainContext())
    data = config.data.replace("=0.7", "=0.6").replace("=0.3", "=0.4")
    again = inputs_of(config, max_steps=2, data=data, resume=True, force=True)
    fit(again, TrainContext())
    state = checkpoint.load_state(again.folder.latest)
    assert list(state.mixtures) == [mark for mark, _ in state.data_lineage]
    assert [[one.weight for one in shares] for shares in state.mixtures.values()] == [[0.7, 0.3], [0.6, 0.4]]


def test_the_stories_of_a_step_are_named_on_the_mixture_as_it_was_typed(
    config: TrainConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    inputs = inputs_of(config, max_steps=1)
    fit(inputs, TrainContext())
    checkpoint.copy_for_serving(inputs.folder.latest, tmp_path / "given")  # which knows no place any more
    words = ["--json", "--explain", str(tmp_path / "given"), "--step", "1"]
    assert evaluate.main(words) == 2
    assert "name its folder with --data" in capsys.readouterr().err
    assert evaluate.main([*words, "--data", *config.data.split()]) == 0
    assert len(json.loads(capsys.readouterr().out)["step"]["windows"]) == config.batch_size


def test_a_version_is_promoted_by_its_mixture(
    config: TrainConfig, other: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("slm_ray.evaluation.promotion.promote_first", lambda *_: None)
    one = config.data.split("=")[0]
    result = SimpleNamespace(version="2", tracking_uri="none")

    def said(*data: str) -> str:
        mixture = train.parse_config(["--data", *data, "--register", "tales"])
        return train._standing(mixture, result)  # type: ignore[arg-type]

    command = (
        "models:/tales/2 is registered; champion if it is better: python slm_ray/evaluate.py --model models:/tales/2"
    )
    assert said(one) == f"{command} --data {one} --promote"
    assert said(f"{one}=2", f"{other}=3") == f"{command} --data {one}=2 {other}=3 --promote"


def test_instructions_of_two_forms_are_no_mixture(
    config: TrainConfig, tiny_tokenizer: Tokenizer, tmp_path: Path
) -> None:
    folders = [tmp_path / name for name in "ab"]
    for form, folder in enumerate(folders, 1):
        write_data(folder, tiny_tokenizer, {"train": [(700 + form, 702 + form)], "validation": [(710, 712)]})
        path = folder / "manifest.json"
        record = json.loads(path.read_text()) | {"parameters": {"instructions": form}, "fingerprint": f"{form}" * 64}
        path.write_text(json.dumps(record))
    with pytest.raises(UserError, match="has instructions of another form than"):
        load_manifest(f"{folders[0]}=1 {folders[1]}=1")


def test_a_card_claims_no_more_of_a_mixture_than_holds_for_all(config: TrainConfig) -> None:
    manifest = load_manifest(config.data)
    assert isinstance(manifest, MixedManifest)
    first, second = manifest.parts
    sample = dataclasses.replace(second.manifest, source={"used": SAMPLE}, parameters={"a": 1, "b": 2})
    hub = dataclasses.replace(
        first.manifest, source={"used": "hub:roneneldan/TinyStories"}, parameters={"a": 1, "b": 3}
    )
    parts = (dataclasses.replace(first, manifest=hub), dataclasses.replace(second, manifest=sample))
    found = data_source(dataclasses.replace(manifest, parts=parts))
    assert hub_names(dataclasses.replace(manifest, parts=parts)) == ["roneneldan/TinyStories"]
    assert (
        found.licence == "" and "70.00%: [roneneldan/TinyStories]" in found.text and "30.00%: The sample" in found.text
    )
    same = (dataclasses.replace(first, manifest=sample), dataclasses.replace(second, manifest=sample))
    assert data_source(dataclasses.replace(manifest, parts=same)).licence != ""
