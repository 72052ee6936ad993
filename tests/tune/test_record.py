"""A sweep's record: the same command again, and every option honoured or refused."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from slm_ray.config.files import flatten
from slm_ray.config.schema import TrainConfig
from slm_ray.dataset.manifest import load_manifest
from slm_ray.errors import UserError
from slm_ray.train import parse_config as parse_training
from tests.support.tiny_model import write_tiny_model
from tune.config import SweepConfig, space_of
from tune.record import RECORD, newest_sweep, read_record, refuse_other_options, shared_options, write_record
from tune.sweep import parse_config


@pytest.fixture
def words(tiny_config: TrainConfig, tmp_path: Path) -> list[str]:
    """A whole command, with `--resume`."""
    file = tmp_path / "run.yaml"
    fields = dataclasses.asdict(tiny_config) | {"output": "elsewhere", "name": ""}
    file.write_text(yaml.safe_dump(fields), encoding="utf-8")
    where = ["--resume", "--output", tiny_config.output, "--name", "s"]
    return ["--config", str(file), *where, "--lr", "1e-2", "1e-3", "--d-ff", "32", "--seed", "5"]


def begin(sweep: SweepConfig) -> Path:
    folder = Path(sweep.output) / sweep.name
    folder.mkdir(parents=True)
    write_record(folder, sweep, "run", space_of(sweep), "")
    return folder


def refused(sweep: SweepConfig, folder: Path) -> None:
    record = read_record(folder)
    assert record is not None
    refuse_other_options(folder, record, shared_options(sweep, space_of(sweep), ""), sweep.data)


def test_the_same_words_begin_a_sweep_and_go_on_with_it(words: list[str]) -> None:
    first = parse_config(words)
    assert (first.resume, first.seed, first.lr, first.d_ff) == (True, 5, (1e-2, 1e-3), (32,))
    folder = begin(first)
    assert parse_config(words) == first
    refused(first, folder)


def test_what_is_not_given_is_as_it_was_the_grid_too(words: list[str]) -> None:
    first = parse_config([*words, "--trial-workers", "2", "--no-final"])
    folder = begin(first)
    where = words[2:7]
    assert parse_config(where) == first
    assert parse_config(["--resume", "--output", first.output]) == first  # the newest
    more = parse_config([*where, "--d-ff", "32", "64", "--final"])
    assert (more.d_ff, more.lr, more.final) == ((32, 64), (1e-2, 1e-3), True)
    refused(more, folder)
    assert parse_config(["--output", first.output]).lr == SweepConfig().lr  # without --resume it is another one


def test_every_option_that_cannot_change_is_named_with_both_values(words: list[str]) -> None:
    folder = begin(parse_config(words))
    for origin in ([], words[:2]):
        other = [*origin, *words[2:], "--seed", "6", "--optim.weight-decay", "0.5", "--trial-steps", "3"]
        with pytest.raises(UserError) as found:
            refused(parse_config(other), folder)
        for part in ("seed was 5 and is now 6", "optim.weight_decay was 0.1 and is now 0.5", "trial_steps was 0"):
            assert part in str(found.value)
    with pytest.raises(UserError, match=r"batch_size was 8 and is now 16.*model\.n_layers was 2 and is now 5"):
        refused(parse_config(["--config", "story-5m", *words[2:]]), folder)


def test_a_record_that_cannot_be_read_is_not_none(words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    folder = begin(parse_config(words))
    content = (folder / RECORD).read_text()
    for damage in ("{", "[]", "{}", '{"shared": 1, "run_id": ""}'):
        (folder / RECORD).write_text(damage)
        with pytest.raises(UserError, match="is corrupt"):
            parse_config(words)
    (folder / RECORD).write_text(content)

    def refuse(*_: Any, **__: Any) -> str:
        raise OSError(116, "Stale file handle")

    monkeypatch.setattr(Path, "read_bytes", refuse)
    with pytest.raises(UserError, match="cannot be read: Stale file handle"):
        read_record(folder)
    monkeypatch.setattr(Path, "iterdir", refuse)
    with pytest.raises(UserError, match="cannot be listed: Stale file handle"):
        newest_sweep(folder.parent)


def test_a_record_of_an_earlier_version_is_compared_by_what_it_has(words: list[str]) -> None:
    first = parse_config(words)
    folder = begin(first)
    record = json.loads((folder / RECORD).read_text())
    del record["config"]
    (folder / RECORD).write_text(json.dumps(record))
    assert parse_config(words) == first
    refused(first, folder)
    with pytest.raises(UserError, match="seed was 5"):
        refused(parse_config([*words, "--seed", "6"]), folder)


def test_a_record_of_the_first_version_goes_on_as_it_was_whatever_the_preset_has_become(
    tiny_config: TrainConfig, tmp_path: Path
) -> None:
    """As it was written: nested, without what was not an option then, the grid beside it."""
    fields = ("seed", "batch_size", "epochs", "max_steps", "trial_steps", "precision")
    values = dict(zip(fields, (7, 8, 1.0, 0, 20, "auto"), strict=True))
    model = {"vocab_size": 0, "seq_len": 128, "n_layers": 5, "d_model": 256, "n_heads": 8, "n_kv_heads": 0}
    optim = {"name": "adamw", "weight_decay": 0.2, "beta1": 0.9, "beta2": 0.95, "clip_norm": 1.0, "warmup_steps": 3}
    fingerprint = load_manifest(tiny_config.data).fingerprint
    shared = values | {"model": model, "optim": optim, "data_fingerprint": fingerprint}
    grid = {"lr": [1e-3, 3e-3, 5e-3], "d_ff": [300]}
    folder = tmp_path / "sweep"
    folder.mkdir()
    (folder / RECORD).write_text(json.dumps({"run_id": "run", "shared": shared, "grid": grid}))
    place = ["--resume", "--data", tiny_config.data, "--output", str(tmp_path), "--name", "sweep"]
    again = parse_config(place)
    assert (again.lr, again.d_ff) == ((1e-3, 3e-3, 5e-3), (300,))
    assert {name: getattr(again, name) for name in fields} == values
    assert {name: getattr(again.model, name) for name in model} == model
    assert {name: getattr(again.optim, name) for name in optim} == optim
    assert (again.model.qk_norm, again.optim.momentum, again.mtp_weights) == (False, 0.95, ())
    refused(again, folder)
    assert parse_config([*place, "--lr", "1e-3", "1e-2"]).lr == (1e-3, 1e-2)  # a grid may grow
    with pytest.raises(UserError, match=r"model\.n_heads was 8 and is now 4"):
        refused(parse_config([*place, "--model.n-heads", "4"]), folder)
    (folder / RECORD).write_text(json.dumps({"run_id": "run", "shared": shared | {"model": {"rope": 1}}}))
    with pytest.raises(UserError, match=f"{folder}.*rope"):
        parse_config(place)


OTHER_VALUES: dict[str, Any] = {
    "workers": 2, "batch_size": 64, "precision": "bf16", "compile": "on", "model.mlp": "gelu", "model.norm": "layer",
    "model.positions": "learned", "model.n_heads": 8, "model.n_kv_heads": 4, "model.vocab_size": 4096,
    "model.d_head": 16, "optim.name": "adamw", "optim.schedule": "cosine", "optim.min_lr": 1e-4, "lr": (0.5,),
    "d_ff": (8,), "optim.beta1": 0.5, "optim.beta2": 0.5, "optim.momentum": 0.5, "optim.decay_share": 0.5,
    "model.qkv_bias": True, "model.o_bias": True, "model.mlp_bias": True,
    "packing": "stories", "attention": "story", "validation": "windows", "optim.lookahead": 0.5,
    "optim.tail_average": 0.5, "teacher": ("another",), "teacher_weight": 0.25, "teacher_temperature": 2.0,
    "mtp_weights": (0.5,), "mtp_until": 0.5,
    "model.dropout": 0.5, "search": "optuna", "scheduler": "asha", "heat_map": ("optim.lr", "model.d_ff"),
}  # fmt: skip

OPEN = ("model.qkv_bias", "model.o_bias", "model.mlp_bias")
"""Which are true, false or not given."""


def other_value(name: str, value: Any) -> Any:
    """One that is allowed, and not the default."""
    if name in OTHER_VALUES:
        return OTHER_VALUES[name]
    if isinstance(value, bool):
        return not value
    if isinstance(value, str):
        return "another"
    return value * 2 or 3


def option(name: str, value: Any) -> list[str]:
    flag = name.replace("_", "-")
    if name in OPEN:
        return [f"--{flag}", str(value)]
    if isinstance(value, bool):
        return [f"--{flag}" if value else "--{}".format(".".join([*flag.split(".")[:-1], "no-" + flag.split(".")[-1]]))]
    return [f"--{flag}", *map(str, value if isinstance(value, tuple) else [value])]


@pytest.mark.parametrize("command", [parse_training, parse_config])
def test_every_option_changes_what_is_run_or_is_refused(command: Any, tmp_path: Path) -> None:
    """Accepted and ignored is what no option may be; all at once, for parsing takes its time."""
    plain = flatten(dataclasses.asdict(command([])))
    refused = {"optim.lr", "model.d_ff", "space"} if command is parse_config else set()
    wanted = {name: other_value(name, default) for name, default in plain.items() if name not in refused}
    wanted |= {"init_from": str(write_tiny_model(tmp_path / "origin"))}
    wanted |= {"output": str(tmp_path), "final": True}  # what is of the final training is refused without it
    words = [word for name, value in wanted.items() if name in plain for word in option(name, value)]
    found = flatten(dataclasses.asdict(command(words)))
    expected = {name: value for name, value in wanted.items() if name in plain}
    assert {name: found[name] for name in expected} == expected
    assert {name for name in plain if found[name] == plain[name]} <= {*refused, "final"}


@pytest.mark.parametrize("command", [parse_training, parse_config])
def test_force_alone_is_refused(command: Any) -> None:
    with pytest.raises(UserError, match="force goes with --resume"):
        command(["--force"])


@pytest.mark.parametrize("words", [["--workers", "2"], ["--register=x"], ["--sample_prompt", "A"], ["--profile"]])
def test_what_only_the_final_training_has_is_refused_without_one(words: list[str]) -> None:
    with pytest.raises(UserError, match="of the final training, which --no-final leaves out"):
        parse_config(["--no-final", *words])


@pytest.mark.parametrize("word", ["--optim.lr", "--optim.lr=1e-2", "--model.d-ff", "--model.d_ff", "--model.d-ff=8"])
def test_what_is_swept_is_not_set_as_well(word: str) -> None:
    with pytest.raises(UserError, match=r"is what is swept: give --(lr|d-ff) its values"):
        parse_config([word] if "=" in word else [word, "8"])
