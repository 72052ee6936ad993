"""A sweep that begins with given weights: the same for every trial, whatever moves meanwhile. No Ray is started."""

import dataclasses
import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml

from slm_ray.config.schema import TrainConfig
from slm_ray.dataset.manifest import load_manifest
from slm_ray.distributed.driver import run_training
from slm_ray.errors import UserError
from slm_ray.runs.checkpoint import load_state
from slm_ray.tokenization.tokenizer import Tokenizer
from slm_ray.tracking import mlflow_runs
from slm_ray.training.inputs import plan_run
from slm_ray.training.preflight import resolve
from slm_ray.training.starting_point import starting_point
from tests.support.begun_runs import begin as begin_run
from tests.support.champions import register_champion
from tests.support.saved_models import save_talkative
from tune import running
from tune.config import SweepConfig
from tune.origin import hold_origin
from tune.planning import Plan, plan_sweep
from tune.record import RECORD, read_record, shared_options, write_record
from tune.running import run_sweep
from tune.sweep import parse_config

pytestmark = pytest.mark.ray


@pytest.fixture
def origins(tmp_path: Path, tiny_tokenizer: Tokenizer) -> list[Path]:
    """Two models of one shape."""
    return [
        save_talkative(tmp_path / name / "best", tiny_tokenizer, noise=noise) for name, noise in (("a", 0), ("b", 1))
    ]


def digest(folder: Path) -> str:
    return str(json.loads((folder / "complete.json").read_text())["files"]["model/model.safetensors"])


def sweep_from(config: TrainConfig, origin: Path | str, **changes: Any) -> SweepConfig:
    shared = {field.name: getattr(config, field.name) for field in dataclasses.fields(TrainConfig)}
    own = {"name": "s", "lr": (1e-3, 1e-2), "init_from": str(origin), "tracking_uri": mlflow_runs.OFF, "register": ""}
    return SweepConfig(**(shared | own | changes))


def begin(sweep: SweepConfig) -> Plan:
    """The sweep's record, as its first start leaves it."""
    plan = plan_sweep(sweep)
    plan.folder.mkdir(parents=True)
    write_record(plan.folder, plan.sweep, "", plan.space, plan.origin_sha256)
    return plan


def first_weights(plan: Plan) -> str:
    """What a trial that starts now begins with."""
    config = resolve(plan.trial_config(plan.some_point), lambda _: 1)
    return starting_point(plan_run(config, load_manifest(config.data))).origin.weights_sha256


def test_a_link_that_moves_changes_no_later_trial(
    tiny_config: TrainConfig, origins: list[Path], tmp_path: Path
) -> None:
    link = tmp_path / "best"
    link.symlink_to(origins[0])
    plan = plan_sweep(sweep_from(tiny_config, link))
    assert (plan.origin_sha256, plan.sweep.init_from) == (digest(origins[0]), str(origins[0]))
    link.unlink()
    link.symlink_to(origins[1])
    assert plan_sweep(sweep_from(tiny_config, link)).origin_sha256 == digest(origins[1])
    assert first_weights(plan) == digest(origins[0])


def test_an_alias_that_moves_changes_no_later_trial(
    tiny_config: TrainConfig, origins: list[Path], tmp_path: Path
) -> None:
    uri = f"sqlite:///{tmp_path / 'registry.db'}"
    run = mlflow_runs.start_run(uri, "e", "r", {}, {})
    register_champion(uri, "m", origins[0], run.run_id)
    sweep = sweep_from(tiny_config, "models:/m@champion", tracking_uri=uri)
    plan = begin(sweep)
    register_champion(uri, "m", origins[1], run.run_id)
    assert (plan.sweep.init_from, plan.origin_sha256) == ("models:/m/1", digest(origins[0]))
    assert first_weights(plan) == digest(origins[0])
    with pytest.raises(UserError, match="init_from was models:/m/1 and is now models:/m/2, which has other weights"):
        run_sweep(dataclasses.replace(sweep, resume=True))


def test_weights_that_are_replaced_in_their_place_fail_a_trial(tiny_config: TrainConfig, origins: list[Path]) -> None:
    plan = plan_sweep(sweep_from(tiny_config, origins[0]))
    shutil.rmtree(origins[0])
    shutil.copytree(origins[1], origins[0])
    config = plan.trial_config(plan.some_point)
    with pytest.raises(UserError, match=f"{origins[0]} has other weights than were asked for"):
        run_training(config, is_quiet=True, origin_sha256=plan.origin_sha256)
    begun = begin_run(tiny_config, origins[1], "begun")
    again = dataclasses.replace(begun.config, resume=True)
    with pytest.raises(UserError, match=r"runs/begun began with other weights than were asked for \(sha256 "):
        run_training(again, is_quiet=True, origin_sha256=plan.origin_sha256)


def test_what_trials_share_names_the_weights(tiny_config: TrainConfig, origins: list[Path]) -> None:
    plan = begin(sweep_from(tiny_config, origins[0]))
    shared = shared_options(plan.sweep, plan.space, plan.origin_sha256)
    assert (shared["init_from"], shared["origin_sha256"]) == (str(origins[0]), digest(origins[0]))
    record = read_record(plan.folder)
    assert record is not None and record["shared"] == shared
    assert record["config"]["init_from"] == str(origins[0])


def test_a_sweep_goes_on_with_the_same_weights_alone_wherever_they_lie(
    tiny_config: TrainConfig, origins: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(running, "check_cluster", lambda _: (_ for _ in ()).throw(UserError("came as far as this")))
    sweep = dataclasses.replace(begin(sweep_from(tiny_config, origins[0])).sweep, resume=True)
    for place in (origins[0], shutil.copytree(origins[0], tmp_path / "elsewhere")):
        with pytest.raises(UserError, match="came as far as this"):
            run_sweep(dataclasses.replace(sweep, init_from=str(place)))
    other = f"init_from was {origins[0]} and is now {origins[1]}, which has other weights: a sweep keeps what"
    with pytest.raises(UserError, match=other):
        run_sweep(dataclasses.replace(sweep, init_from=str(origins[1])))
    with pytest.raises(UserError, match="and is now not given: a sweep keeps"):
        run_sweep(dataclasses.replace(sweep, init_from=""))
    with pytest.raises(UserError, match="no model '/gone'"):
        run_sweep(dataclasses.replace(sweep, init_from="/gone"))


def test_a_sweep_whose_project_was_moved_goes_on_with_the_same_weights(
    tiny_config: TrainConfig, origins: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where the sweeps lie elsewhere, and stayed."""
    for output in ("runs", str(tmp_path / "stays")):
        before, after = tmp_path / f"before-{Path(output).name}", tmp_path / f"after-{Path(output).name}"
        shutil.copytree(origins[0].parent, before / "runs" / "a")
        monkeypatch.chdir(before)
        begin(sweep_from(tiny_config, "runs/a/best", output=output))
        monkeypatch.chdir(tmp_path)
        before.rename(after)
        monkeypatch.chdir(after)
        again = parse_config(["--resume", "--output", output, "--name", "s"])
        assert Path(again.init_from).resolve() == after / "runs" / "a" / "best"
        assert plan_sweep(again).origin_sha256 == digest(origins[0])
        shutil.rmtree(after / "runs" / "a")
        shutil.copytree(origins[1].parent, after / "runs" / "a")  # other weights, in their new place
        lost = parse_config(["--resume", "--output", output, "--name", "s"])
        with pytest.raises(UserError, match=r"no model .*, give a place that has them to --init-from, or take another"):
            plan_sweep(lost)


@pytest.mark.parametrize("has_links", [True, False])
def test_a_run_that_goes_on_takes_no_weights_away_from_a_sweep(
    tiny_config: TrainConfig, origins: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, has_links: bool
) -> None:
    step = tmp_path / "runs" / "a" / "checkpoints" / "step-00000004"
    shutil.copytree(origins[0], step)
    best = tmp_path / "runs" / "a" / "best"
    best.symlink_to(step)
    if not has_links:
        monkeypatch.setattr(os, "link", lambda *_: (_ for _ in ()).throw(OSError("no links here")))
    monkeypatch.setattr(running, "check_cluster", lambda _: None)
    monkeypatch.setattr(running, "_run_trials", lambda *_: (_ for _ in ()).throw(UserError("came as far as this")))
    sweep = sweep_from(tiny_config, best)
    with pytest.raises(UserError, match="came as far as this"):
        run_sweep(sweep)
    shutil.rmtree(step)
    best.unlink()
    words = ["--resume", "--output", sweep.output, "--name", "s"]
    plan = plan_sweep(parse_config(words))
    assert plan.origin_sha256 == first_weights(plan) == digest(origins[0])
    with pytest.raises(UserError, match="came as far as this"):
        run_sweep(parse_config(words))
    config = resolve(plan.trial_config(plan.some_point), lambda _: 1)
    origin = starting_point(plan_run(config, load_manifest(config.data))).origin
    assert origin.reference == f"{checkpoint_name(origins[0])}/step-{origin.step:08d}"


def checkpoint_name(folder: Path) -> str:
    return str(load_state(folder).config["name"])


def test_weights_that_a_run_removed_before_they_were_held_are_said_in_one_line(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="step-00000004 is gone, its run keeps newer checkpoints alone: begin a sweep"):
        hold_origin(tmp_path / "s", str(tmp_path / "a" / "checkpoints" / "step-00000004"))


@pytest.mark.parametrize("before", [None, "", "models:/m@champion"])
def test_a_record_of_an_earlier_version_does_not_say_which_weights(
    tiny_config: TrainConfig, origins: list[Path], before: str | None
) -> None:
    """Of one that began with random weights, it does; the earliest know no `init_from`."""
    plan = begin(sweep_from(tiny_config, origins[0]))
    record = json.loads((plan.folder / RECORD).read_text())
    del record["shared"]["origin_sha256"], record["shared"]["init_from"]
    record["shared"] |= {} if before is None else {"init_from": before}
    (plan.folder / RECORD).write_text(json.dumps(record))
    said = f"init_from was not given and is now {origins[0]}: .*; leave it out, or take another --name$"
    if before:  # which is what --resume itself goes on with
        said = "which weights that led to: .*; begin another, without --resume and with another --name$"
    with pytest.raises(UserError, match=said):
        run_sweep(dataclasses.replace(plan.sweep, resume=True))


@pytest.mark.parametrize("model", [{}, {"seq_len": 48}])
def test_the_same_words_begin_a_sweep_from_given_weights_and_go_on_with_it(
    tiny_config: TrainConfig, origins: list[Path], tmp_path: Path, model: dict[str, int]
) -> None:
    fields = dataclasses.asdict(tiny_config) | {"model": model, "name": "", "tracking_uri": mlflow_runs.OFF}
    del fields["init_from"]
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(fields), encoding="utf-8")
    words = ["--config", str(tmp_path / "run.yaml"), "--init-from", str(origins[0])]
    words += ["--resume", "--output", tiny_config.output, "--name", "s", "--register", ""]
    first = begin(parse_config(words))
    assert (first.sweep.model.d_model, first.sweep.model.seq_len) == (32, model.get("seq_len", 64))
    for again in (words, words[:2] + words[4:]):
        sweep = parse_config(again)
        assert (sweep.model, sweep.init_from) == (first.sweep.model, str(origins[0]))
