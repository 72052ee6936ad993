"""A version takes the champion's place only if it is better beyond doubt and serves what was trained."""

import dataclasses
import json
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from slm_ray import evaluate
from slm_ray.config.schema import ModelConfig, TrainConfig
from slm_ray.dataset.manifest import load_manifest
from slm_ray.errors import UserError
from slm_ray.evaluation import promotion
from slm_ray.evaluation.comparison import PairedDifference
from slm_ray.evaluation.measurement import Data, measure, subject
from slm_ray.generation.torch_backend import TorchBackend
from slm_ray.model.decoder import Decoder
from slm_ray.runs import checkpoint
from slm_ray.runs.checkpoint import TrainState
from slm_ray.tokenization.tokenizer import Tokenizer
from slm_ray.tracking import aliases, mlflow_runs, registration
from slm_ray.tracking.registry import RegistryError, ResolvedModel
from slm_ray.tracking.tracker import NullTracker
from slm_ray.training.context import TrainContext
from slm_ray.training.inputs import load_inputs
from slm_ray.training.loop import fit
from slm_ray.training.preflight import resolve
from tests.support.data_sets import write_data

BETTER, WORSE, UNSURE = (-0.02, -0.01), (0.01, 0.02), (-0.02, 0.001)


def difference(low: float, high: float) -> PairedDifference:
    return PairedDifference(mean=(low + high) / 2, standard_error=0.01, low=low, high=high, n_stories=12)


def nobody(*_: object) -> PairedDifference:
    raise AssertionError("there is nobody to be compared with")


@pytest.fixture
def add(mlflow_uri: str, tmp_path: Path, tiny_tokenizer: Tokenizer) -> Any:
    """Registers one more version of a name, from another seed."""
    run_id = mlflow_runs.start_run(mlflow_uri, "tests", "promotion", {}).run_id

    def register(name: str, seed: int, is_broken: bool = False) -> str:
        torch.manual_seed(seed)
        config = ModelConfig(vocab_size=tiny_tokenizer.vocab_size, seq_len=16, n_layers=1, d_model=8, n_heads=2, d_ff=8)
        state = TrainState(
            step=seed, samples_seen=seed, seed=0, world_size=1, data_fingerprint="abc", config={}, metrics=None
        )
        folder, model = tmp_path / f"{name}-{seed}", Decoder(config)
        if is_broken:
            model.norm.weight.data[3] = float("nan")
        checkpoint.save(folder, model, tiny_tokenizer, state, {})
        return registration.register(mlflow_uri, name, folder, run_id)

    return register


def test_the_first_version_is_promoted_and_a_second_time_it_is_so_before(add: Any, mlflow_uri: str) -> None:
    add("first", 1)
    found = promotion.promote("models:/first/1", nobody, mlflow_uri)
    assert (found.is_champion, found.instead_of, found.difference) == (True, "", None)
    assert aliases.versions_by_alias(mlflow_uri, "first") == {"champion": "1"}
    assert promotion.promote("models:/first@champion", nobody, mlflow_uri).reason == "it was so before"


@pytest.mark.parametrize(
    ("interval", "word", "champion"), [(BETTER, "better: ", "2"), (WORSE, "worse: ", "1"), (UNSURE, "not better", "1")]
)
def test_only_what_is_better_beyond_doubt_becomes_champion(
    add: Any, mlflow_uri: str, interval: tuple[float, float], word: str, champion: str
) -> None:
    name = f"judged-{word[:3]}"
    for seed in (1, 2):
        add(name, seed)
    promotion.promote(f"models:/{name}/1", nobody, mlflow_uri)
    compared = []

    def compare(candidate: ResolvedModel, other: ResolvedModel) -> PairedDifference:
        compared.append((candidate.version, other.version))
        return difference(*interval)

    found = promotion.promote(f"models:/{name}/2", compare, mlflow_uri)
    assert compared == [("2", "1")]
    assert found.is_champion == (champion == "2") and found.reason.startswith(word)
    by_alias = aliases.versions_by_alias(mlflow_uri, name)
    assert by_alias == {"champion": champion} | ({} if champion == "2" else {"challenger": "2"})
    tags = mlflow_runs.client(mlflow_uri).get_model_version(name, "2").tags
    assert tags["promotion_reason"] == found.reason and tags["promotion"] == (
        "promoted" if champion == "2" else "refused"
    )
    if champion == "2":
        assert aliases.roll_back(mlflow_uri, name) == ("2", "1")


def test_a_version_is_compared_with_the_last_champion_where_the_alias_was_taken_away(add: Any, mlflow_uri: str) -> None:
    """As somebody does in MLflow's page: that makes nobody the first of its name."""
    name, compared = "it's gone", []
    for seed in (1, 2, 3):
        add(name, seed)
    promotion.promote(f"models:/{name}/1", nobody, mlflow_uri)
    store = mlflow_runs.client(mlflow_uri)
    store.delete_registered_model_alias(name, "champion")

    def compare(candidate: ResolvedModel, other: ResolvedModel) -> PairedDifference:
        compared.append((candidate.version, other.version))
        return difference(*(WORSE if candidate.version == "2" else BETTER))

    assert promotion.promote_first(f"models:/{name}/2", mlflow_uri) is not None
    assert aliases.versions_by_alias(mlflow_uri, name) == {"challenger": "2"}
    found = promotion.promote(f"models:/{name}/2", compare, mlflow_uri)
    assert not found.is_champion and "nobody is champion now" in found.reason
    store.delete_model_version(name, "1")
    assert promotion.promote(f"models:/{name}/3", compare, mlflow_uri).is_champion
    assert compared == [("2", "1"), ("3", "2")]  # without any champion of before, the challenger
    assert aliases.versions_by_alias(mlflow_uri, name)["champion"] == "3"


def test_a_version_that_was_rolled_back_and_promoted_again_was_the_last_champion(add: Any, mlflow_uri: str) -> None:
    for seed in (1, 2, 3):
        add("returned", seed)
    promotion.promote("models:/returned/1", nobody, mlflow_uri)
    better = lambda *_: difference(*BETTER)  # noqa: E731
    promotion.promote("models:/returned/2", better, mlflow_uri)
    aliases.roll_back(mlflow_uri, "returned")
    store = mlflow_runs.client(mlflow_uri)
    store.delete_registered_model_alias("returned", "champion")
    assert aliases.version_to_beat(mlflow_uri, "returned", "3") == "1"
    promotion.promote("models:/returned/1", better, mlflow_uri)
    promotion.promote("models:/returned/2", better, mlflow_uri)
    store.delete_registered_model_alias("returned", "champion")
    assert aliases.version_to_beat(mlflow_uri, "returned", "3") == "2"


def test_a_model_that_the_serving_backend_computes_otherwise_is_refused_without_a_comparison(
    add: Any, mlflow_uri: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for seed in (1, 2):
        add("crooked", seed)
    promotion.promote("models:/crooked/1", nobody, mlflow_uri)

    class Crooked(TorchBackend):
        def decode(self, tokens: Any) -> Any:
            return super().decode(tokens) + 1e-2

    monkeypatch.setattr(promotion, "make_backend", lambda model, _: Crooked(model, 1))
    found = promotion.promote("models:/crooked/2", nobody, mlflow_uri)
    assert not found.is_champion and "logits differ from the trained model's by up to 0.01" in found.reason
    assert aliases.versions_by_alias(mlflow_uri, "crooked") == {"champion": "1", "challenger": "2"}


def test_a_model_whose_numbers_are_not_finite_is_refused_even_as_the_first(
    add: Any, mlflow_uri: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    add("endless", 1)

    class Broken(TorchBackend):
        def decode(self, tokens: Any) -> Any:
            return super().decode(tokens) * float("nan")

    monkeypatch.setattr(promotion, "make_backend", lambda model, _: Broken(model, 1))
    found = promotion.promote("models:/endless/1", nobody, mlflow_uri)
    assert not found.is_champion and "not finite" in found.reason
    assert aliases.versions_by_alias(mlflow_uri, "endless") == {"challenger": "1"}


@pytest.mark.parametrize("way", ["promote_first", "promote", "promote_on"])
def test_a_version_with_a_weight_that_is_no_number_is_refused_with_its_reason(
    add: Any, mlflow_uri: str, tiny_data: Path, way: str
) -> None:
    name = f"nan-{way}"
    add(name, 1, is_broken=True)
    found: promotion.Promotion | None
    if way == "promote_first":
        found = promotion.promote_first(f"models:/{name}/1", mlflow_uri)
    elif way == "promote":
        found = promotion.promote(f"models:/{name}/1", nobody, mlflow_uri)
    else:
        found = promotion.promote_on(f"models:/{name}/1", str(tiny_data), "validation", mlflow_uri)
    assert found is not None and not found.is_champion
    assert found.reason.startswith("model.") and found.reason.endswith(" holds numbers that are not finite")
    assert aliases.versions_by_alias(mlflow_uri, name) == {"challenger": "1"}
    tags = mlflow_runs.client(mlflow_uri).get_model_version(name, "1").tags
    assert (tags["promotion"], tags["promotion_reason"]) == ("refused", found.reason)


def test_a_champion_that_changes_meanwhile_is_compared_with_too(add: Any, mlflow_uri: str) -> None:
    for seed in (1, 2, 3):
        add("changing", seed)
    promotion.promote("models:/changing/1", nobody, mlflow_uri)
    compared = []

    def compare(_: ResolvedModel, other: ResolvedModel) -> PairedDifference:
        compared.append(other.version)
        if other.version == "1":  # another promotion ends first
            aliases.make_champion(mlflow_uri, "changing", "3", instead_of="1", tags={})
            return difference(*BETTER)
        return difference(*WORSE)

    found = promotion.promote("models:/changing/2", compare, mlflow_uri)
    assert compared == ["1", "3"] and not found.is_champion
    assert aliases.versions_by_alias(mlflow_uri, "changing") == {"champion": "3", "challenger": "2"}


def test_a_registry_that_goes_away_after_the_comparison_moves_nothing(
    add: Any, mlflow_uri: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for seed in (1, 2):
        add("gone", seed)
    promotion.promote("models:/gone/1", nobody, mlflow_uri)

    def compare(*_: object) -> PairedDifference:
        monkeypatch.setattr("mlflow.MlflowClient.set_registered_model_alias", away)
        monkeypatch.setattr("mlflow.MlflowClient.set_model_version_tag", away)
        return difference(*BETTER)

    def away(*_: object) -> None:
        raise OSError("the network is down")

    with pytest.raises(RegistryError, match=r"not available .*: the network is down"):
        promotion.promote("models:/gone/2", compare, mlflow_uri)
    assert aliases.versions_by_alias(mlflow_uri, "gone") == {"champion": "1"}


def test_a_folder_is_no_version_to_promote(tmp_path: Path, mlflow_uri: str) -> None:
    with pytest.raises(UserError, match="is no registered version: register it"):
        promotion.promote(str(tmp_path), nobody, mlflow_uri)


def test_a_champion_that_diverged_on_a_story_stands_in_nobody_s_way(
    add: Any, mlflow_uri: str, tiny_data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first of a name is measured on the golden prompts alone."""
    for seed in (1, 2):
        add("diverged", seed)
    promotion.promote("models:/diverged/1", nobody, mlflow_uri)
    measured = promotion.measure

    def measure_one(found: Any, data: Data) -> Any:
        if found.name.endswith(" 1"):
            torch.nn.init.constant_(next(found.model.parameters()), float("nan"))
        return measured(found, data)

    monkeypatch.setattr(promotion, "measure", measure_one)
    monkeypatch.chdir(tiny_data)
    found = promotion.promote_on("models:/diverged/2", ".", "validation", mlflow_uri)
    assert found.is_champion and found.reason.startswith("better: -inf bits per byte against version 1")
    assert found.to_record()["difference"]["high"] is None
    assert aliases.versions_by_alias(mlflow_uri, "diverged") == {"champion": "2"}
    store = mlflow_runs.client(mlflow_uri)
    evaluation = store.get_run(store.get_model_version("diverged", "2").tags["evaluation.run"])
    assert [one.dataset.name for one in evaluation.inputs.dataset_inputs] == [tiny_data.name]
    with pytest.raises(UserError, match="is not finite"):
        promotion.promote_on("models:/diverged/1", str(tiny_data), "validation", mlflow_uri)
    assert aliases.versions_by_alias(mlflow_uri, "diverged") == {"champion": "2"}


def run_evaluate(capsys: pytest.CaptureFixture[str], *words: object) -> tuple[int, str]:
    code = evaluate.main([str(word) for word in words])
    captured = capsys.readouterr()
    return code, captured.out + captured.err


def test_a_trained_model_takes_the_place_of_an_untrained_one_and_gives_it_back(
    add: Any, mlflow_uri: str, tiny_config: TrainConfig, capsys: pytest.CaptureFixture[str]
) -> None:
    """The whole way by the command: first, better, worse, rolled back."""
    inputs = load_inputs(resolve(dataclasses.replace(tiny_config, sample_prompt=""), lambda: 1), NullTracker())
    assert fit(inputs, TrainContext()).status == "finished"
    add("whole", 1)
    run_id = mlflow_runs.start_run(mlflow_uri, "tests", "whole", {}).run_id
    assert registration.register(mlflow_uri, "whole", inputs.folder.best.resolve(), run_id) == "2"
    add("whole", 3)
    common = ("--data", tiny_config.data, "--tracking-uri", mlflow_uri)
    code, text = run_evaluate(capsys, "--model", "models:/whole/1", "--promote", *common)
    assert (code, text) == (0, "whole version 1 is the champion now: the first champion of this name\n")
    code, text = run_evaluate(capsys, "--model", "models:/whole/2", "--promote", "--json", *common)
    found = json.loads(text)
    assert code == 0 and found["is_champion"] and found["instead_of"] == "1" and found["difference"]["high"] < 0
    code, text = run_evaluate(capsys, "--model", "models:/whole/3", "--promote", *common)
    assert code == 1 and "whole version 3 is the challenger now: worse: +" in text
    tags = mlflow_runs.client(mlflow_uri).get_model_version("whole", "2").tags
    expected = measure_of(inputs.folder.best.resolve(), tiny_config.data)
    assert float(tags["evaluation.bits_per_byte"]) == expected
    evaluation = mlflow_runs.client(mlflow_uri).get_run(tags["evaluation.run"])
    assert evaluation.data.metrics["bits_per_byte"] == expected
    assert evaluation.data.tags["mlflow.parentRunId"] == run_id
    rollback = ("--model", "models:/whole@champion", "--rollback", "--tracking-uri", mlflow_uri)
    assert run_evaluate(capsys, *rollback) == (0, "whole version 1 is the champion again, in place of version 2\n")
    code, text = run_evaluate(capsys, *rollback)
    assert code == 2 and "nothing says which was before it" in text and text.count("\n") == 1


def test_two_models_of_other_data_are_compared_on_one_text_and_it_is_said_on_which(
    mlflow_uri: str, tiny_config: TrainConfig, tiny_tokenizer: Tokenizer, tmp_path: Path
) -> None:
    """The champion was trained on A alone, the candidate on A and B: both are judged by the stories of both."""
    other = tmp_path / "more-data"
    write_data(other, tiny_tokenizer, {"train": [(500, 530)], "validation": [(530, 534)]})
    mixture, run_id = f"{tiny_config.data}=0.7 {other}=0.3", ""
    for data in (tiny_config.data, mixture):
        config = dataclasses.replace(tiny_config, name=Path(data).name, data=data, sample_prompt="", max_steps=1)
        inputs = load_inputs(resolve(config, lambda _: 1), NullTracker())
        fit(inputs, TrainContext())
        run_id = run_id or mlflow_runs.start_run(mlflow_uri, "tests", "mixed", {}).run_id
        registration.register(mlflow_uri, "mixed", inputs.folder.best.resolve(), run_id)
    promotion.promote("models:/mixed/1", nobody, mlflow_uri)
    assert promotion.held_out_split(mixture) == "validation"
    found = promotion.promote_on("models:/mixed/2", mixture, "validation", mlflow_uri)
    assert found.difference is not None and found.difference.n_stories == 14
    one = Path(tiny_config.data).name
    by_each = rf"{one} \([+-]0\.\d{{4}}\), more-data \([+-]0\.\d{{4}}\)"
    names = f"14 stories of the validation split of {by_each}, the same for both"
    mark = load_manifest(tiny_config.data).fingerprint[:12]
    assert re.search(rf"{names}; version 1 was trained on other data, {one} \(data set {mark}\)$", found.reason)
    store = mlflow_runs.client(mlflow_uri)
    tags = store.get_model_version("mixed", "2").tags
    assert tags["promotion_reason"] == found.reason
    assert tags["evaluation.data_fingerprint"] == tags["data_fingerprint"] == load_manifest(mixture).fingerprint
    assert [one["weight"] for one in json.loads(tags["data_mixtures"])[tags["data_fingerprint"]]] == [0.7, 0.3]
    inputs_of_it = store.get_run(tags["evaluation.run"]).inputs.dataset_inputs
    assert {one.dataset.name for one in inputs_of_it} == {one, "more-data"}


def test_what_a_champion_s_files_say_of_its_data_acts_on_no_terminal(
    tiny_config: TrainConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(promotion, "load_state", lambda _: SimpleNamespace(config={"data": "tales\x1b[2J\nbest"}))
    judge: Any = promotion.StoryJudge(Data.open(tiny_config.data, "validation"))
    own, its = SimpleNamespace(data_fingerprint="a"), SimpleNamespace(data_fingerprint="\x07b", version="1", path="")
    said = judge.describe(own, its)
    assert "trained on other data, tales" in said and said.isprintable()


def test_a_mixture_is_judged_by_test_stories_where_all_of_it_have_some(
    tiny_tokenizer: Tokenizer, tmp_path: Path
) -> None:
    splits = {"a": ("validation", "test"), "b": ("validation",), "c": ("validation", "test"), "d": ()}
    for number, (name, held_out) in enumerate(splits.items()):
        at = 40 * number
        ranges = {split: [(at + 20 + place, at + 21 + place)] for place, split in enumerate(held_out)}
        write_data(tmp_path / name, tiny_tokenizer, {"train": [(at, at + 9)], **ranges})

    def split_of(names: str) -> str:
        return promotion.held_out_split(" ".join(f"{tmp_path / name}=1" for name in names))

    assert [split_of(names) for names in ("ac", "acd", "ab", "bad")] == ["test", "test", "validation", "validation"]


def measure_of(folder: Path, data: str) -> float:
    with subject(str(folder)) as found:
        return measure(found, Data.open(data, "validation")).total.val_bits_per_byte


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--promote", "--against", "x"), "--against does nothing beside --promote"),
        (("--rollback", "--split", "test"), "--split does nothing beside --rollback"),
        (("--promote", "--rollback"), "does nothing beside"),
        (("--rollback", "--model", "some/folder"), "some/folder names no registered model"),
        (("--promote", "--split", "test"), "has no stories in its test split"),
    ],
)
def test_what_cannot_be_promoted_is_said_in_one_line(
    words: tuple[str, ...], said: str, tiny_data: Path, mlflow_uri: str, capsys: pytest.CaptureFixture[str]
) -> None:
    data = () if "--rollback" in words else ("--data", tiny_data)
    code, text = run_evaluate(capsys, *words, *data, "--tracking-uri", mlflow_uri)
    assert code == 2 and said in text and text.count("\n") == 1
