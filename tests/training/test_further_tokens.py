"""Multi-token prediction in a run: its weights at every step, what is told, and a run that resumes."""

import dataclasses
import json
from typing import Any

import pytest
import torch

from slm_ray.config.resuming import KEPT, differences, with_earlier_defaults
from slm_ray.config.schema import TrainConfig
from slm_ray.runs import checkpoint
from slm_ray.runs.run_folder import RunFolder
from slm_ray.tracking.tracker import NullTracker
from slm_ray.training.besides.further_tokens import mtp_shares, mtp_weights
from slm_ray.training.context import TrainContext
from slm_ray.training.inputs import TrainInputs, load_inputs
from slm_ray.training.loop import fit
from slm_ray.training.preflight import resolve
from slm_ray.training.trainer import Trainer

MTP = {"mtp_weights": (0.5, 0.25), "mtp_until": 0.8}


@pytest.fixture
def inputs(tiny_config: TrainConfig) -> TrainInputs:
    return load_inputs(resolve(tiny_config, lambda _: 1), NullTracker())


def changed(inputs: TrainInputs, name: str, **changes: Any) -> TrainInputs:
    config = dataclasses.replace(inputs.config, name=name, **changes)
    return dataclasses.replace(inputs, config=config, folder=RunFolder(inputs.folder.path.parent / name))


def trainer(inputs: TrainInputs) -> Trainer:
    return Trainer(inputs, TrainContext(), "fp32", is_compiled=False)


def test_each_weight_falls_to_zero_within_its_part_of_the_run() -> None:
    config = TrainConfig(**MTP)
    assert mtp_weights(0, 100, config) == [0.5, 0.25]
    assert mtp_weights(20, 100, config) == pytest.approx([0.375, 0.125])
    assert mtp_weights(40, 100, config) == pytest.approx([0.25, 0.0])
    assert mtp_weights(80, 100, config) == mtp_weights(99, 100, config) == [0.0, 0.0]
    assert mtp_weights(0, 1, config) == [0.5, 0.25]  # a run of one step
    shares = mtp_shares(99, 100, config, torch.device("cpu"))
    assert shares is not None
    assert shares.tolist() == [0, 0]  # still there: a compiled model is compiled once
    assert mtp_shares(0, 100, TrainConfig(), torch.device("cpu")) is None


def test_further_tokens_change_what_is_learned_and_not_how_the_loss_is_told(inputs: TrainInputs) -> None:
    plain, further = trainer(inputs), trainer(changed(inputs, "further", **MTP))
    first, other = plain.train_step()[0], further.train_step()[0]
    assert first.item() == other.item()  # of the next token, before anything was learned
    assert not torch.equal(plain.model.lm_head.weight, further.model.lm_head.weight)


def test_parts_of_a_batch_add_up_to_the_batch(inputs: TrainInputs) -> None:
    whole, parted = (trainer(changed(inputs, f"a{n}", **MTP, accumulation_steps=n)) for n in (1, 2))
    for _ in range(3):
        one, two = whole.train_step()[0], parted.train_step()[0]
        torch.testing.assert_close(one, two)
    torch.testing.assert_close(whole.model.lm_head.weight, parted.model.lm_head.weight, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("packing", [{}, {"packing": "stories", "attention": "story"}], ids=["windows", "stories"])
@pytest.mark.parametrize("is_taught", [False, True], ids=["alone", "taught"])
def test_a_run_that_was_interrupted_ends_with_the_same_bits(
    inputs: TrainInputs, packing: dict[str, str], is_taught: bool
) -> None:
    taught: dict[str, Any] = {}
    if is_taught:
        fit(inputs, TrainContext())
        taught = {"teacher": (str(inputs.folder.best),)}
    config = dataclasses.replace(inputs.config, **MTP, **packing, **taught)  # type: ignore[arg-type]
    whole = load_inputs(dataclasses.replace(config, name="whole"), NullTracker())
    broken = load_inputs(dataclasses.replace(config, name="broken"), NullTracker())
    fit(whole, TrainContext())
    stops = iter([False] * 3 + [True] * 100)
    fit(broken, TrainContext(is_stop_requested=lambda: next(stops)))
    fit(broken, TrainContext())
    assert broken.history.series("train_loss")[1] == whole.history.series("train_loss")[1]
    first, second = (checkpoint.load_model(run.folder.latest)[0].state_dict() for run in (whole, broken))
    assert all(torch.equal(tensor, first[name]) for name, tensor in second.items())


def test_a_run_of_before_goes_on_without_further_tokens_and_one_with_them_keeps_them() -> None:
    now = dataclasses.asdict(TrainConfig(**MTP))
    old = {name: value for name, value in dataclasses.asdict(TrainConfig()).items() if not name.startswith("mtp_")}
    assert differences(with_earlier_defaults(old), now, KEPT) == {
        "mtp_weights": "mtp_weights was [] and is now [0.5, 0.25]"
    }
    assert not differences(json.loads(json.dumps(now)), now, KEPT)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"mtp_weights": (0.5, -0.1)}, "mtp_weights"),
        ({"mtp_weights": (1.1,)}, "mtp_weights"),
        ({"mtp_weights": (float("nan"),)}, "mtp_weights"),
        ({"mtp_weights": (0.1,) * 128}, "fewer than the 128 tokens"),
        ({"mtp_until": 0.0}, "mtp_until"),
        ({"mtp_until": 1.5}, "mtp_until"),
    ],
)
def test_values_that_make_no_sense_are_refused(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        TrainConfig(**changes)
