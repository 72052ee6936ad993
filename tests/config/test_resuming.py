"""The same command again: `--resume` begins a run or goes on with it, and says what it cannot go on with."""

import dataclasses
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from slm_ray.config.files import from_dict, load_config
from slm_ray.config.resuming import EARLIER, KEPT, differences, is_one_of, overlaid, with_earlier_defaults
from slm_ray.config.schema import OptimConfig, TrainConfig
from slm_ray.errors import UserError
from slm_ray.runs.verification import UnreadableCheckpointError
from slm_ray.tracking.tracker import NullTracker
from slm_ray.train import parse_config
from slm_ray.training.context import TrainContext
from slm_ray.training.inputs import TrainInputs, load_inputs
from slm_ray.training.loop import fit
from slm_ray.training.preflight import refuse_conflicts, resolve
from tune.sweep import parse_config as sweep_config


@pytest.fixture
def config(tiny_config: TrainConfig) -> TrainConfig:
    return dataclasses.replace(tiny_config, max_steps=4, sample_prompt="", tracking_uri="none")


@pytest.fixture
def words(config: TrainConfig, tmp_path: Path) -> list[str]:
    """A whole command: a file, options over it, and `--resume`."""
    file = tmp_path / "run.yaml"
    fields = dataclasses.asdict(config) | {"output": "elsewhere", "name": "", "seed": 3}
    file.write_text(yaml.safe_dump(fields), encoding="utf-8")
    return ["--config", str(file), "--resume", "--output", config.output, "--name", config.name, "--seed", "5"]


def inputs_of(config: TrainConfig) -> TrainInputs:
    return load_inputs(resolve(config, lambda _: 1), NullTracker())


def refused(argv: list[str]) -> None:
    inputs = inputs_of(parse_config(argv))
    refuse_conflicts(inputs, inputs.folder.latest_valid())


def test_the_same_words_begin_a_run_and_go_on_with_it(words: list[str]) -> None:
    first = parse_config(words)
    assert (first.resume, first.seed, first.max_steps) == (True, 5, 4)
    refused(words)  # nothing stands in the way
    fit(inputs_of(first), TrainContext())
    again = parse_config(words)
    refused(words)
    vocabulary = dataclasses.replace(again.model, vocab_size=first.model.vocab_size)
    assert dataclasses.replace(again, model=vocabulary) == first


def test_what_is_not_given_is_as_it_was_and_what_may_change_changes(words: list[str]) -> None:
    fit(inputs_of(parse_config([*words, "--optim.lr", "1e-2", "--patience", "7"])), TrainContext())
    where = words[2:7]
    again = parse_config([*where, "--max-steps", "9", "--optim.min-lr", "5e-3", "--workers", "2"])
    assert (again.seed, again.optim.lr, again.patience) == (5, 1e-2, 7)
    assert (again.max_steps, again.optim.min_lr, again.workers) == (9, 5e-3, 2)
    assert parse_config(words).optim.lr == TrainConfig().optim.lr  # which the file gives


def test_every_option_that_cannot_change_is_named_with_both_values(words: list[str], config: TrainConfig) -> None:
    fit(inputs_of(parse_config(words)), TrainContext())
    with pytest.raises(UserError) as found:
        refused([*words, "--seed", "6", "--model.d-ff", "96", "--optim.name", "muon"])
    said = str(found.value)
    for part in ("seed was 5 and is now 6", "model.d_ff was 64 and is now 96", "optim.name was adamw and is now muon"):
        assert part in said
    assert "\n" not in said
    with pytest.raises(UserError, match="seed was 5 and is now 3"):  # the file's, which was overridden then
        refused(words[:-2])
    with pytest.raises(UserError, match=r"seed was 5 and is now 3.*--force changes it"):
        refused([*words[2:], "--seed", "3"])
    refused([*words[2:], "--seed", "3", "--force"])
    with pytest.raises(UserError, match=r"model\.d_ff was 64 and is now 96.*leave it out"):  # which no force changes
        refused([*words[2:], "--model.d-ff", "96", "--force"])
    with pytest.raises(UserError, match=r"model\.n_layers was 2 and is now 5"):  # a preset, by what it resolves to
        refused(["--config", "story-5m", *words[2:]])


def test_without_a_name_the_newest_run_goes_on_or_one_begins(config: TrainConfig) -> None:
    where = ["--resume", "--output", config.output]
    assert (parse_config(where).name, parse_config(where).resume) == ("", True)
    fit(inputs_of(config), TrainContext())
    assert parse_config(where).name == config.name
    assert parse_config([*where, "--no-resume"]).name == ""
    assert parse_config([*where, "--name", "another"]).model == dataclasses.replace(parse_config([]).model)


@pytest.mark.parametrize("named", [True, False])
def test_a_folder_that_cannot_be_listed_is_not_one_without_a_run(
    config: TrainConfig, named: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    fit(inputs_of(config), TrainContext())

    listed = Path.iterdir

    def refuse(folder: Path) -> Iterator[Path]:
        if folder.is_relative_to(config.output):
            raise OSError(116, "Stale file handle")
        return listed(folder)

    monkeypatch.setattr(Path, "iterdir", refuse)
    with pytest.raises(UnreadableCheckpointError, match="cannot be listed: Stale file handle"):
        parse_config(["--resume", "--output", config.output, *(["--name", config.name] if named else [])])


def test_a_run_of_which_every_checkpoint_is_damaged_does_not_begin_anew(words: list[str]) -> None:
    inputs = inputs_of(parse_config(words))
    fit(inputs, TrainContext())
    for path in inputs.folder.checkpoints():
        (path / "state.json").write_bytes(b"")
    with pytest.raises(UserError, match="cannot be read: take another --name"):
        refused(words)


def test_a_file_lies_over_the_run_and_under_the_options(tmp_path: Path) -> None:
    was = TrainConfig(max_steps=9, patience=3, seed=7, optim=OptimConfig(lr=1e-2, beta1=0.8))
    file = tmp_path / "some.yaml"
    file.write_text("optim: {lr: 2.0e-2}\nmax_steps: 11\n")
    now = overlaid(was, str(file), KEPT)
    assert (now.optim.lr, now.optim.beta1, now.max_steps, now.patience) == (2e-2, 0.8, 11, 3)
    assert now.seed == 0  # what is kept is compared by what the file resolves to
    assert differences(dataclasses.asdict(was), dataclasses.asdict(now), KEPT) == {"seed": "seed was 7 and is now 0"}


@pytest.mark.parametrize("preset", ["story-5m", "demo"])
def test_a_run_that_could_not_say_an_option_goes_on_by_the_words_that_began_it(preset: str) -> None:
    new = load_config(preset)
    saved = {name: value for name, value in dataclasses.asdict(new).items() if name not in EARLIER}
    was = from_dict(TrainConfig, with_earlier_defaults(saved), "state.json")
    now = overlaid(was, preset, KEPT)
    assert now == was
    assert overlaid(new, preset, KEPT) == new  # one of now has what the preset says


def test_a_file_that_says_more_than_the_run_knew_is_refused(tmp_path: Path) -> None:
    was, file = TrainConfig(), tmp_path / "some.yaml"
    file.write_text("mtp_weights: [0.5]\n")
    now = overlaid(was, str(file), KEPT)
    assert set(differences(dataclasses.asdict(was), dataclasses.asdict(now), KEPT)) == {"mtp_weights"}


@pytest.mark.parametrize("parse", [parse_config, sweep_config])
@pytest.mark.parametrize(
    ("words", "missing"),
    [
        (["--config", "demo", "--mtp-until", "0.3"], "--mtp-weights"),
        (["--config", "demo", "--mtp_until=0.3"], "--mtp-weights"),
        (["--mtp-weights", "0", "0", "--mtp-until", "0.3"], "--mtp-weights"),
        (["--teacher-weight", "0.9"], "--teacher"),
        (["--teacher_temperature=2"], "--teacher"),
        (["--force"], "--resume"),
    ],
)
def test_an_option_that_changes_nothing_without_another_names_it(
    parse: Callable[[list[str]], TrainConfig], words: list[str], missing: str
) -> None:
    with pytest.raises(UserError, match=f"goes with {missing}:"):
        parse(words)


@pytest.mark.parametrize("parse", [parse_config, sweep_config])
@pytest.mark.parametrize(
    "words",
    [
        ["--mtp-until", "0.3"],  # the preset has weights
        ["--config", "demo", "--mtp-weights", "0.5", "--mtp-until", "0.3"],
        ["--mtp-weights", "0"],
        ["--config", "demo"],
    ],
)
def test_an_option_that_has_what_it_needs_is_taken(parse: Callable[[list[str]], TrainConfig], words: list[str]) -> None:
    parse(words)


def test_kept_options_are_those_of_the_config() -> None:
    names = {field.name for field in dataclasses.fields(TrainConfig)}
    assert {name.partition(".")[0] for name in KEPT} <= names
    assert is_one_of("model.d_ff", KEPT)
    assert not is_one_of("optim.lr", KEPT)
    assert differences({"model": {"vocab_size": 0}}, {"model": {"vocab_size": 512}}, KEPT) == {}


def test_help_is_shown_beside_resume(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse_config(["--resume", "--help"])
    assert "--resume" in capsys.readouterr().out


def test_a_file_may_ask_to_resume(config: TrainConfig, tmp_path: Path) -> None:
    file = tmp_path / "again.yaml"
    values: dict[str, Any] = {"resume": True, "output": config.output, "name": config.name}
    file.write_text(yaml.safe_dump(values))
    fit(inputs_of(dataclasses.replace(config, patience=5)), TrainContext())
    assert parse_config(["--config", str(file)]).patience == 5
    assert parse_config(["--config", str(file), "--no-resume"]).patience == 0
