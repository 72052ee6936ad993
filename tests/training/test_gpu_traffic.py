"""Batches to a device, and numbers that are read one step late: the lateness played on the CPU."""

import dataclasses
import math
from typing import Any

import numpy as np
import pytest
import torch

from slm_ray.config.schema import TrainConfig
from slm_ray.model.decoder import Decoder
from slm_ray.runs import checkpoint
from slm_ray.runs.outcome import RunStatus
from slm_ray.training import loop
from slm_ray.training import trainer as trainer_module
from slm_ray.training.context import TrainContext
from slm_ray.training.gpu_traffic import LateReading, to_device
from slm_ray.training.inputs import TrainInputs
from slm_ray.training.loop import fit
from slm_ray.training.trainer import DivergedError, Trainer
from tests.support.fault_runs import inputs_of

NUMBERS = [torch.tensor(float(number)) for number in range(4)]


def test_on_a_cpu_each_number_is_read_at_once() -> None:
    reading = LateReading(is_late=False)
    assert [reading.next(number) for number in NUMBERS] == [0, 1, 2, 3]
    assert reading.last() is None


def test_on_a_gpu_it_is_that_of_the_step_before() -> None:
    reading = LateReading(is_late=True)
    assert [reading.next(number) for number in NUMBERS] == [None, 0, 1, 2]
    assert [reading.last(), reading.last()] == [3, None]


def test_a_number_that_changes_on_the_device_was_read_as_it_was() -> None:
    reading, value = LateReading(is_late=True), torch.tensor(1.0)
    reading.next(value)
    value += 1
    assert reading.last() == 1


def test_a_batch_stays_in_place_on_a_cpu() -> None:
    values = np.arange(12).reshape(3, 4)[:, :3]
    tensor = to_device(values, torch.device("cpu"))
    values[0, 0] = 7
    assert tensor.tolist() == values.tolist()


@pytest.fixture
def late(monkeypatch: pytest.MonkeyPatch) -> None:
    """A run reads its numbers as it does on a GPU."""
    for module in (loop, trainer_module):
        monkeypatch.setattr(module, "LateReading", lambda _is_late: LateReading(is_late=True))


@pytest.fixture
def inputs(tiny_config: TrainConfig) -> TrainInputs:
    """8 steps, validated and saved after 4 and 8."""
    return inputs_of(tiny_config)


def spoil(patch: pytest.MonkeyPatch, step: int) -> list[Trainer]:
    """Give that step (from 1) an infinite gradient, in every trainer made from now on."""
    forward, init, trainers = Decoder.forward, Trainer.__init__, list[Trainer]()

    def forward_wrongly(self: Decoder, *arguments: Any) -> torch.Tensor:
        loss = forward(self, *arguments)
        return loss * math.inf if self.training and trainers[-1].step == step - 1 else loss

    patch.setattr(Trainer, "__init__", lambda self, *rest: (trainers.append(self), init(self, *rest))[1])
    patch.setattr(Decoder, "forward", forward_wrongly)
    return trainers


@pytest.mark.usefixtures("late")
@pytest.mark.parametrize("step", [5, 8])  # noticed at the step after it, or before the last one is saved
def test_a_bad_gradient_ends_the_run_before_anything_of_it_is_saved(
    inputs: TrainInputs, step: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainers = spoil(monkeypatch, step)
    summary = fit(inputs, TrainContext())
    assert summary.status == RunStatus.DIVERGED
    assert "gradient" in summary.reason
    assert trainers[0].step == step
    assert checkpoint.load_state(inputs.folder.latest).step == 4
    assert all(math.isfinite(norm) for norm in inputs.history.series("grad_norm")[1])


@pytest.mark.usefixtures("late")
def test_a_stop_behind_a_bad_gradient_saves_nothing_of_it(inputs: TrainInputs, monkeypatch: pytest.MonkeyPatch) -> None:
    trainers = spoil(monkeypatch, 5)
    summary = fit(inputs, TrainContext(is_stop_requested=lambda: trainers[0].step == 5))
    assert summary.status == RunStatus.DIVERGED
    assert checkpoint.load_state(inputs.folder.latest).step == 4


@pytest.mark.parametrize("is_late", [False, True])
def test_several_ranks_leave_together_on_gpus_one_step_after_the_word(is_late: bool) -> None:
    asked = iter([False, True, False, False])
    context = TrainContext(world_size=2, is_stop_requested=lambda: next(asked))
    stops = LateReading(is_late)
    found = [loop._is_stopped(context, stops) for _ in range(4)]
    assert found == ([False, False, True, False] if is_late else [False, True, False, False])


@pytest.mark.usefixtures("late")
@pytest.mark.parametrize(("interval", "word"), [(1, 1), (4, 4), (4, 3)])
def test_the_word_is_heard_at_the_end_of_an_interval(
    tiny_config: TrainConfig, interval: int, word: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[int] = []

    def with_others(_context: TrainContext, stops: LateReading) -> bool:
        asked.append(len(asked) + 1)
        return bool(stops.next(torch.tensor(float(asked[-1] == word))))

    monkeypatch.setattr(loop, "_is_stopped", with_others)
    inputs = inputs_of(dataclasses.replace(tiny_config, eval_interval_steps=interval))
    summary = fit(inputs, TrainContext())
    assert (summary.status, summary.step) == (RunStatus.STOPPED, interval)
    assert checkpoint.load_state(inputs.folder.latest).step == interval


def test_a_rank_alone_asks_no_device_whether_to_stop() -> None:
    def refuse(_values: torch.Tensor) -> torch.Tensor:
        raise AssertionError("nobody to ask")

    assert loop._is_stopped(TrainContext(all_reduce_sum=refuse, is_stop_requested=lambda: True), LateReading(True))


def test_a_gradient_that_is_no_number_is_told_when_asked(inputs: TrainInputs) -> None:
    trainer = Trainer(inputs, TrainContext(), "fp32", is_compiled=False)
    trainer._norms = LateReading(is_late=True)
    trainer.train_step()
    trainer.refuse_bad_gradient()
    with torch.no_grad():
        trainer.model.norm.weight.fill_(math.nan)
    trainer.train_step()
    with pytest.raises(DivergedError, match="gradient ceased"):
        trainer.refuse_bad_gradient()
