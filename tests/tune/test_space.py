"""Space files: what may be varied, and what is refused."""

import dataclasses
import re
from pathlib import Path
from typing import Any

import pytest

from slm_ray.config.fields import field_types, replaced, typed_value
from slm_ray.config.files import flatten
from slm_ray.config.schema import TrainConfig
from slm_ray.errors import UserError
from tune.config import SweepConfig, run_config
from tune.results import MAX_NAME_LETTERS, trial_name
from tune.space import Choices, Range, grid, load_space, make_space, n_points
from tune.sweep import main, parse_config

SPACE = """
optim.lr: {log_range: [3e-4, 3e-3]}
model.d_ff: [512, "704", 512]
optim.weight_decay: {range: [0, 0.2]}
model.n_layers: {int_range: [2, 6], step: 2}
batch_size: {log_int_range: [8, 64]}
optim.name: [adamw, muon]
optim.min_lr: [null, 0]
"""


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "space.yaml"
    path.write_text(SPACE, encoding="utf-8")
    return path


def test_every_kind_of_values_is_read_with_the_types_of_its_field(file: Path) -> None:
    assert load_space(str(file)) == {
        "optim.lr": Range(3e-4, 3e-3, is_log=True),
        "model.d_ff": Choices((512, 704)),
        "optim.weight_decay": Range(0.0, 0.2),
        "model.n_layers": Range(2, 6, is_integer=True, step=2),
        "batch_size": Range(8, 64, is_log=True, is_integer=True),
        "optim.name": Choices(("adamw", "muon")),
        "optim.min_lr": Choices((None, 0.0)),
    }


def test_a_record_of_a_space_is_read_back_as_the_same(file: Path) -> None:
    space = load_space(str(file))
    assert make_space({field: domain.plain for field, domain in space.items()}, "record") == space


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("optim.rate: [1]", r"optim\.rate: unknown field"),
        ("lr: [1e-3]", "lr: unknown field: give its dotted name"),
        ("model: {d_ff: [1]}", "model: unknown field"),
        *((f"{name}: [1]", f"{name}: this must not vary") for name in ("seed", "output", "name", "data", "max_steps")),
        ("tracking_uri: [none]", "must not vary"),
        ("model.vocab_size: [512]", "must not vary"),
        ("optim.lr: []", "an empty list"),
        ("optim.lr: 1e-3", "expected a list of values, or one of range"),
        ("optim.lr: {log_range: [1e-2, 1e-3]}", "the range is reversed: 0.01 is above 0.001"),
        ("optim.lr: {range: [1e-3, 1e-3]}", "the range is empty"),
        ("optim.lr: {log_range: [0, 1e-3]}", "a log range begins above 0"),
        ("optim.lr: {range: [.nan, 1]}", "two finite ends"),
        ("optim.lr: {range: [1]}", "takes two numbers"),
        ("optim.lr: {interval: [1, 2]}", "expected one of range"),
        ("optim.lr: {range: [1, 2], log_range: [1, 2]}", "expected one of range"),
        ("optim.lr: {range: [1, 2], step: 1}", "step goes with int_range"),
        ("model.d_ff: {int_range: [10, 64], step: 8}", "multiples of step"),
        ("model.d_ff: {range: [8, 64.5]}", "model.d_ff: 64.5: Input should be a valid integer"),
        ("model.n_layers: {range: [2, 6]}", "takes whole numbers: give an int_range"),
        ("model.d_ff: {log_range: [64, 512]}", "takes whole numbers: give an int_range"),
        ("model.d_ff: {int_range: [1, 1000000000000000000000]}", "int_range goes to 9,007,199,254,740,992 at most"),
        ("model.d_ff: {int_range: [1, 9007199254740992]}", "a grid of 9,007,199,254,740,992 points"),
        ("model.d_ff: [wide]", "model.d_ff: 'wide': Input should be a valid integer"),
        ("optim.lr: [true]", "True is true or false"),
        ("optim.name: [sgd]", "optim.name: 'sgd': Input should be"),
        ("optim.lr: [1]\noptim.lr: [2]", "is there twice"),
        ("", "the space is empty"),
        ("model.d_ff: [64]\noptim.weight_decay: [0.1, -1]", r"no trial with d_ff 64, weight_decay -1: .*negative"),
        ("model.n_heads: [4, 5]", r"no trial with n_heads 5: d_model \(256\) must be divisible"),
        ("optim.lr: {range: [1e-3, 1e-2]}", "is a continuous range, of which there is no grid"),
        ("model.d_ff: {int_range: [1, 100000]}", "a grid of 100,000 points"),
    ],
)
def test_a_space_that_cannot_be_is_one_line_and_2_without_a_ray(
    line: str,
    message: str,
    tmp_path: Path,
    tiny_data: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("ray.init", lambda *_, **__: pytest.fail("a Ray was started"))
    path = tmp_path / "space.yaml"
    path.write_text(line, encoding="utf-8")
    words = ["--data", str(tiny_data), "--output", str(tmp_path / "runs"), "--model.seq-len", "32"]
    assert main([*words, "--space", str(path)]) == 2
    errors = capsys.readouterr().err.splitlines()
    assert len(errors) == 1
    assert re.search(message, errors[0]), errors[0]
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--search", "random"], "needs --num-trials"),
        (["--search", "optuna"], "needs --num-trials"),
        (["--num-trials", "3"], "a grid is tried as a whole"),
        (["--search", "random", "--num-trials", "5"], "more than the space has points, 4"),
        (["--space", "no/such.yaml"], "there is no file no/such.yaml"),
        (["--heat-map", "optim.lr", "optim.lr"], "heat_map takes two fields"),
        (["--heat-map", "optim.lr", "optim.beta1"], "optim.beta1 is not varied"),
        (["--reduction-factor", "1"], "must be at least 2"),
        (["--optim.lr", "1"], "is what is swept: give --lr its values"),
    ],
)
def test_a_search_that_cannot_be_is_one_line_and_2(
    words: list[str], message: str, tmp_path: Path, tiny_data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    place = ["--data", str(tiny_data), "--output", str(tmp_path / "runs"), "--model.seq-len", "32"]
    assert main([*place, *words]) == 2
    errors = capsys.readouterr().err.splitlines()
    assert len(errors) == 1
    assert message in errors[0]


def test_with_a_space_the_short_form_and_options_of_its_fields_are_refused(file: Path) -> None:
    assert parse_config(["--space", str(file), "--optim.beta1", "0.8"]).optim.beta1 == 0.8
    with pytest.raises(UserError, match="--lr is of the short form"):
        parse_config(["--space", str(file), "--lr", "1e-3"])
    with pytest.raises(UserError, match=r"--optim\.weight-decay is what is swept"):
        parse_config(["--space", str(file), "--optim.weight_decay=0.1"])
    file.write_text("optim.weight_decay: [0, 0.1]")
    assert parse_config(["--space", str(file), "--optim.lr", "1e-3"]).optim.lr == 1e-3


def test_a_grid_has_every_combination_in_order_and_whole_numbers_have_one() -> None:
    space = make_space({"optim.beta1": [0.8, 0.9], "model.n_layers": {"int_range": [2, 6], "step": 2}}, "x")
    assert [tuple(point.values()) for point in grid(space)] == [(b, n) for b in (0.8, 0.9) for n in (2, 4, 6)]
    assert n_points(space) == 6
    assert n_points(make_space({"optim.lr": {"range": [0.1, 0.2]}}, "x")) == float("inf")


def test_every_field_is_known_by_its_dotted_name_and_can_be_replaced(tiny_config: TrainConfig) -> None:
    assert set(field_types(TrainConfig)) == set(flatten(dataclasses.asdict(tiny_config)))
    changed = replaced(tiny_config, {"optim.lr": 0.5, "model.d_ff": 8, "model.n_layers": 1, "batch_size": 2})
    assert (changed.optim.lr, changed.model.d_ff, changed.model.n_layers, changed.batch_size) == (0.5, 8, 1, 2)
    assert changed.model.d_model == tiny_config.model.d_model
    with pytest.raises(ValueError, match="must be above 0"):
        replaced(tiny_config, {"optim.lr": -1.0})
    assert typed_value(float, "1e-3", "x") == 1e-3


def test_names_of_trials_say_their_values_and_are_folders(tiny_config: TrainConfig) -> None:
    point: dict[str, Any] = {"optim.lr": 5e-4, "optim.weight_decay": 0.1, "optim.name": "muon", "optim.min_lr": None}
    assert trial_name(point) == "lr0.0005-weightdecay0.1-namemuon-minlrNone"
    long = {field: 0.1234567890123456 for field, kind in field_types(TrainConfig).items() if kind is float}
    assert len(trial_name(long)) <= MAX_NAME_LETTERS
    assert trial_name(long) != trial_name({**long, "optim.eps": 0.123456789012345})
    own = {field.name: getattr(tiny_config, field.name) for field in dataclasses.fields(TrainConfig)}
    assert run_config(SweepConfig(**own), {"batch_size": 4}, name=trial_name(long)).batch_size == 4
