"""A run on whole stories: its losses, its count of tokens, its resuming, and what it is measured by."""

import dataclasses
import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from slm_ray import evaluate, train
from slm_ray.config.schema import IGNORED_TARGET, ModelConfig, TrainConfig
from slm_ray.dataset.manifest import load_manifest
from slm_ray.errors import UserError
from slm_ray.evaluation.measurement import Data, Subject, measure
from slm_ray.model.decoder import Decoder
from slm_ray.runs import checkpoint
from slm_ray.runs.outcome import RunStatus
from slm_ray.runs.train_state import Evaluation, TrainState
from slm_ray.tracking.tracker import NullTracker
from slm_ray.training.context import TrainContext
from slm_ray.training.evaluation import evaluate_stories
from slm_ray.training.inputs import TrainInputs, load_inputs
from slm_ray.training.loop import fit
from slm_ray.training.preflight import resolve
from slm_ray.training.trainer import Trainer
from tests.support.ranks import fit_in_ranks, samples_by_step
from tests.training.test_loop import stop_after

CONTEXT = 48
"""Shorter than some stories of the tiny data set, longer than others are not: see `test_the_data_has_both`."""


@pytest.fixture
def config(tiny_config: TrainConfig) -> TrainConfig:
    model = dataclasses.replace(tiny_config.model, seq_len=CONTEXT)
    return dataclasses.replace(tiny_config, packing="stories", model=model, sample_prompt="", max_steps=8)


def inputs_of(config: TrainConfig, **changes: Any) -> TrainInputs:
    return load_inputs(resolve(dataclasses.replace(config, **changes), lambda _: 1), NullTracker())


def losses(inputs: TrainInputs) -> list[float]:
    return inputs.history.series("train_loss")[1]


@pytest.mark.parametrize("attention", ["all", "story"])
def test_a_stopped_run_goes_on_as_if_nothing_had_happened(config: TrainConfig, attention: str) -> None:
    whole, stopped = (inputs_of(config, name=name, attention=attention) for name in ("whole", "stopped"))
    fit(whole, TrainContext())
    assert fit(stopped, stop_after(5)).status == RunStatus.STOPPED
    fit(inputs_of(config, name="stopped", attention=attention, resume=True), TrainContext())
    assert losses(stopped) == losses(whole)
    assert stopped.history.series("tokens") == whole.history.series("tokens")


def test_padding_is_neither_learned_nor_counted(config: TrainConfig) -> None:
    orders = (inputs_of(config, attention="story", seed=seed) for seed in range(50))
    trainers = (Trainer(inputs, TrainContext(), "fp32", is_compiled=False) for inputs in orders)
    trainer = next(one for one in trainers if (one.batches.at(0).targets == IGNORED_TARGET).any())
    batch = trainer.batches.at(0)
    is_real = batch.targets != IGNORED_TARGET
    assert batch.n_targets == is_real.sum() < is_real.size
    assert batch.places is not None
    with torch.no_grad():
        logits = trainer.model(torch.from_numpy(batch.inputs), places=torch.from_numpy(batch.places)).double()
        chosen = logits.log_softmax(-1).gather(-1, torch.from_numpy(batch.targets).clamp(0)[..., None])[..., 0]
        expected = -chosen[torch.from_numpy(is_real)].mean().item()
    loss, _ = trainer.train_step()
    assert loss.item() == pytest.approx(expected, rel=1e-5)
    assert trainer.tokens_seen == is_real.sum()


def test_each_story_of_a_row_is_read_as_if_it_were_alone(config: TrainConfig) -> None:
    inputs = inputs_of(config)
    trainer = Trainer(inputs, TrainContext(), "fp32", is_compiled=False)
    batch = trainer.batches.at(0)
    assert batch.places is not None
    with torch.no_grad():
        packed = trainer.model(torch.from_numpy(batch.inputs), places=torch.from_numpy(batch.places))
        for row, places in enumerate(batch.places):
            begins = [*np.flatnonzero(places == 0).tolist(), len(places)]
            for begin, end in itertools.pairwise(begins):
                alone = trainer.model(torch.from_numpy(batch.inputs[row : row + 1, begin:end]))
                assert torch.allclose(packed[row, begin:end], alone[0], atol=1e-5)


@pytest.mark.parametrize("attention", ["all", "story"])
def test_two_workers_see_and_learn_what_one_does(config: TrainConfig, attention: str) -> None:
    alone, both = (dataclasses.replace(config, name=name, attention=attention) for name in ("alone", "both"))
    fit_in_ranks(alone, 1)
    fit_in_ranks(dataclasses.replace(both, workers=2), 2, stop_at=3)
    fit_in_ranks(dataclasses.replace(both, resume=True), 1)
    first, second = inputs_of(alone), inputs_of(both)
    assert losses(second) == pytest.approx(losses(first), abs=1e-4)
    assert samples_by_step(second.folder) == samples_by_step(first.folder)
    found = [inputs.history.series("val_loss")[1] for inputs in (first, second)]
    assert found[1] == pytest.approx(found[0], abs=1e-4)


def test_it_is_compiled_with_masks(config: TrainConfig) -> None:
    model = ModelConfig(seq_len=CONTEXT, n_layers=1, d_model=16, n_heads=2, d_ff=16)
    small = dataclasses.replace(config, attention="story", max_steps=2, model=model)
    plain, compiled = inputs_of(small, name="plain"), inputs_of(small, name="compiled")
    fit(plain, TrainContext())
    fit(compiled, TrainContext(), is_compiled=True)
    assert losses(compiled) == pytest.approx(losses(plain), abs=1e-4)


def test_an_epoch_has_the_steps_of_its_samples(config: TrainConfig) -> None:
    inputs = inputs_of(config, max_steps=0, epochs=2.0)
    trainer = Trainer(inputs, TrainContext(), "fp32", is_compiled=False)
    assert inputs.max_steps == round(2 * trainer.batches.samples.n_samples / config.batch_size)
    for _ in range(inputs.max_steps):
        trainer.tokens_seen += trainer.batches.at(trainer.step).n_targets
        trainer.step += 1
    n_tokens = load_manifest(config.data).splits["train"].tokens
    assert trainer.tokens_seen == pytest.approx(2 * n_tokens, rel=0.05)
    assert inputs_of(config, name="again", max_steps=0, epochs=1.0).max_steps < inputs.max_steps


def test_the_cost_of_packing_is_told_at_the_start(config: TrainConfig) -> None:
    inputs = inputs_of(config, max_steps=1)
    fit(inputs, TrainContext())
    said = [line["message"] for line in inputs.history.lines() if "message" in line]
    assert any("whole stories in" in text and "of all places are left empty" in text for text in said)


def test_validation_is_the_fair_measure_of_evaluate(config: TrainConfig) -> None:
    inputs = inputs_of(config)
    model = Decoder(inputs.config.model).eval()
    found = evaluate_stories(model, inputs.validation, seq_len=CONTEXT, context=TrainContext())
    data = Data.open(config.data, "validation")
    expected = measure(Subject(name="tiny", model=model, tokenizer=inputs.tokenizer), data).total
    assert found.val_bits_per_byte == pytest.approx(expected.val_bits_per_byte, rel=1e-6)
    assert found.is_like(expected) and expected.is_like(found)
    assert (found.val_measure, found.val_context, found.val_stride) == ("stories", CONTEXT, CONTEXT // 2)


def test_the_data_has_both(config: TrainConfig) -> None:
    lengths = np.diff(inputs_of(config).validation.stories.ends)
    assert (lengths > CONTEXT).any() and (lengths > 1).all()


def test_results_of_two_measures_are_never_compared() -> None:
    by_story = Evaluation(val_loss=2.0, val_measure="stories", val_context=128, val_stride=64)
    by_windows = Evaluation(val_loss=1.0, val_measure="windows", val_context=128, val_stride=128)
    assert by_story.is_better_than(by_windows) and by_windows.is_better_than(by_story)
    assert not by_story.is_better_than(dataclasses.replace(by_story, val_loss=1.5))
    assert by_windows.is_like(Evaluation(val_loss=3.0))  # of an earlier version


def test_every_record_says_by_which_measure_it_is(config: TrainConfig) -> None:
    inputs = inputs_of(config)
    fit(inputs, TrainContext())
    summary = json.loads((inputs.folder.path / "summary.json").read_text())
    state = json.loads((inputs.folder.best / "state.json").read_text())
    (line, *_) = [line for line in inputs.history.lines() if "val_loss" in line]
    for record in (summary["best"], summary["metrics"], state["metrics"], state["best"], line):
        assert (record["val_measure"], record["val_context"], record["val_stride"]) == ("stories", CONTEXT, 24)


def test_a_checkpoint_of_before_goes_on_with_its_windows(
    tiny_config: TrainConfig, capsys: pytest.CaptureFixture[str]
) -> None:
    before = dataclasses.replace(tiny_config, validation="windows", sample_prompt="", max_steps=4)
    inputs = inputs_of(before)
    fit(inputs, TrainContext())
    state_file = inputs.folder.latest / "state.json"
    record = json.loads(state_file.read_text())
    for name in ("packing", "attention", "validation"):
        del record["config"][name]
    for evaluation in (record["metrics"], record["best"]):
        for name in ("val_measure", "val_context", "val_stride"):
            del evaluation[name]
    del record["tokens_seen"]
    state = TrainState.from_record(record)
    assert (state.config["packing"], state.config["validation"]) == ("windows", "windows")
    assert state.metrics is not None and state.metrics.val_measure == "windows"
    words = ["--resume", "--output", before.output, "--name", before.name, "--max-steps", "8"]
    same_words = Path(before.output) / "same.yaml"
    same_words.write_text(f"batch_size: {before.batch_size}\nmodel: {json.dumps(dataclasses.asdict(before.model))}\n")
    assert train.parse_config([*words, "--config", str(same_words)]).validation == "windows"
    for option, value in (("--packing", "stories"), ("--validation", "stories")):
        assert train.main([*words, option, value]) == 2
        assert f"{option[2:]} was windows and is now stories" in capsys.readouterr().err


def test_the_stories_of_a_step_are_named(config: TrainConfig, capsys: pytest.CaptureFixture[str]) -> None:
    inputs = inputs_of(config)
    fit(inputs, TrainContext())
    trainer = Trainer(inputs, TrainContext(), "fp32", is_compiled=False)
    for step in (1, 8):
        words = ["--json", "--explain", str(inputs.folder.latest), "--step", str(step)]
        assert evaluate.main(words) == 0
        found = json.loads(capsys.readouterr().out)["step"]
        assert (found["packing"], len(found["windows"])) == ("stories", config.batch_size)
        for window, targets in zip(found["windows"], trainer.batches.at(step - 1).targets, strict=True):
            predicted = [one for story in window["stories"] for one in tokens_of(Path(config.data), story)]
            assert predicted == targets[targets != IGNORED_TARGET].tolist()
    assert evaluate.main(words[1:]) == 0
    assert "whole stories, sample" in capsys.readouterr().out


def tokens_of(data: Path, story: dict[str, Any]) -> list[int]:
    import pyarrow.parquet as pq

    row = pq.read_table(data / story["shard"]).slice(story["row"], 1).to_pylist()[0]
    assert row["story_id"] == story["story_id"]
    tokens: list[int] = row["tokens"][slice(*story["targets"])]
    return tokens


def test_attention_by_story_needs_stories(tiny_config: TrainConfig) -> None:
    with pytest.raises(ValueError, match=r"attention \(story\) is a matter of packing stories"):
        dataclasses.replace(tiny_config, attention="story")


@pytest.mark.parametrize("seq_len", [1, 0, -3])
def test_a_context_shorter_than_two_is_refused(seq_len: int, capsys: pytest.CaptureFixture[str]) -> None:
    assert train.main(["--model.seq-len", str(seq_len)]) == 2
    err = capsys.readouterr().err
    assert f"seq_len ({seq_len}) must be at least" in err and err.count("\n") == 1


def test_a_run_without_validation_of_stories_is_refused_as_before(config: TrainConfig, tmp_path: Path) -> None:
    del tmp_path
    long = dataclasses.replace(config, model=ModelConfig(seq_len=10**5, n_layers=1, d_model=8, n_heads=2, d_ff=8))
    assert inputs_of(long, max_steps=0).max_steps == 1  # one sample holds all stories
    with pytest.raises(UserError, match="one sample needs"):
        inputs_of(long, packing="windows")


def test_states_keep_their_count_of_tokens(config: TrainConfig) -> None:
    steps = 40
    inputs = inputs_of(config, max_steps=steps)
    fit(inputs, TrainContext())
    state = checkpoint.load_state(inputs.folder.latest)
    batches = Trainer(inputs, TrainContext(), "fp32", is_compiled=False).batches
    assert state.tokens_seen == sum(batches.at(step).n_targets for step in range(steps))
    assert state.tokens_seen < state.samples_seen * CONTEXT, "no sample had padding"
