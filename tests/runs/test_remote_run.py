"""A run in an object store: what lies there, and how it goes on from there on another machine."""

import contextlib
import dataclasses
import shutil
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from slm_ray import storage
from slm_ray.config.schema import TrainConfig
from slm_ray.distributed import workers
from slm_ray.distributed.driver import run_training
from slm_ray.errors import UserError
from slm_ray.locks import lease
from slm_ray.locks.lease import LeaseLostError
from slm_ray.runs import checkpoint, run_lock, verification
from slm_ray.runs.outcome import RunStatus
from slm_ray.runs.remote_run import ObjectStoreMirror, open_run
from slm_ray.runs.run_folder import RunFolder
from slm_ray.runs.train_state import Evaluation
from slm_ray.storage import StoragePath, files_below, storage_path
from slm_ray.tracking import mlflow_runs, tracker
from slm_ray.train import describe, parse_config
from slm_ray.training.context import TrainContext
from slm_ray.training.inputs import TrainInputs, load_inputs
from slm_ray.training.loop import fit
from slm_ray.training.preflight import refuse_conflicts, resolve
from slm_ray.training.trainer import Trainer

pytestmark = pytest.mark.ray

CHECKPOINT = {
    "complete.json",
    "optimizer.pt",
    "state.json",
    *(f"model/{name}" for name in ("config.json", "generation_config.json", "model.safetensors")),
    *(f"model/{name}" for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")),
}


@pytest.fixture
def config(
    tiny_config: TrainConfig, s3: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> TrainConfig:
    """The tiny run, kept in a place of its own in the store."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    output = f"s3://stories/{tmp_path.name}"
    return dataclasses.replace(tiny_config, output=output, tracking_uri=mlflow_runs.OFF, sample_prompt="")


@pytest.fixture(scope="module", autouse=True)
def machine_of_the_workers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Ray's workers have another work folder than the driver, as if they were on another machine."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("workers")))
        yield


def inputs_of(config: TrainConfig, **changes: Any) -> TrainInputs:
    return load_inputs(resolve(dataclasses.replace(config, **changes), lambda _: 1), tracker.NullTracker())


def remote(config: TrainConfig) -> StoragePath:
    return storage_path(config.output) / config.name


def contents(config: TrainConfig) -> set[str]:
    return {file.as_posix().removeprefix(remote(config).as_posix()).lstrip("/") for file in files_below(remote(config))}


def another_machine(inputs: TrainInputs) -> None:
    """One that has never seen the run."""
    shutil.rmtree(inputs.folder.path)


def weights(folder: RunFolder) -> dict[str, torch.Tensor]:
    return checkpoint.load_model(folder.latest)[0].state_dict()


def assert_equal(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> None:
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in ours.items())


def test_a_run_lies_in_the_store_and_goes_on_from_there_on_another_machine(config: TrainConfig, tmp_path: Path) -> None:
    local = inputs_of(config, output=str(tmp_path / "runs"), max_steps=12)
    fit(local, TrainContext())
    steps = iter(range(1, 100))
    inputs = inputs_of(config, max_steps=12)
    assert fit(inputs, TrainContext(is_stop_requested=lambda: next(steps) == 6)).status == RunStatus.STOPPED
    expected = {f"checkpoints/step-{step:08d}/{name}" for step in (4, 6) for name in CHECKPOINT}
    assert contents(config) == expected | {"latest.txt", "best.txt", "metrics.jsonl", "summary.json", "run.id"}

    another_machine(inputs)
    again = inputs_of(config, max_steps=12)
    assert again.folder.best.resolve().name == "step-00000004"
    assert fit(again, TrainContext()).status == RunStatus.FINISHED
    assert_equal(weights(again.folder), weights(local.folder))
    assert again.history.series("train_loss") == local.history.series("train_loss")
    assert {name.split("/")[1] for name in contents(config) if name.startswith("checkpoints")} == {
        "step-00000008",
        "step-00000012",
    }

    another_machine(again)
    resumed = parse_config(["--resume", "--output", config.output, "--name", config.name])
    assert (resumed.max_steps, resumed.model.d_ff) == (12, 64)


def test_a_machine_lost_behind_a_checkpoint_leaves_no_hole_in_the_record(config: TrainConfig, tmp_path: Path) -> None:
    class LostError(Exception):
        """No power."""

    def upload(*given: Any) -> None:
        send(*given)
        raise LostError

    local = inputs_of(config, output=str(tmp_path / "runs"))
    fit(local, TrainContext())
    inputs, send = inputs_of(config), ObjectStoreMirror.upload
    with pytest.MonkeyPatch.context() as patch, pytest.raises(LostError):
        patch.setattr(ObjectStoreMirror, "upload", upload)
        fit(inputs, TrainContext())
    another_machine(inputs)
    again = inputs_of(config)
    assert fit(again, TrainContext()).status == RunStatus.FINISHED
    assert again.history.series("train_loss") == local.history.series("train_loss")


@contextlib.contextmanager
def refusing(*names: str) -> Iterator[None]:
    """The store takes nothing whose path holds one of these words."""
    kind = type(storage_path("s3://stories/any"))
    write = kind.write_bytes

    def write_bytes(self: StoragePath, content: bytes) -> int:
        if any(name in self.as_posix() for name in names):
            raise RuntimeError("the bucket is gone")
        return write(self, content)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kind, "write_bytes", write_bytes)
        yield


def test_a_checkpoint_that_the_store_refused_is_sent_when_the_run_goes_on(config: TrainConfig) -> None:
    inputs = inputs_of(config)
    with refusing("step-00000008/optimizer.pt"):
        assert fit(inputs, TrainContext()).status == RunStatus.UNSAVED
        assert "the bucket is gone" in str(list(inputs.history.lines())[-1])
        inputs.folder.fetch()  # refused again: it stays
    assert [path.name for path in inputs.folder.checkpoints()] == ["step-00000004", "step-00000008"]
    assert "checkpoints/step-00000008/complete.json" not in contents(config)
    again = inputs_of(config)
    assert "checkpoints/step-00000008/complete.json" in contents(config)
    assert fit(again, TrainContext()).status == RunStatus.FINISHED
    another_machine(again)
    again.folder.fetch()
    assert again.folder.latest.resolve().name == "step-00000008"
    assert verification.is_valid(again.folder.latest)


def test_a_second_command_changes_nothing_before_it_has_the_lock(config: TrainConfig) -> None:
    """The first driver's newest checkpoint is not in the store yet."""
    inputs = inputs_of(config)
    with refusing("step-00000008"):
        fit(inputs, TrainContext())
    resume = ["--resume", "--output", config.output, "--name", config.name]

    def written() -> dict[Path, int]:
        return {path: path.stat().st_mtime_ns for path in inputs.folder.path.rglob("*")}

    with run_lock.locked(inputs.folder):
        before = written()
        with pytest.raises(UserError, match="another"):
            run_training(parse_config(resume))
        assert written() == before
    assert parse_config(resume).max_steps == 8


Opener = Callable[[TrainConfig], RunFolder]


@pytest.fixture
def elsewhere(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Opener:
    """A run as another machine opens it: with a work folder of its own."""

    def opened(config: TrainConfig) -> RunFolder:
        with monkeypatch.context() as patch:
            patch.setenv("XDG_CACHE_HOME", str(tmp_path / "another machine"))
            return open_run(config.output, config.name)

    return opened


@pytest.fixture
def without_patience(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever has a lease is taken for dead at once."""
    monkeypatch.setattr(lease, "STALE_S", -1.0)
    monkeypatch.setattr(lease, "WATCH_S", 0.0)


def kept(config: TrainConfig) -> dict[str, bytes]:
    return {file.as_posix(): file.read_bytes() for file in files_below(remote(config))}


def test_a_driver_on_another_machine_is_refused_and_changes_nothing(config: TrainConfig, elsewhere: Opener) -> None:
    inputs = inputs_of(config)
    fit(inputs, TrainContext())
    resume = parse_config(["--resume", "--output", config.output, "--name", config.name, "--max-steps", "12"])
    with run_lock.locked(elsewhere(config)):
        before = kept(config)
        with pytest.raises(UserError, match=r"another train\.py is writing to s3://.*it began as process \d+ on "):
            run_training(resume)
        assert kept(config) == before
    with run_lock.locked(inputs.folder):
        pass


def test_a_killed_driver_is_followed_at_once_by_one_on_its_machine(config: TrainConfig) -> None:
    with run_lock.locked(inputs_of(config).folder):
        left = {file: file.read_bytes() for file in files_below(remote(config) / ".lease")}
    for file, content in left.items():
        file.write_bytes(content)  # it gave nothing back
    with run_lock.locked(inputs_of(config).folder):
        assert {"00000002.json"} == {file.name for file in files_below(remote(config) / ".lease")}


@pytest.mark.usefixtures("without_patience")
def test_a_driver_that_lost_its_lease_writes_nothing_to_the_store(config: TrainConfig, elsewhere: Opener) -> None:
    """Its machine was asleep; the other one has taken the run over since."""
    sleeper, other = inputs_of(config), elsewhere(config)
    with pytest.raises(LeaseLostError, match="has stopped writing there"), run_lock.locked(sleeper.folder):
        assert sleeper.folder.lease is not None
        token = sleeper.folder.lease.token
        fit(load_inputs(sleeper.config, tracker.NullTracker(), token), TrainContext())
        assert "checkpoints/step-00000008/complete.json" in contents(config)
        goes_on = load_inputs(dataclasses.replace(sleeper.config, max_steps=12), tracker.NullTracker(), token)
        with run_lock.locked(other):
            before = kept(config)
            with pytest.raises(LeaseLostError):
                fit(goes_on, TrainContext())
            folder, newest = goes_on.folder, goes_on.folder.checkpoints()[-1]
            folder.mirror.request_stop()
            for write in (
                lambda: folder.mirror.upload(folder.path, newest, [newest], ["step-00000004"]),
                lambda: folder.mirror.push_record(folder.path),
                lambda: folder.mirror.remove("summary.json"),
                folder.clear_requests,
            ):
                with pytest.raises(LeaseLostError):
                    write()
            assert kept(config) == before
            sleeper.folder.check_lease()


@pytest.mark.usefixtures("without_patience")
def test_a_run_that_another_driver_takes_over_ends_with_that_line(config: TrainConfig, elsewhere: Opener) -> None:
    folder, is_over = inputs_of(config).folder, threading.Event()
    with (
        pytest.raises(LeaseLostError, match="was taken over by process"),
        run_lock.locked(folder),
        run_lock.locked(elsewhere(config)),
    ):
        assert folder.lease is not None
        folder.lease._beat()
        workers._fit_interruptibly(is_over.wait, folder, lambda: True)
    is_over.set()


def test_an_upload_of_nothing_is_an_error(config: TrainConfig) -> None:
    inputs = inputs_of(config)
    fit(inputs, TrainContext())
    gone = inputs.folder.checkpoint_path(8)
    checkpoint.remove(gone)
    before = contents(config)
    with pytest.raises(OSError, match="gone"):
        inputs.folder.mirror.upload(inputs.folder.path, gone, [gone], [])
    assert contents(config) == before


def test_what_another_machine_has_kept_is_dropped_by_the_same_rule_only(
    config: TrainConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Three best are kept: after a change of machine two of them are in the store alone."""
    losses = iter([2.0, 1.0, 3.0, 9.0, 4.0, 1.5])

    def validate(trainer: Trainer) -> Evaluation:
        loss = next(losses)
        return Evaluation(val_loss=loss, val_perplexity=1.0, val_bits_per_byte=loss, step=trainer.step)

    monkeypatch.setattr(Trainer, "validate", validate)
    changes: dict[str, Any] = {"eval_interval_steps": 2, "keep_checkpoints": 1, "keep_best": 3}

    def kept() -> list[int]:
        return sorted({int(name.split("/")[1][-8:]) for name in contents(config) if name.startswith("checkpoints")})

    inputs = inputs_of(config, max_steps=8, **changes)
    fit(inputs, TrainContext())
    assert kept() == [2, 4, 6, 8]
    another_machine(inputs)
    fit(inputs_of(config, max_steps=10, **changes), TrainContext())
    assert kept() == [2, 4, 6, 10]
    another_machine(inputs)
    fit(inputs_of(config, max_steps=12, **changes), TrainContext())
    assert kept() == [2, 4, 12]


def test_a_work_folder_of_another_run_of_that_name_is_not_taken_for_it(config: TrainConfig, tmp_path: Path) -> None:
    inputs = inputs_of(config)
    fit(inputs, TrainContext())
    theirs = weights(inputs.folder)
    storage.remove(remote(config))
    elsewhere = tmp_path / "elsewhere"
    inputs.folder.path.rename(elsewhere)
    other = inputs_of(config, seed=5, max_steps=4)
    fit(other, TrainContext())
    ours = weights(other.folder)
    another_machine(other)
    elsewhere.rename(inputs.folder.path)
    again = inputs_of(config, seed=5, max_steps=4)
    assert [path.name for path in again.folder.checkpoints()] == ["step-00000004"]
    assert_equal(weights(again.folder), ours)
    (kept,) = again.folder.path.glob("checkpoints/step-00000008.*.aside")
    assert_equal(checkpoint.load_model(kept)[0].state_dict(), theirs)
    assert len(list(again.history.lines())) == len(list(other.history.lines()))


def test_what_a_driver_sent_before_its_workers_began_is_no_other_run_s(
    config: TrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drivers = inputs_of(config).folder
    drivers.path.mkdir(parents=True, exist_ok=True)
    (drivers.path / "mlflow.id").write_text("0123")
    drivers.push_record()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "of-the-workers"))
    workers_inputs = inputs_of(config)
    assert workers_inputs.folder.path != drivers.path
    fit(workers_inputs, TrainContext())
    drivers.fetch()
    assert not list(drivers.path.rglob("*.aside"))
    assert (drivers.path / "mlflow.id").read_text() == "0123"
    assert_equal(weights(drivers), weights(workers_inputs.folder))


def test_a_damaged_object_leads_to_the_checkpoint_before(config: TrainConfig) -> None:
    inputs = inputs_of(config)
    fit(inputs, TrainContext())
    expected = weights(inputs.folder)
    another_machine(inputs)
    (remote(config) / "checkpoints" / "step-00000008" / "optimizer.pt").write_bytes(b"torn")
    again = inputs_of(config)
    assert [path.name for path in again.folder.checkpoints()] == ["step-00000004"]
    fit(again, TrainContext())
    assert_equal(weights(again.folder), expected)
    assert not list(again.folder.path.rglob("*.partial"))


def test_a_request_to_stop_reaches_a_worker_on_another_machine(config: TrainConfig, tmp_path: Path) -> None:
    inputs = inputs_of(config)
    inputs.folder.path.mkdir(parents=True)
    elsewhere = RunFolder(tmp_path / "elsewhere", ObjectStoreMirror(remote(config)))
    assert not inputs.folder.is_stop_requested()
    inputs.folder.request_stop()
    assert elsewhere.is_stop_requested()
    inputs.folder.clear_requests()
    assert contents(config) == set()


def test_ray_writes_its_own_state_to_the_store(config: TrainConfig) -> None:
    path, system = inputs_of(config).folder.ray_storage()
    with system.open_output_stream(f"{path}/mark") as stream:  # type: ignore[attr-defined]
        stream.write(b"here")
    assert contents(config) == {".ray/mark"}
    storage.remove(remote(config) / ".ray")


def test_a_store_that_cannot_be_read_is_one_clear_line(config: TrainConfig) -> None:
    with pytest.raises(UserError, match="cannot read s3://no-such-bucket/runs/tiny"):
        inputs_of(config, output="s3://no-such-bucket/runs")
    with pytest.raises(UserError, match="needs the --name of a run"):
        parse_config(["--resume", "--output", config.output])


def test_a_store_that_refuses_to_be_looked_into_is_not_one_without_the_run(
    config: TrainConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    resume = ["--resume", "--output", config.output, "--name", config.name]
    assert parse_config(resume).resume  # there is none yet: it would begin
    fit(inputs_of(config), TrainContext())
    assert parse_config(resume).model.d_ff == 64
    system = type(remote(config).fs)
    real = system._lsdir

    async def refuse(self: Any, path: str, *args: Any, **options: Any) -> Any:
        if "step-" in path or options.get("prefix") == "step-":
            raise PermissionError("Access Denied")
        return await real(self, path, *args, **options)

    monkeypatch.setattr(system, "_lsdir", refuse)
    with pytest.raises(UserError, match=r"cannot read s3://.*Access Denied"):
        parse_config(resume)


def test_a_run_in_the_store_whose_checkpoints_are_damaged_does_not_begin_anew(config: TrainConfig) -> None:
    inputs = inputs_of(config)
    fit(inputs, TrainContext())
    resume = ["--resume", "--output", config.output, "--name", config.name]
    for name in ("step-00000004", "step-00000008"):
        (remote(config) / "checkpoints" / name / checkpoint.OPTIMIZER).write_bytes(b"")
    another_machine(inputs)
    again = inputs_of(parse_config(resume))
    with pytest.raises(UserError, match="cannot be read: take another --name"):
        refuse_conflicts(again, again.folder.latest_valid())
    for name in ("step-00000004", "step-00000008"):
        (remote(config) / "checkpoints" / name / "state.json").write_bytes(b"")
    with pytest.raises(UserError, match="no checkpoint of this run can be read"):
        parse_config(resume)


def test_a_folder_of_this_machine_is_no_store(tmp_path: Path) -> None:
    assert open_run(str(tmp_path), "one") == RunFolder(tmp_path / "one")
    assert open_run(f"file://{tmp_path}", "one") == RunFolder(tmp_path / "one")


@pytest.mark.slow
def test_ray_train_keeps_a_run_in_the_store(s3: Callable[..., Any], local_ray: Any, config: TrainConfig) -> None:
    result = run_training(config, is_quiet=True)
    assert result.kept_at == remote(config).as_posix()
    assert f"kept     {config.output}/tiny" in describe(result)
    files = {name for name in contents(config) if not name.startswith("checkpoints/")}
    right = ".lease/00000001.json"
    assert files == {
        "latest.txt",
        "best.txt",
        "metrics.jsonl",
        "summary.json",
        "loss.png",
        "run.id",
        "mlflow.id",
        right,
    }
    shutil.rmtree(result.best.parent)
    longer = parse_config(["--resume", "--output", config.output, "--name", "tiny", "--max-steps", "12"])
    assert run_training(longer, is_quiet=True).metrics.step == 12


def test_what_the_store_refused_once_is_there_after_the_next_checkpoint(
    config: TrainConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The best checkpoint is the one that was refused."""
    losses = iter([3.0, 2.0, 3.5, 3.6])

    def validate(trainer: Trainer) -> Evaluation:
        loss = next(losses)
        return Evaluation(val_loss=loss, val_perplexity=1.0, val_bits_per_byte=loss, step=trainer.step)

    monkeypatch.setattr(Trainer, "validate", validate)
    inputs = inputs_of(config, max_steps=16, eval_interval_steps=4, keep_checkpoints=1, keep_best=1)
    mirror = inputs.folder.mirror
    upload, uploads = mirror.upload, iter(range(100))

    def refuse_second(*given: Any) -> None:
        if next(uploads) == 1:
            raise OSError("not now")
        upload(*given)

    monkeypatch.setattr(mirror, "upload", refuse_second)
    assert fit(inputs, TrainContext()).best.step == 8
    another_machine(inputs)
    inputs.folder.fetch()
    assert checkpoint.load_state(inputs.folder.best).step == 8
    assert checkpoint.load_state(inputs.folder.latest).step == 16


def test_a_signal_is_not_taken_for_an_early_one_where_the_record_is_elsewhere(config: TrainConfig) -> None:
    assert workers._has_begun(inputs_of(config))()
