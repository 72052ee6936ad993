"""The loop without Ray: what it learns, leaves, and does after an interruption."""

import dataclasses
import json
import math
import shutil
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from slm_ray.config.schema import ModelConfig, OptimConfig, TrainConfig
from slm_ray.dataset.manifest import load_manifest
from slm_ray.dataset.stream import TokenStream
from slm_ray.errors import UserError
from slm_ray.model.decoder import Decoder
from slm_ray.runs import checkpoint, run_lock
from slm_ray.runs.checkpoint import Checkpoint
from slm_ray.runs.history import History, plot_loss
from slm_ray.runs.outcome import RunStatus
from slm_ray.runs.run_folder import RunFolder, newest_run, repair_links
from slm_ray.runs.train_state import Evaluation
from slm_ray.tracking.tracker import NullTracker
from slm_ray.training.checkpointing import Checkpointer
from slm_ray.training.context import TrainContext
from slm_ray.training.evaluation import evaluate_windows
from slm_ray.training.inputs import TrainInputs, load_inputs
from slm_ray.training.loop import fit
from slm_ray.training.run_log import RunLog
from slm_ray.training.trainer import Trainer
from tests.support.pictures import assert_drawn, record_axes


class KilledError(Exception):
    """Stands for the end of the process."""


@pytest.fixture
def inputs(tiny_config: TrainConfig) -> TrainInputs:
    vocab_size = load_manifest(tiny_config.data).tokenizer["vocab_size"]
    model = dataclasses.replace(tiny_config.model, vocab_size=vocab_size, dropout=0.1)
    return load_inputs(dataclasses.replace(tiny_config, model=model), NullTracker())


def elsewhere(inputs: TrainInputs, name: str, **changes: Any) -> TrainInputs:
    """The same task in another run folder, with changes to its config."""
    config = dataclasses.replace(inputs.config, name=name, **changes)
    return dataclasses.replace(inputs, config=config, folder=RunFolder(inputs.folder.path.parent / name))


def weights(inputs: TrainInputs) -> dict[str, torch.Tensor]:
    return checkpoint.load_model(inputs.folder.latest)[0].state_dict()


def losses(inputs: TrainInputs) -> list[float]:
    return inputs.history.series("train_loss")[1]


def restored(inputs: TrainInputs, precision: str) -> Trainer:
    """The trainer of a run that continues."""
    trainer = Trainer(inputs, TrainContext(), precision, is_compiled=False)
    Checkpointer(trainer, RunLog()).restore(inputs.folder.latest_valid())
    return trainer


def kill_at(step: int) -> TrainContext:
    def report(metrics: Mapping[str, Any]) -> None:
        if metrics["step"] == step:
            raise KilledError

    return TrainContext(report=report)


def test_a_run_leaves_best_and_latest_and_its_record(inputs: TrainInputs, monkeypatch: pytest.MonkeyPatch) -> None:
    summary = fit(inputs, TrainContext())
    assert summary.status == "finished"
    assert checkpoint.load_state(inputs.folder.latest).step == 8
    best = checkpoint.load_state(inputs.folder.best)
    assert best.metrics.val_loss == summary.best.val_loss
    assert best.samples_seen == best.step * 8
    steps, values = inputs.history.series("val_loss")
    assert steps == [4, 8]
    assert values[1] < values[0] < math.log(512)
    assert [line["sample"] for line in inputs.history.lines() if "sample" in line]
    drawn = record_axes(monkeypatch)
    plot_loss(inputs.history, inputs.folder.path / "loss.png")
    assert_drawn(inputs.folder.path / "loss.png", (960, 540))
    ((axes,),) = drawn
    for line, name in zip(axes.lines, ("train_loss", "val_loss"), strict=True):
        assert [data.tolist() for data in line.get_data()] == list(inputs.history.series(name))
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["training", "validation"]


def test_a_seed_gives_one_loss_curve(inputs: TrainInputs) -> None:
    fit(inputs, TrainContext())
    again = elsewhere(inputs, "again")
    fit(again, TrainContext())
    other = elsewhere(inputs, "other", seed=1)
    fit(other, TrainContext())
    assert losses(inputs) == losses(again) != losses(other)


@pytest.mark.parametrize(
    "changes",
    [
        {"name": "adamw"},
        {"name": "muon"},
        {"name": "muon", "lookahead": 0.6, "tail_average": 0.6},
    ],
    ids=["adamw", "muon", "muon-on-a-path"],
)
def test_a_resumed_run_is_bit_identical_to_one_that_was_not_interrupted(
    inputs: TrainInputs, changes: dict[str, Any]
) -> None:
    inputs = elsewhere(inputs, "whole", optim=dataclasses.replace(inputs.config.optim, **changes))
    fit(inputs, TrainContext())
    broken = elsewhere(inputs, "broken")
    with pytest.raises(KilledError):
        fit(broken, kill_at(4))
    fit(broken, TrainContext())
    assert losses(broken) == losses(inputs)
    expected = weights(inputs)
    assert all(torch.equal(tensor, expected[name]) for name, tensor in weights(broken).items())


def test_a_damaged_newest_checkpoint_is_passed_over(inputs: TrainInputs) -> None:
    fit(inputs, TrainContext())
    expected = weights(inputs)
    (inputs.folder.checkpoint_path(8) / "model" / "model.safetensors").write_bytes(b"torn")
    fit(inputs, TrainContext())
    assert all(torch.equal(tensor, expected[name]) for name, tensor in weights(inputs).items())
    assert inputs.history.series("val_loss")[0] == [4, 8]


def test_a_kill_between_a_checkpoint_and_its_links_is_made_good(inputs: TrainInputs) -> None:
    class KilledRunFolder(RunFolder):
        def publish(self, step: int, *, is_best: bool, keep: int, keep_best: int) -> None:
            if step == 8:
                raise KilledError
            super().publish(step, is_best=is_best, keep=keep, keep_best=keep_best)

    broken = dataclasses.replace(inputs, folder=KilledRunFolder(inputs.folder.path))
    with pytest.raises(KilledError):
        fit(broken, TrainContext())
    assert checkpoint.load_state(inputs.folder.best).step == 4
    summary = fit(inputs, TrainContext())
    assert checkpoint.load_state(inputs.folder.latest).step == 8
    assert checkpoint.load_state(inputs.folder.best).step == summary.best.step == 8
    assert inputs.history.series("val_loss")[0] == [4, 8]


def test_the_best_of_those_left_stands_in_for_a_lost_best(inputs: TrainInputs) -> None:
    fit(inputs, TrainContext())
    best = int(checkpoint.load_state(inputs.folder.best).step)
    assert best == 8
    shutil.rmtree(inputs.folder.checkpoint_path(8))
    assert repaired_best(inputs, 4, best=8) == 4
    assert checkpoint.load_state(inputs.folder.best).step == 4


def repaired_best(inputs: TrainInputs, latest: int, best: int) -> int:
    """Step of the best checkpoint, once the links were repaired of a run whose best one was that of step `best`."""
    found = Checkpoint.open(inputs.folder.checkpoint_path(latest))
    lost = Evaluation(val_loss=0.0, val_perplexity=1.0, val_bits_per_byte=0.0, step=best)
    repaired = repair_links(inputs.folder, Checkpoint(found.path, dataclasses.replace(found.state, best=lost)))
    assert repaired is not None
    return repaired.step


def test_optimizer_settings_of_a_resumed_run_are_those_it_was_given(inputs: TrainInputs) -> None:
    fit(inputs, TrainContext())
    optim = dataclasses.replace(inputs.config.optim, weight_decay=0.0, beta2=0.5)
    trainer = restored(dataclasses.replace(inputs, config=dataclasses.replace(inputs.config, optim=optim)), "fp32")
    assert trainer.step == 8
    assert {group["weight_decay"] for group in trainer.optimizer.param_groups} == {0.0}
    assert trainer.optimizer.param_groups[0]["betas"] == (0.9, 0.5)


def test_a_large_seed_is_a_seed(inputs: TrainInputs) -> None:
    """Not one that a library of 32 bits makes of it."""
    seeds = {"zero": 0, "large": 2**40, "again": 2**40, "larger": 2**63 - 1}
    runs = {name: elsewhere(inputs, name, seed=seed) for name, seed in seeds.items()}
    for one in runs.values():
        fit(one, TrainContext())
    curves = {name: tuple(losses(one)) for name, one in runs.items()}
    assert checkpoint.load_state(runs["large"].folder.latest).seed == 2**40
    assert curves["large"] == curves["again"]
    assert len(set(curves.values())) == 3


def stop_at(step: int, inputs: TrainInputs) -> TrainContext:
    """Asks for a stop once that step is in the record (the test's task logs every second step) or after it."""
    asked = iter(range(1, 1000))
    first = checkpoint.load_state(inputs.folder.latest).step if inputs.folder.latest.exists() else 0
    return TrainContext(is_stop_requested=lambda: first + next(asked) >= step)


@pytest.mark.parametrize("step", [1, 3, 4, 8], ids=["first", "between two lines", "before a validation", "last"])
def test_a_run_that_is_asked_to_stop_loses_no_step_and_no_bit(inputs: TrainInputs, step: int) -> None:
    fit(inputs, TrainContext())
    stopped = elsewhere(inputs, "stopped")
    summary = fit(stopped, stop_at(step, stopped))
    assert (summary.status, summary.step) == (RunStatus.STOPPED, step)
    assert checkpoint.load_state(stopped.folder.latest).step == step
    assert fit(stopped, TrainContext()).status == RunStatus.FINISHED
    assert losses(stopped) == losses(inputs)
    assert stopped.history.series("val_loss") == inputs.history.series("val_loss")
    expected = weights(inputs)
    assert all(torch.equal(tensor, expected[name]) for name, tensor in weights(stopped).items())
    assert stopped.folder.best.resolve().name == inputs.folder.best.resolve().name


def test_a_run_stopped_again_and_again_is_still_the_same_run(inputs: TrainInputs) -> None:
    fit(inputs, TrainContext())
    often = elsewhere(inputs, "often")
    for step in range(1, 8):
        fit(often, stop_at(step, often))
        assert checkpoint.load_state(often.folder.latest).step == step
    fit(often, TrainContext())
    assert losses(often) == losses(inputs)


def test_patience_ends_a_run_that_no_longer_learns_and_a_resume_leaves_it_so(inputs: TrainInputs) -> None:
    optim = dataclasses.replace(inputs.config.optim, lr=1e-30, warmup_steps=0)  # the validation loss stands still
    short = elsewhere(inputs, "short", optim=optim, eval_interval_steps=1, patience=3)
    summary = fit(short, TrainContext())
    assert (summary.status, summary.step, summary.best.step) == (RunStatus.FINISHED, 4, 1)
    assert fit(short, TrainContext()).step == 4
    assert not any("tail_average" in line.get("message", "") for line in short.history.lines())
    averaged = elsewhere(short, "averaged", optim=dataclasses.replace(optim, tail_average=0.5))
    assert fit(averaged, TrainContext()).step == 4
    assert sum("tail_average) was not blended in" in line.get("message", "") for line in averaged.history.lines()) == 1
    longer = dataclasses.replace(short, config=dataclasses.replace(short.config, patience=5))
    assert fit(longer, TrainContext()).step == 6


def test_the_next_steps_do_not_wait_for_a_checkpoint_nor_change_it(inputs: TrainInputs) -> None:
    """The disk is held up until the last step is done."""
    is_done = threading.Event()
    write = checkpoint.write

    def slow(*arguments: Any) -> None:
        assert is_done.wait(60), "the steps waited for the disk"
        write(*arguments)

    reported: list[int] = []
    train_step = Trainer.train_step

    def step(self: Trainer) -> tuple[torch.Tensor, torch.Tensor]:
        done = train_step(self)
        if self.step == 8:
            is_done.set()
        return done

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(checkpoint, "write", slow)
        patch.setattr(Trainer, "train_step", step)
        fit(inputs, TrainContext(report=lambda metrics: reported.append(metrics["step"])))
    assert reported == [4, 8]
    at_four, _ = checkpoint.load_model(inputs.folder.checkpoint_path(4))
    shutil.rmtree(inputs.folder.checkpoint_path(8))
    plain = elsewhere(inputs, "plain")
    with pytest.raises(KilledError):
        fit(plain, kill_at(4))
    expected = weights(plain)
    assert all(torch.equal(tensor, expected[name]) for name, tensor in at_four.state_dict().items())


def test_the_best_few_are_kept(inputs: TrainInputs) -> None:
    many = elsewhere(inputs, "many", eval_interval_steps=1, keep_checkpoints=1, keep_best=3)
    fit(many, TrainContext())
    steps, values = many.history.series("val_loss")
    expected = {8} | {step for _, step in sorted(zip(values, steps, strict=True))[:3]}
    assert {int(path.name.split("-")[1]) for path in many.folder.checkpoints()} == expected


@pytest.mark.parametrize("spoiled", ["gradient", "loss"])
def test_a_run_that_explodes_stops_before_its_weights_are_spoiled(inputs: TrainInputs, spoiled: str) -> None:
    forward = Decoder.forward
    factor = {"gradient": math.inf, "loss": 100.0}[spoiled]

    def forward_wrongly(self: Decoder, *arguments: Any) -> torch.Tensor:
        loss = forward(self, *arguments)
        return loss * factor if self.training and trainers[-1].step == 5 else loss

    trainers: list[Trainer] = []
    init = Trainer.__init__
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Trainer, "__init__", lambda self, *rest: (trainers.append(self), init(self, *rest))[1])
        patch.setattr(Decoder, "forward", forward_wrongly)
        summary = fit(inputs, TrainContext())
    assert summary.status == RunStatus.DIVERGED
    assert spoiled in summary.reason
    assert checkpoint.load_state(inputs.folder.latest).step == 4
    assert all(torch.isfinite(tensor).all() for tensor in trainers[0].model.state_dict().values())


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_fp16_clips_unscaled_gradients_and_its_scale_is_saved(inputs: TrainInputs, optimizer: str) -> None:
    inputs = elsewhere(inputs, optimizer, optim=dataclasses.replace(inputs.config.optim, name=optimizer))
    plain = Trainer(elsewhere(inputs, "plain"), TrainContext(), "fp32", is_compiled=False)
    half = elsewhere(inputs, "half")
    trainer = Trainer(half, TrainContext(), "fp16", is_compiled=False)
    expected, got = plain.train_step()[1], trainer.train_step()[1]
    assert float(got) == pytest.approx(float(expected), rel=0.02)  # not 65,536 times as much
    trainer.scaler.update(512.0)
    checkpointer = Checkpointer(trainer, RunLog())
    checkpointer.save(None)
    assert checkpointer.finish_write() is None
    assert restored(half, "fp16").scaler.get_scale() == 512.0


def test_leftovers_of_a_killed_writer_are_removed(inputs: TrainInputs) -> None:
    partial = inputs.folder.path / "checkpoints" / "step-00000004.partial"
    partial.mkdir(parents=True)
    fit(inputs, TrainContext())
    assert not list(inputs.folder.path.rglob("*.partial"))


def test_accumulation_gives_the_gradients_of_the_whole_batch(inputs: TrainInputs) -> None:
    whole = elsewhere(inputs, "whole", model=dataclasses.replace(inputs.config.model, dropout=0.0))
    parts = elsewhere(whole, "parts", accumulation_steps=4)
    norms = []
    for one in (whole, parts):
        trainer = Trainer(one, TrainContext(), "fp32", is_compiled=False)
        norms.append([float(trainer.train_step()[1]) for _ in range(3)])
    assert norms[0] == pytest.approx(norms[1], rel=1e-5)


def test_only_some_checkpoints_are_kept_and_the_best_among_them(inputs: TrainInputs) -> None:
    many = elsewhere(inputs, "many", eval_interval_steps=1, keep_checkpoints=2)
    fit(many, TrainContext())
    steps = [path.name for path in many.folder.checkpoints()]
    assert 2 <= len(steps) <= 3
    assert many.folder.best.resolve().name in steps
    assert many.folder.latest.resolve().name == "step-00000008"


def test_a_loss_that_is_no_number_stops_the_run_and_keeps_the_last_good_checkpoint(inputs: TrainInputs) -> None:
    calls = []

    def poison(metrics: Mapping[str, Any]) -> None:
        calls.append(metrics["step"])

    trainer_init = Trainer.train_step

    def train_step(self: Trainer) -> tuple[torch.Tensor, torch.Tensor]:
        if self.step == 5:
            with torch.no_grad():
                self.model.norm.weight.fill_(math.nan)
        return trainer_init(self)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Trainer, "train_step", train_step)
        summary = fit(inputs, TrainContext(report=poison))
    assert summary.status == RunStatus.DIVERGED
    assert calls == [4]
    assert checkpoint.load_state(inputs.folder.latest).step == 4


def test_bits_per_byte_is_all_nats_over_all_bytes(inputs: TrainInputs) -> None:
    model = Decoder(inputs.config.model).eval()
    stream = inputs.validation
    got = evaluate_windows(model, stream, seq_len=32, context=TrainContext())
    with torch.no_grad():
        nats = 0.0
        for start in range(0, stream.n_targets, 32):
            part = torch.from_numpy(stream.tokens[start : start + 33].astype("int64"))[None]
            nats += model(part[:, :-1], part[:, 1:]).item()
    assert got.val_bits_per_byte == pytest.approx(nats / math.log(2) / stream.n_bytes, rel=1e-5)
    assert got.val_loss == pytest.approx(nats / stream.n_targets, rel=1e-5)


def test_evaluation_in_parts_sums_to_the_whole(inputs: TrainInputs) -> None:
    model = Decoder(inputs.config.model).eval()
    whole = evaluate_windows(model, inputs.validation, seq_len=32, context=TrainContext())
    sums: list[torch.Tensor] = []
    for rank in range(2):
        evaluate_windows(
            model,
            inputs.validation,
            seq_len=32,
            context=TrainContext(rank=rank, world_size=2, all_reduce_sum=_keep(sums)),
        )
    nats, tokens = (sums[0] + sums[1]).tolist()
    assert nats / tokens == pytest.approx(whole.val_loss, rel=1e-6)


def _keep(sums: list[torch.Tensor]) -> Any:
    def all_reduce_sum(values: torch.Tensor) -> torch.Tensor:
        sums.append(values.clone())
        return values

    return all_reduce_sum


def test_golden_loss_curve() -> None:
    """Fixed seed, fixed tokens, one thread: the losses of four steps, to 1e-4."""
    tokens = (torch.arange(600) * 7919 % 61).numpy().astype("uint16")
    stream = TokenStream.of_split(tokens, 600, 0)
    config = TrainConfig(
        batch_size=4,
        model=ModelConfig(vocab_size=64, seq_len=16, n_layers=2, d_model=32, n_heads=4, d_ff=64),
        optim=OptimConfig(lr=1e-2, warmup_steps=0),
    )
    folder = RunFolder(Path("/nonexistent"))
    inputs = TrainInputs(
        config=config,
        max_steps=4,
        data_fingerprint="",
        train=stream,
        validation=stream,
        tokenizer=None,  # type: ignore[arg-type]
        folder=folder,
        tracker=NullTracker(),
    )
    trainer = Trainer(inputs, TrainContext(), "fp32", is_compiled=False)
    assert [float(trainer.train_step()[0]) for _ in range(4)] == pytest.approx(GOLDEN_LOSSES, abs=1e-4)


GOLDEN_LOSSES = [4.176282, 3.937200, 3.794150, 3.685516]


def test_the_newest_run_is_the_one_to_resume(inputs: TrainInputs) -> None:
    fit(inputs, TrainContext())
    assert newest_run(inputs.folder.path.parent) == inputs.folder
    shutil.rmtree(inputs.folder.path)
    assert newest_run(inputs.folder.path.parent) is None


def test_a_half_written_last_line_of_the_record_is_left_out(tmp_path: Path) -> None:
    history = History(tmp_path / "metrics.jsonl")
    history.append({"step": 1, "train_loss": 2.0})
    with history.path.open("a", encoding="utf-8") as file:
        file.write(json.dumps({"step": 2})[:-2])
    assert list(history.lines()) == [{"step": 1, "train_loss": 2.0}]
    history.rewind(0)
    assert list(history.lines()) == []


def stop_after(step: int) -> TrainContext:
    """Asks for a stop after so many steps."""
    asked = iter(range(1, 1000))
    return TrainContext(is_stop_requested=lambda: next(asked) == step)


def test_a_run_with_patience_that_is_stopped_between_validations_goes_on_as_if_it_had_not_been(
    inputs: TrainInputs,
) -> None:
    whole = elsewhere(inputs, "whole", eval_interval_steps=4, patience=1)
    whole = dataclasses.replace(whole, max_steps=12)
    fit(whole, TrainContext())
    stopped = dataclasses.replace(elsewhere(whole, "stopped"), max_steps=12)
    assert fit(stopped, stop_after(7)).status == "stopped"
    summary = fit(stopped, TrainContext())
    assert (summary.status, summary.step) == ("finished", 12)
    assert stopped.history.series("val_loss") == whole.history.series("val_loss")


def test_patience_counts_validations_whatever_their_interval_was(inputs: TrainInputs) -> None:
    first = dataclasses.replace(elsewhere(inputs, "run", eval_interval_steps=8, patience=2), max_steps=16)
    assert fit(first, stop_after(15)).status == "stopped"
    oftener = dataclasses.replace(first, config=dataclasses.replace(first.config, eval_interval_steps=2))
    assert fit(oftener, TrainContext()).step == 16


def test_on_other_stories_the_best_is_judged_anew(inputs: TrainInputs) -> None:
    fit(inputs, TrainContext())
    state = checkpoint.load_state(inputs.folder.latest)
    assert state.best.step == 8
    other = dataclasses.replace(inputs, data_fingerprint="of others", max_steps=10)
    optim = dataclasses.replace(inputs.config.optim, lr=1e-9, min_lr=0.0)  # so that nothing gets better
    summary = fit(dataclasses.replace(other, config=dataclasses.replace(inputs.config, optim=optim)), TrainContext())
    assert summary.best.step == 10
    assert checkpoint.load_state(inputs.folder.best).data_fingerprint == "of others"


def test_a_prompt_that_cannot_be_continued_costs_the_sample_and_not_the_run(inputs: TrainInputs) -> None:
    long = elsewhere(inputs, "long", sample_prompt="Once upon a time there was a cat. " * 50)
    assert fit(long, TrainContext()).status == "finished"
    messages = [line["message"] for line in long.history.lines() if "message" in line]
    assert sum("no sample of text: sample_prompt" in message for message in messages) == 2


def test_tokens_are_counted_at_the_batch_size_they_were_seen_at(inputs: TrainInputs) -> None:
    fit(dataclasses.replace(inputs, max_steps=4), TrainContext())
    halved = dataclasses.replace(inputs, config=dataclasses.replace(inputs.config, batch_size=4))
    fit(halved, TrainContext())
    assert inputs.history.series("tokens")[1][-1] == (4 * 8 + 4 * 4) * inputs.config.model.seq_len


def test_a_run_in_fp32_goes_on_in_fp16(inputs: TrainInputs) -> None:
    fit(dataclasses.replace(inputs, max_steps=4), TrainContext())
    assert restored(inputs, "fp16").scaler.get_scale() > 1


def test_only_one_driver_at_a_time_holds_a_run(inputs: TrainInputs) -> None:
    inputs.folder.path.mkdir(parents=True)
    run = inputs.folder
    with run_lock.locked(run), pytest.raises(UserError, match="is writing to"), run_lock.locked(run):
        pass
    with run_lock.locked(inputs.folder):
        pass
