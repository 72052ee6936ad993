"""Configs: checked once, read from presets and files, set by dotted names."""

import dataclasses
from pathlib import Path

import pytest

from slm_ray.config.files import from_dict, load_config, presets
from slm_ray.config.schema import ModelConfig, OptimConfig, TrainConfig
from slm_ray.errors import UserError
from slm_ray.train import parse_config


@pytest.mark.parametrize(
    ("kind", "values", "message"),
    [
        (ModelConfig, {"d_model": 130, "n_heads": 4}, r"d_model \(130\) must be divisible by n_heads \(4\)"),
        (ModelConfig, {"n_heads": 8, "n_kv_heads": 3}, r"n_heads \(8\) must be divisible by n_kv_heads \(3\)"),
        (ModelConfig, {"d_head": 7}, "rotary positions need an even head width"),
        (ModelConfig, {"dropout": 1.0}, "dropout"),
        (ModelConfig, {"local_window": -1}, r"local_window \(-1\) must not be negative"),
        (OptimConfig, {"lr": 1e-4, "min_lr": 1e-3}, r"min_lr \(0.001\) must be between 0 and lr \(0.0001\)"),
        (OptimConfig, {"lr": 0.0}, "lr"),
        (TrainConfig, {"name": "../escape"}, "plain folder name"),
        (TrainConfig, {"name": ".."}, "plain folder name"),
        (TrainConfig, {"seed": -1}, "seed"),
    ],
)
def test_a_refused_value_says_what_was_expected(kind: type, values: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        kind(**values)


def test_a_batch_must_be_shared_out_evenly() -> None:
    config = TrainConfig(batch_size=32, accumulation_steps=3)
    with pytest.raises(UserError, match=r"batch_size \(32\) .*2 x 3 = 6"):
        config.check_batch(workers=2)


def test_the_final_rate_is_a_tenth_unless_given() -> None:
    assert OptimConfig(lr=1e-3).final_lr == pytest.approx(1e-4)
    assert OptimConfig(lr=1e-3, min_lr=0.0).final_lr == 0.0


def test_a_bias_that_is_not_given_is_as_bias_says() -> None:
    assert [ModelConfig(bias=bias).has_qkv_bias for bias in (False, True)] == [False, True]
    config = from_dict(ModelConfig, {"bias": True, "qkv_bias": False, "mlp_bias": None}, "test")
    assert (config.has_qkv_bias, config.has_o_bias, config.has_mlp_bias) == (False, True, True)
    assert ModelConfig(o_bias=True).has_o_bias and ModelConfig(mlp_bias=True).has_mlp_bias
    assert parse_config(["--model.qkv-bias", "True", "--model.qk-norm"]).model.has_qkv_bias


@pytest.mark.parametrize("name", presets())
def test_presets_load(name: str) -> None:
    assert load_config(name).model.n_layers >= 1


def test_a_config_survives_its_dictionary() -> None:
    config = TrainConfig(model=ModelConfig(n_layers=3), optim=OptimConfig(lr=1e-2))
    assert from_dict(TrainConfig, dataclasses.asdict(config), "test") == config


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("model: {d_fff: 3}", "model.d_fff: unknown field"),
        ("optim: {lr: fast}", "optim.lr"),
        ("- 1", "expected fields with values, got a list"),
        ("a: [", "cannot be read as YAML"),
        ("seed: 1\nseed: 2", "seed is there twice"),
        ("workers: true", "workers is true or false"),
        ("model: {n_layers: yes}", "model: n_layers is true or false"),
        ("compile: on", "compile is true or false .YAML's on and off are, without quotes"),
        ("[" * 5000, "nested too deeply"),
        ("optim: {lr: 1e-3, lr: 2e-3}", "lr is there twice"),
    ],
)
def test_a_bad_file_is_one_clear_line(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "own.yaml"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(UserError, match=message) as caught:
        load_config(str(path))
    assert "\n" not in str(caught.value)


def test_exponents_without_a_dot_are_numbers(tmp_path: Path) -> None:
    (tmp_path / "own.yaml").write_text("optim: {lr: 1e-3}", encoding="utf-8")
    assert load_config(str(tmp_path / "own.yaml")).optim.lr == 1e-3


def test_an_unknown_preset_lists_the_known_ones() -> None:
    with pytest.raises(UserError, match=r"presets are .*story-5m"):
        load_config("story-6m")


def test_every_field_can_be_set_by_its_dotted_name() -> None:
    config = parse_config(["--model.d_ff", "512", "--optim.lr", "1e-3", "--max-steps", "7", "--batch_size", "4"])
    assert (config.model.d_ff, config.optim.lr, config.max_steps, config.batch_size) == (512, 1e-3, 7, 4)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--max-stepps", "7"], "--max-stepps"),
        (["--seed", "-1"], "seed (-1) must not be negative"),
        (["--batch-size", "many"], "many"),
        (["--name", "n" * 300], "at most 200 bytes"),
        (["--threads", "100000"], "threads (100000) must be at most 1,024"),
        (["--epochs", "1e308"], "epochs (1e+308) must be at most 1,000,000"),
        (["--register", "models/mine"], "register ('models/mine') must be a name without a colon or slash"),
        (["--resume", "--name", "a/b"], "must be a plain folder name"),
        (["--model.d_model", "130", "--model.n_heads", "4"], "must be divisible by n_heads (4)"),
    ],
)
def test_a_mistaken_option_is_one_clear_line(arguments: list[str], message: str) -> None:
    with pytest.raises(UserError) as caught:
        parse_config(arguments)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
    assert "│" not in str(caught.value)


@pytest.mark.parametrize("wrong", ["nan", "inf", "0", "-1"])
@pytest.mark.parametrize("option", ["epochs", "optim.lr", "optim.eps", "model.rope-theta", "model.norm-eps"])
def test_a_number_that_no_training_survives_is_refused_before_it(option: str, wrong: str) -> None:
    name = option.split(".")[-1].replace("-", "_")
    with pytest.raises(UserError, match=rf"^{name} \(.*\) must be above 0 and finite"):
        parse_config([f"--{option}", wrong])
