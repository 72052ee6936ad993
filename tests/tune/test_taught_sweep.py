"""A sweep with teachers: every trial learns from the same weights, also when it goes on. No Ray is started."""

import dataclasses
import shutil
from pathlib import Path
from typing import Any

import pytest

from slm_ray.config.schema import TrainConfig
from slm_ray.distributed.driver import run_training
from slm_ray.errors import UserError
from slm_ray.runs import verification
from slm_ray.tokenization.tokenizer import Tokenizer
from slm_ray.tracking import mlflow_runs
from slm_ray.training.besides.teachers import check_teachers
from tests.support.saved_models import save_talkative
from tune import running
from tune.config import SweepConfig
from tune.planning import Plan, plan_sweep
from tune.record import write_record
from tune.running import run_sweep
from tune.sweep import parse_config

pytestmark = pytest.mark.ray


@pytest.fixture
def teachers(tmp_path: Path, tiny_tokenizer: Tokenizer) -> list[Path]:
    """Two models of one shape."""
    return [
        save_talkative(tmp_path / name / "best", tiny_tokenizer, noise=noise) for name, noise in (("a", 0), ("b", 1))
    ]


def digest(folder: Path) -> str:
    return verification.file_digest(folder, "model/model.safetensors")


def taught(config: TrainConfig, teacher: Path | str, **changes: Any) -> SweepConfig:
    shared = {field.name: getattr(config, field.name) for field in dataclasses.fields(TrainConfig)}
    own = {"name": "s", "lr": (1e-3,), "d_ff": (8,), "tracking_uri": mlflow_runs.OFF, "register": ""}
    return SweepConfig(**(shared | own | {"teacher": (str(teacher),)} | changes))


def begin(sweep: SweepConfig) -> Plan:
    """The sweep's record, as its first start leaves it."""
    plan = plan_sweep(sweep)
    plan.folder.mkdir(parents=True)
    write_record(plan.folder, plan.sweep, "", plan.space, "", teacher_sha256=plan.teacher_sha256)
    return plan


def test_a_sweep_goes_on_with_the_teachers_that_it_had_wherever_they_lie(
    tiny_config: TrainConfig, teachers: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(running, "check_cluster", lambda _: (_ for _ in ()).throw(UserError("came as far as this")))
    link = tmp_path / "link"
    link.symlink_to(teachers[0])
    plan = begin(taught(tiny_config, link))
    assert (plan.sweep.teacher, plan.teacher_sha256) == ((str(teachers[0]),), (digest(teachers[0]),))
    sweep = dataclasses.replace(plan.sweep, resume=True)
    for same in (plan.sweep.teacher, (str(link),)):
        with pytest.raises(UserError, match="came as far as this"):
            run_sweep(dataclasses.replace(sweep, teacher=same))
    link.unlink()
    link.symlink_to(teachers[1])
    for other, said in (((str(link),), ", which has other weights"), ((), "")):
        with pytest.raises(
            UserError, match=f"teacher was {teachers[0]} and is now [^ ]+( given)?{said}: a sweep keeps"
        ):
            run_sweep(dataclasses.replace(sweep, teacher=other))
    for name in ("teacher_weight", "teacher_temperature"):
        with pytest.raises(UserError, match=f"{name} was .* and is now 0.9: a sweep keeps"):
            run_sweep(dataclasses.replace(sweep, **{name: 0.9}))


def test_a_sweep_whose_project_was_moved_finds_its_teachers(
    tiny_config: TrainConfig, teachers: list[Path], tmp_path: Path
) -> None:
    before, after = tmp_path / "before", tmp_path / "after"
    shutil.copytree(teachers[0], before / "runs" / "a" / "best")
    begin(taught(tiny_config, before / "runs" / "a" / "best", output=str(before / "runs")))
    before.rename(after)
    again = plan_sweep(parse_config(["--resume", "--output", str(after / "runs"), "--name", "s"]))
    assert again.sweep.teacher == (str(after / "runs" / "a" / "best"),)
    assert again.teacher_sha256 == (digest(teachers[0]),)


def test_a_run_that_goes_on_takes_no_teacher_away_from_a_sweep(
    tiny_config: TrainConfig, teachers: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    step = tmp_path / "runs" / "a" / "checkpoints" / "step-00000004"
    shutil.copytree(teachers[0], step)
    monkeypatch.setattr(running, "check_cluster", lambda _: None)
    monkeypatch.setattr(running, "_run_trials", lambda *_: (_ for _ in ()).throw(UserError("came as far as this")))
    sweep = dataclasses.replace(taught(tiny_config, step), teacher=(str(teachers[1]), str(step)))
    with pytest.raises(UserError, match="came as far as this"):
        run_sweep(sweep)
    shutil.rmtree(step)
    again = parse_config(["--resume", "--output", sweep.output, "--name", "s"])
    plan = plan_sweep(again)
    config = plan.trial_config(plan.some_point)
    assert plan.teacher_sha256 == (digest(teachers[1]), digest(teachers[0]))
    assert config.teacher == (str(teachers[1]), str(Path(sweep.output) / "s" / "teachers" / "2" / step.name))
    check_teachers(config, plan.teacher_sha256)
    with pytest.raises(UserError, match="came as far as this"):
        run_sweep(again)


def test_a_teacher_that_no_trial_could_learn_from_is_refused_before_the_sweep(
    tiny_config: TrainConfig, teachers: list[Path], tmp_path: Path
) -> None:
    with pytest.raises(UserError, match="no model '/gone'"):
        plan_sweep(taught(tiny_config, "/gone"))
    space = tmp_path / "space.yaml"
    space.write_text("model.seq_len: [16, 4096]", encoding="utf-8")
    with pytest.raises(UserError, match=r"no trial with .*4096: teacher .* has a context of"):
        plan_sweep(taught(tiny_config, teachers[0], space=str(space), max_steps=8))


def test_trials_of_several_contexts_are_not_compared_by_windows(tiny_config: TrainConfig, tmp_path: Path) -> None:
    space = tmp_path / "space.yaml"
    space.write_text("model.seq_len: [8, 16]", encoding="utf-8")
    sweep = dataclasses.replace(taught(tiny_config, ""), teacher=(), space=str(space), max_steps=8)
    plan_sweep(dataclasses.replace(sweep, validation="stories"))
    with pytest.raises(UserError, match="losses by windows of several lengths are not comparable"):
        plan_sweep(dataclasses.replace(sweep, validation="windows"))


def test_a_trial_refuses_weights_that_were_replaced_in_their_place(
    tiny_config: TrainConfig, teachers: list[Path]
) -> None:
    plan = plan_sweep(taught(tiny_config, teachers[0]))
    teachers[0].rename(teachers[0].with_name("gone"))
    teachers[1].rename(teachers[0])
    config = plan.trial_config(plan.some_point)
    with pytest.raises(UserError, match="other weights than those that were learned from"):
        run_training(config, is_quiet=True, teacher_sha256=plan.teacher_sha256)
