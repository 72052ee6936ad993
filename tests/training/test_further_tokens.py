"""Multi-token prediction in a run: its weights at every step, what is told, and a run that resumes."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F  # noqa: N812

from slm_ray.config.files import load_config
from slm_ray.config.resuming import KEPT, differences, overlaid, with_earlier_defaults
from slm_ray.config.schema import TrainConfig
from slm_ray.errors import UserError
from slm_ray.runs.run_folder import RunFolder
from slm_ray.tracking.tracker import NullTracker
from slm_ray.training.besides.further_tokens import mtp_shares, mtp_weights
from slm_ray.training.besides.teachers import Teachers
from slm_ray.training.context import TrainContext
from slm_ray.training.inputs import TrainInputs, load_inputs
from slm_ray.training.loop import fit
from slm_ray.training.preflight import resolve
from slm_ray.training.starting_point import begun_from
from slm_ray.training.trainer import Trainer
from tests.support.fault_runs import assert_same_run
from tests.support.paths import ROOT

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


@pytest.mark.parametrize(("weight", "is_none"), [(1.0, True), (0.9, False)])
def test_where_teachers_alone_are_learned_from_nothing_further_is_asked_for(weight: float, is_none: bool) -> None:
    config = TrainConfig(teacher=("a",), teacher_weight=weight, **MTP)
    assert (mtp_shares(0, 9, config, torch.device("cpu")) is None) == is_none


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_beside_teachers_the_sum_is_made_in_fp32(dtype: torch.dtype) -> None:
    """So many tokens that neither half's precision, nor fp16's range, would hold their sum."""
    generator = torch.Generator().manual_seed(0)
    logits, tokens = torch.randn(450, 32, 97, generator=generator) * 4, torch.zeros(450, 32, dtype=torch.long)
    targets = torch.randint(97, (450, 32), generator=generator)
    with torch.autocast("cpu", dtype=dtype, enabled=dtype != torch.float32):
        objective, loss = Teachers([lambda *_: logits], 0.0, 1.0).loss(  # type: ignore[list-item]
            logits, tokens, targets, None, torch.tensor([0.3, 0.17])
        )
    nats = [
        F.cross_entropy(logits[:, : 32 - k].flatten(0, 1), targets[:, k:].flatten(), reduction="sum") for k in range(3)
    ]
    torch.testing.assert_close(loss, nats[0])
    torch.testing.assert_close(objective, nats[0] + 0.3 * nats[1] + 0.17 * nats[2])


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
    assert_same_run(broken.folder, whole.folder)


def test_a_run_of_before_goes_on_without_further_tokens_and_one_with_them_keeps_them() -> None:
    now = dataclasses.asdict(TrainConfig(**MTP))
    old = {name: value for name, value in dataclasses.asdict(TrainConfig()).items() if not name.startswith("mtp_")}
    assert differences(with_earlier_defaults(old), now, KEPT) == {
        "mtp_weights": "mtp_weights was [] and is now [0.5, 0.25]",
        "mtp_until": "mtp_until was 0.6667 and is now 0.8",
    }
    until = dataclasses.asdict(TrainConfig(mtp_until=0.5))
    assert set(differences(with_earlier_defaults(old), until, KEPT)) == {"mtp_until"}
    assert not differences(json.loads(json.dumps(now)), now, KEPT)


def test_a_run_with_further_tokens_of_its_own_goes_on_by_the_preset_that_it_began_with() -> None:
    was = dataclasses.replace(load_config("demo"), **{**MTP, "mtp_until": 0.5})  # type: ignore[arg-type]
    assert overlaid(was, "demo", KEPT) == was


def test_given_weights_of_too_short_a_context_are_one_clear_line(tmp_path: Path) -> None:
    file = tmp_path / "many.yaml"
    file.write_text(f"mtp_weights: {[0.1] * 100}\n")
    model = ROOT / "tests" / "runs" / "checkpoint_v1" / "run" / "model"
    with pytest.raises(UserError, match=r"mtp_weights \(100 of them\) must be fewer than the 32 tokens"):
        begun_from(load_config(str(file)), str(file), ["--init-from", str(model)])


@pytest.mark.parametrize("value", ["{a: 1}", "[on, 0.25]", "0.5", "[[0.5]]", "[a]"])
def test_what_a_file_gives_in_place_of_weights_is_one_clear_line(value: str, tmp_path: Path) -> None:
    file = tmp_path / "some.yaml"
    file.write_text(f"mtp_weights: {value}\n")
    with pytest.raises(UserError, match="mtp_weights"):
        load_config(str(file))


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
