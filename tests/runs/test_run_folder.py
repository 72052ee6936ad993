"""Which checkpoints stay, and how often one is read to know that it is whole."""

import dataclasses
import math
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from slm_ray.config.schema import TrainConfig
from slm_ray.distributed import driver
from slm_ray.distributed.mlflow_run import open_mlflow_run
from slm_ray.errors import UserError
from slm_ray.runs import checkpoint, verification
from slm_ray.runs.ownership import refuse_foreign
from slm_ray.runs.retention import steps_to_keep
from slm_ray.runs.run_folder import RunFolder, newest_run
from slm_ray.runs.train_state import TrainState
from slm_ray.runs.verification import UnreadableCheckpointError
from slm_ray.tracking import mlflow_runs
from slm_ray.tracking.tracker import NullTracker
from slm_ray.train import parse_config
from slm_ray.training.context import TrainContext
from slm_ray.training.inputs import load_inputs
from slm_ray.training.loop import fit
from slm_ray.training.preflight import resolve


def test_the_newest_and_the_best_are_retained() -> None:
    losses = {4: 2.0, 8: 1.0, 12: 3.0, 16: math.inf}
    assert steps_to_keep(losses, keep=1, keep_best=1) == {16, 8}
    assert steps_to_keep(losses, keep=2, keep_best=2) == {16, 12, 8, 4}
    assert steps_to_keep({4: math.inf}, keep=1, keep_best=3) == {4}
    assert steps_to_keep({}, keep=2, keep_best=1) == set()


@given(st.dictionaries(st.integers(1, 99), st.floats(0, 9) | st.just(math.inf)), st.integers(1, 5), st.integers(1, 5))
def test_no_dropped_checkpoint_is_newer_or_better_than_one_that_is_retained(
    losses: dict[int, float], keep: int, keep_best: int
) -> None:
    kept = steps_to_keep(losses, keep=keep, keep_best=keep_best)
    dropped = losses.keys() - kept
    assert kept <= losses.keys()
    assert len(kept) >= min(keep, len(losses))
    assert all(sum(other > step for other in losses) >= keep for step in dropped)
    assert all(sum(other <= losses[step] for other in losses.values()) > keep_best or math.isinf(losses[step])
               for step in dropped)  # fmt: skip


def test_a_resume_reads_a_whole_checkpoint_once_in_the_driver_and_once_in_each_worker(
    tiny_config: TrainConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = dataclasses.replace(tiny_config, tracking_uri=mlflow_runs.OFF, sample_prompt="")
    resolved = resolve(config, lambda _: 1)
    fit(load_inputs(resolved, NullTracker()), TrainContext())
    verified: list[Path] = []
    verify = verification.verify
    monkeypatch.setattr(checkpoint, "verify", lambda folder: (verified.append(folder), verify(folder)))

    longer = parse_config(["--resume", "--output", config.output, "--name", config.name, "--max-steps", "12"])
    started: list[int] = []
    monkeypatch.setattr(driver.cluster, "connect", lambda **_: None)
    monkeypatch.setattr(driver.cluster, "check_resources", lambda _: None)

    def run_locked(plan, latest, *_) -> None:  # type: ignore[no-untyped-def]
        open_mlflow_run(plan, latest, "")
        started.append(driver._is_finished(plan, latest))

    monkeypatch.setattr(driver, "_run_locked", run_locked)
    driver.run_training(longer)
    assert started == [False]
    assert [path.name for path in verified] == ["step-00000008"]

    verified.clear()
    assert fit(load_inputs(longer, NullTracker()), TrainContext()).step == 12
    assert [path.name for path in verified] == ["step-00000008"]


def test_the_latest_state_is_read_without_the_weights(tiny_config: TrainConfig) -> None:
    config = dataclasses.replace(tiny_config, tracking_uri=mlflow_runs.OFF, sample_prompt="")
    fit(load_inputs(resolve(config, lambda _: 1), NullTracker()), TrainContext())
    folder = RunFolder(Path(config.output) / config.name)
    (folder.checkpoint_path(8) / "model" / "model.safetensors").write_bytes(b"torn")
    assert (state := folder.latest_state()) is not None and state.step == 8
    (folder.checkpoint_path(8) / "state.json").write_text("{}")
    assert (state := folder.latest_state()) is not None and state.step == 4
    (folder.checkpoint_path(4) / verification.MARKER).unlink()
    assert folder.latest_state() is None


def test_a_folder_that_is_no_run_is_refused_and_left_as_it_is(tiny_config: TrainConfig, tmp_path: Path) -> None:
    folder = tmp_path / "runs" / "tiny"
    for name in ("stop/notes.txt", "summary.json", "error.txt", "mine.link", "deep/down/file.partial", "thesis.tex"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("mine")
    before = {path: path.read_text() for path in folder.rglob("*") if path.is_file()}
    config = dataclasses.replace(tiny_config, output=str(tmp_path / "runs"), tracking_uri=mlflow_runs.OFF)
    with pytest.raises(UserError, match=r"is no folder of a run \(it holds deep\)"):
        driver.run_training(config)
    assert {path: path.read_text() for path in folder.rglob("*") if path.is_file()} == before


def test_what_a_user_puts_into_a_run_stays_and_is_no_reason_to_refuse_it(tiny_config: TrainConfig) -> None:
    config = dataclasses.replace(tiny_config, tracking_uri=mlflow_runs.OFF, sample_prompt="")
    inputs = load_inputs(resolve(config, lambda _: 1), NullTracker())
    fit(inputs, TrainContext())
    for name in ("notes.link", "checkpoints/mine.partial", "deep/step-1.partial"):
        (inputs.folder.path / name).parent.mkdir(exist_ok=True)
        (inputs.folder.path / name).write_text("mine")
    refuse_foreign(inputs.folder.path)
    fit(dataclasses.replace(inputs, max_steps=10), TrainContext())
    for name in ("notes.link", "checkpoints/mine.partial", "deep/step-1.partial"):
        assert (inputs.folder.path / name).read_text() == "mine"


def test_a_checkpoint_that_cannot_be_judged_now_is_not_dropped(
    tiny_config: TrainConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = dataclasses.replace(tiny_config, tracking_uri=mlflow_runs.OFF, sample_prompt="")
    fit(load_inputs(resolve(config, lambda _: 1), NullTracker()), TrainContext())
    folder = RunFolder(Path(config.output) / config.name)
    read_state = checkpoint.load_state

    def failing(path: Path) -> TrainState:
        if path.name == "step-00000004":
            raise UnreadableCheckpointError("Input/output error")
        return read_state(path)

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "load_state", failing)
        folder.publish(8, is_best=True, keep=1, keep_best=1)
    assert [path.name for path in folder.checkpoints()] == ["step-00000004", "step-00000008"]
    folder.publish(8, is_best=True, keep=1, keep_best=1)
    assert [path.name for path in folder.checkpoints()] == ["step-00000008"]


def test_a_second_corrupt_checkpoint_of_a_step_does_not_replace_the_first(tmp_path: Path) -> None:
    run = RunFolder(tmp_path)
    for content in ("first", "second", "third"):
        run.checkpoint_path(8).mkdir(parents=True)
        (run.checkpoint_path(8) / "weights").write_text(content)
        run.remove_partial(4)
    kept = {(path / "weights").read_text() for path in tmp_path.glob("checkpoints/step-00000008*.corrupt")}
    assert kept == {"first", "second", "third"}
    assert run.checkpoints() == []


def test_a_folder_of_runs_that_cannot_be_listed_is_not_one_without_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stale(self: Path) -> None:
        raise OSError(116, "Stale file handle")

    assert newest_run(tmp_path / "none") is None
    monkeypatch.setattr(Path, "iterdir", stale)
    with pytest.raises(UserError, match="cannot be listed: Stale file handle"):
        newest_run(tmp_path)
