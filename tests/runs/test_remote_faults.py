"""A store that does not answer, or only in part: nothing is taken for absent, and one clear line is said."""

import dataclasses
import itertools
import json
import shutil
import time
import uuid
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from ray.train import WorkerGroupError

from slm_ray.config.schema import TrainConfig
from slm_ray.distributed import workers
from slm_ray.errors import UserError
from slm_ray.locks.lease import LeaseLostError
from slm_ray.locks.lease_files import Holder, LeaseFiles
from slm_ray.runs import run_folder, run_lock
from slm_ray.runs.outcome import read_summary
from slm_ray.runs.remote_checkpoints import RemoteCheckpoints
from slm_ray.runs.remote_run import open_run
from slm_ray.runs.run_folder import RunFolder
from slm_ray.runs.verification import UnreadableCheckpointError
from slm_ray.storage import files_below, storage_path
from slm_ray.tracking import mlflow_runs, tracker
from slm_ray.training.context import TrainContext
from slm_ray.training.inputs import load_inputs
from slm_ray.training.loop import fit
from slm_ray.training.preflight import resolve


@pytest.fixture
def config(tiny_config: TrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> TrainConfig:
    """The tiny run, kept in a store that is fsspec's memory."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    output = f"memory://{uuid.uuid4().hex}"
    return dataclasses.replace(tiny_config, output=output, tracking_uri=mlflow_runs.OFF, sample_prompt="")


@pytest.fixture
def run(config: TrainConfig) -> RunFolder:
    """After eight steps."""
    inputs = load_inputs(resolve(config, lambda _: 1), tracker.NullTracker())
    fit(inputs, TrainContext())
    return inputs.folder


def refuse(*_: object, **__: object) -> Any:
    raise PermissionError(13, "AccessDenied")


def tree(folder: Path) -> dict[Path, int]:
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*")}


@pytest.mark.parametrize("method", ["info", "ls", "cat_file"])
def test_a_store_that_refuses_is_no_store_without_the_run(
    run: RunFolder, config: TrainConfig, method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = tree(run.path)
    with monkeypatch.context() as patch:
        patch.setattr(type(storage_path(config.output).fs), method, refuse)  # type: ignore[union-attr]
        if method == "ls":
            patch.setattr(type(storage_path(config.output).fs), "find", refuse)  # type: ignore[union-attr]
        with pytest.raises(UserError, match="AccessDenied"):
            open_run(config.output, config.name).fetch()
    assert tree(run.path) == before
    again = open_run(config.output, config.name)
    again.fetch()
    assert [path.name for path in again.checkpoints()] == ["step-00000004", "step-00000008"]


def test_what_the_store_refuses_is_an_error_of_one_line(
    run: RunFolder, config: TrainConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    def raw(*_: object, **__: object) -> None:
        raise RuntimeError("An error occurred (SlowDown)\nwith more lines")

    monkeypatch.setattr(type(storage_path(config.output).fs), "info", raw)  # type: ignore[union-attr]
    with pytest.raises(OSError, match=r"SlowDown\)$"):
        run.clear_requests()
    plan = load_inputs_plan(config, run)
    with pytest.raises(UserError, match=r"cannot write to memory://.*SlowDown\)$"):
        workers.run_workers(plan, "", [])


def load_inputs_plan(config: TrainConfig, run: RunFolder) -> Any:
    return workers.RunPlan(config=config, max_steps=8, data_fingerprint="", folder=run)


@pytest.mark.parametrize("outcome", [UserError("the loss diverged"), KeyboardInterrupt()])
def test_how_a_run_ended_is_not_hidden_by_a_store_that_does_not_answer_afterwards(
    run: RunFolder, outcome: BaseException, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def away(self: RunFolder) -> None:
        raise UnreadableCheckpointError("cannot read the store: AccessDenied")

    monkeypatch.setattr(run_folder.RunFolder, "fetch", away)
    with pytest.raises(type(outcome)) as caught, workers._tidied(run):
        raise outcome
    assert caught.value is outcome and "AccessDenied" in caplog.text
    with pytest.raises(UserError, match="the workers are done, and cannot read the store"), workers._tidied(run):
        pass


def test_a_checkpoint_in_a_store_names_no_folder_above_the_working_one(
    config: TrainConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = Path(config.data)
    monkeypatch.chdir(data.parent)
    inputs = load_inputs(resolve(dataclasses.replace(config, max_steps=2), lambda _: 1), tracker.NullTracker())
    fit(inputs, TrainContext())
    state = storage_path(config.output) / config.name / "checkpoints" / "step-00000002" / "state.json"
    assert json.loads(state.read_bytes())["config"]["data"] == data.name
    assert str(data.parent).encode() not in state.read_bytes()


def test_a_checkpoint_that_cannot_be_put_in_its_place_is_not_passed_over(
    run: RunFolder, config: TrainConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The run would go on from an older one."""
    shutil.rmtree(run.path)
    rename = Path.rename

    def full(self: Path, target: Path) -> Path:
        if self.suffix == ".partial" and "step-00000008" in self.name:
            raise OSError(28, "No space left on device")
        return rename(self, target)

    with monkeypatch.context() as patch, pytest.raises(UserError, match="No space left"):
        patch.setattr(Path, "rename", full)
        open_run(config.output, config.name).fetch()
    again = open_run(config.output, config.name)
    again.fetch()
    assert again.latest.resolve().name == "step-00000008"


def test_a_machine_that_comes_back_takes_the_record_of_the_one_that_went_on(
    config: TrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It was killed behind its last checkpoint, with a longer record; the other went on with another rate."""
    here = load_inputs(resolve(config, lambda _: 1), tracker.NullTracker())
    fit(dataclasses.replace(here, pause_at=4), TrainContext())
    for step in range(5, 100):
        here.history.append({"step": step, "train_loss": 99.0, "lr": 1.0})
    (here.folder.path / "summary.json").write_text((here.folder.path / "summary.json").read_text() + " " * 500)
    with monkeypatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path / "another machine"))
        there = load_inputs(resolve(config, lambda _: 1), tracker.NullTracker())
        fit(there, TrainContext())
    expected = there.history.path.read_bytes()
    here.folder.fetch()
    assert here.history.path.read_bytes() == expected
    assert read_summary(here.folder) == read_summary(there.folder)
    here.folder.push_record()
    assert (storage_path(config.output) / config.name / "metrics.jsonl").read_bytes() == expected


def test_a_driver_that_slept_within_an_upload_touches_no_file_of_the_one_that_went_on(
    run: RunFolder, config: TrainConfig
) -> None:
    place = storage_path(config.output) / config.name / "checkpoints"
    calls = itertools.count(1)

    def check() -> None:
        if next(calls) > 1:  # it was stopped before the second file, and the other one has written that checkpoint
            for file in run.checkpoint_path(8).rglob("*.*"):
                (place / "step-00000008" / file.relative_to(run.checkpoint_path(8)).as_posix()).write_bytes(b"theirs")
            raise LeaseLostError("taken over")

    sleeper = RemoteCheckpoints(place, check)
    with pytest.raises(LeaseLostError):
        sleeper.upload(run.checkpoint_path(8))
    assert {file.read_bytes() for file in files_below(place / "step-00000008")} == {b"theirs"}
    with pytest.raises(LeaseLostError):
        sleeper.discard("step-00000004")
    assert "step-00000004" in sleeper.names()


def test_workers_that_see_first_that_the_run_was_taken_over_end_it_so(
    run: RunFolder, config: TrainConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As failed, it would be marked at the tracker while the other driver goes on with it."""

    def fail(*_: object) -> None:
        assert run.lease is not None
        place = storage_path(config.output) / config.name / ".lease"
        other = Holder(owner="another", since_s=1.0, alive_s=time.time())
        LeaseFiles(place).create(int(run.lease.token.split()[0]) + 1, other)
        raise WorkerGroupError("lost", {0: UserError("the workers' words")})

    monkeypatch.setattr(workers, "_trainer", lambda *_: SimpleNamespace(fit=None))
    monkeypatch.setattr(workers, "_fit_interruptibly", fail)
    with pytest.raises(LeaseLostError, match="was taken over"), run_lock.locked(run):
        try:
            workers.run_workers(load_inputs_plan(config, run), "", [])
        except LeaseLostError:
            raise
        except UserError as error:
            pytest.fail(f"as a failure of its own: {error}")
