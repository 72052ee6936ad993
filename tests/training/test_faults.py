"""Damage to a checkpoint, a full disk, other workers, other settings: what is left of a run, and how it goes on."""

import dataclasses
import errno
import json
import os
import random
import resource
import shutil
import threading
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch

from slm_ray.config.schema import TrainConfig
from slm_ray.distributed.watchdog import Watchdog
from slm_ray.errors import UserError
from slm_ray.runs import checkpoint
from slm_ray.runs.checkpoint import Checkpoint
from slm_ray.runs.history import History
from slm_ray.runs.outcome import RunStatus
from slm_ray.runs.run_folder import RunFolder, repair_links
from slm_ray.runs.verification import UnreadableCheckpointError
from slm_ray.train import parse_config
from slm_ray.training import checkpointing
from slm_ray.training.context import TrainContext
from slm_ray.training.loop import fit
from slm_ray.training.preflight import refuse_conflicts
from slm_ray.training.run_log import RunLog
from slm_ray.training.trainer import Trainer
from tests.support.fault_runs import (
    assert_no_orphans,
    assert_same_run,
    folder_of,
    inputs_of,
    losses,
    messages,
    run_without_faults,
    with_dropout,
)
from tests.support.ranks import fit_in_ranks, samples_by_step

FILES = [
    "complete.json",
    "state.json",
    "optimizer.pt",
    "model/config.json",
    "model/generation_config.json",
    "model/model.safetensors",
    "model/tokenizer.json",
    "model/tokenizer_config.json",
    "model/chat_template.jinja",
]


@pytest.fixture
def config(tiny_config: TrainConfig) -> TrainConfig:
    """The tiny run, with dropout on."""
    return with_dropout(tiny_config)


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("damage", ["flip", "truncate", "remove"])
def test_damage_to_any_file_of_a_checkpoint_leads_to_the_one_before(
    config: TrainConfig, name: str, damage: str
) -> None:
    inputs = inputs_of(config)
    fit(inputs, TrainContext())
    path = inputs.folder.checkpoint_path(8) / name
    content = bytearray(path.read_bytes())
    if damage == "remove":
        path.unlink()
    elif damage == "truncate":
        path.write_bytes(content[: random.Random(name).randrange(len(content))])
    else:
        content[random.Random(name).randrange(len(content))] ^= 1
        path.write_bytes(content)
    fit(inputs, TrainContext())
    assert any("resumed at step 4" in message for message in messages(inputs.folder))
    assert_same_run(inputs.folder, run_without_faults(config))
    assert_no_orphans(inputs.folder)


def test_every_file_of_a_checkpoint_is_damaged_in_these_tests(config: TrainConfig) -> None:
    inputs = inputs_of(config, max_steps=1)
    fit(inputs, TrainContext())
    found = {
        path.relative_to(inputs.folder.latest).as_posix() for path in inputs.folder.latest.rglob("*") if path.is_file()
    }
    assert found == set(FILES)


def test_damage_to_every_checkpoint_is_refused_and_nothing_is_removed(config: TrainConfig) -> None:
    inputs = inputs_of(config)
    fit(inputs, TrainContext())
    for path in inputs.folder.checkpoints():
        (path / checkpoint.OPTIMIZER).write_bytes(b"")
    before = contents(inputs.folder)
    with pytest.raises(UserError, match="holds a run whose checkpoints cannot be read"):
        fit(inputs, TrainContext())
    assert contents(inputs.folder) == before


def contents(folder: RunFolder) -> dict[str, bytes]:
    return {str(path.relative_to(folder.path)): path.read_bytes() for path in folder.path.rglob("*") if path.is_file()}


@pytest.mark.parametrize("number", [errno.EIO, errno.ESTALE, errno.EACCES])
@pytest.mark.parametrize("name", ["complete.json", "model/model.safetensors", "checkpoints"])
def test_what_the_disk_does_not_give_now_is_not_taken_for_lost(
    config: TrainConfig, name: str, number: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The group fails, and is started again by whoever watches it; the next one finds all that was there."""
    inputs = inputs_of(config)
    fit(inputs, TrainContext())
    before = contents(inputs.folder)
    longer = inputs_of(config, max_steps=12)
    with monkeypatch.context() as patch:
        refuse(patch, name, OSError(number, os.strerror(number)))
        with pytest.raises(UnreadableCheckpointError, match=os.strerror(number)):
            fit(longer, TrainContext())
    assert contents(inputs.folder) == before
    assert fit(longer, TrainContext()).status == RunStatus.FINISHED
    assert any("resumed at step 8" in message for message in messages(inputs.folder))


def refuse(patch: pytest.MonkeyPatch, name: str, error: OSError) -> None:
    """Let every read of that file, or listing of that folder, fail."""

    def failing(method: str) -> None:
        real = getattr(Path, method)

        def read(self: Path, *args: Any, **options: Any) -> Any:
            if str(self).endswith(name):
                raise error
            return real(self, *args, **options)

        patch.setattr(Path, method, read)

    for method in ("open", "read_text", "read_bytes", "iterdir"):
        failing(method)


def test_a_corrupt_checkpoint_is_put_aside_and_not_removed(config: TrainConfig) -> None:
    inputs = inputs_of(config)
    fit(inputs, TrainContext())
    (inputs.folder.checkpoint_path(8) / checkpoint.OPTIMIZER).write_bytes(b"torn")
    fit(inputs, TrainContext())
    aside = inputs.folder.path / "checkpoints" / "step-00000008.corrupt"
    assert (aside / checkpoint.OPTIMIZER).read_bytes() == b"torn"
    assert [checkpoint.load_state(path).step for path in inputs.folder.checkpoints()] == [4, 8]


def test_a_damaged_best_checkpoint_is_replaced_by_the_best_of_the_others(config: TrainConfig) -> None:
    inputs = inputs_of(config, max_steps=12)
    fit(inputs, TrainContext())
    assert checkpoint.load_state(inputs.folder.best).step == 12
    (inputs.folder.best / checkpoint.OPTIMIZER).write_bytes(b"")
    latest = Checkpoint.open(inputs.folder.checkpoint_path(8))
    known = dataclasses.replace(latest.state, best=checkpoint.load_state(inputs.folder.best).metrics)
    best = repair_links(inputs.folder, Checkpoint(latest.path, known))
    assert best is not None and best.step == 8
    assert checkpoint.load_state(inputs.folder.best).step == 8


@pytest.mark.parametrize("file", ["model.safetensors", "optimizer.pt", "state.json", "complete.json"])
def test_a_full_disk_costs_one_checkpoint_and_the_run_goes_on(
    config: TrainConfig, file: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The checkpoint of step 4 finds no room from one of its files on; the next one does."""
    real = checkpoint.write
    tries: list[int] = []

    def write(folder: Path, *rest: Any) -> None:
        tries.append(1)
        with pytest.MonkeyPatch.context() as patch:
            if len(tries) == 1:
                fill_disk_at(file, patch)
            real(folder, *rest)

    monkeypatch.setattr(checkpoint, "write", write)
    inputs = inputs_of(config)
    summary = fit(inputs, TrainContext())
    assert summary.status == RunStatus.FINISHED
    (said,) = [message for message in messages(inputs.folder) if "could not be written" in message]
    assert said == "step 4: its checkpoint could not be written (No space left on device), the one before it is kept"
    assert [path.name for path in inputs.folder.checkpoints()] == ["step-00000008"]
    assert_same_run(inputs.folder, run_without_faults(config))
    assert_no_orphans(inputs.folder)


def fill_disk_at(file: str, patch: pytest.MonkeyPatch) -> None:
    """Let the write of one file end half-way, for want of room."""

    def full(path: Path) -> None:
        path.write_bytes(b"half")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    if file == "model.safetensors":
        patch.setattr("safetensors.torch.save_file", lambda _, path, **__: full(Path(path)))
    elif file == "optimizer.pt":
        patch.setattr(torch, "save", lambda _, path: full(Path(path)))
    else:
        real = checkpoint._write_json
        patch.setattr(
            checkpoint, "_write_json", lambda path, content: full(path) if path.name == file else real(path, content)
        )


def test_a_disk_that_stays_full_keeps_the_last_good_checkpoint_and_says_so(config: TrainConfig) -> None:
    """No file may grow beyond a limit, as the system has it; torch and safetensors meet it in C++ and Rust."""
    inputs = inputs_of(config)
    fit(inputs, TrainContext())
    expected = checkpoint.load_model(inputs.folder.latest)[0].state_dict()
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    longer = inputs_of(config, max_steps=12)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, before[1]))
    try:
        summary = fit(longer, TrainContext())
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert summary.status == RunStatus.UNSAVED
    assert any(text.startswith("step 12: its checkpoint could not be written") for text in messages(inputs.folder))
    assert checkpoint.load_state(inputs.folder.latest).step == 8
    kept = checkpoint.load_model(inputs.folder.latest)[0].state_dict()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in kept.items())
    assert fit(longer, TrainContext()).status == RunStatus.FINISHED
    assert_no_orphans(inputs.folder)


def test_a_record_on_a_full_disk_loses_whole_lines(tmp_path: Path) -> None:
    history = History(tmp_path / "metrics.jsonl")
    history.append({"step": 1})
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (history.path.stat().st_size + 5, before[1]))
    try:
        history.append({"step": 2, "train_loss": 1.0})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    history.append({"step": 3})
    first, third, told = history.lines()
    assert [first["step"], third["step"]] == [1, 3]
    assert "misses 1 line(s)" in told["message"]


def test_another_number_of_workers_sees_the_same_samples_each_once(config: TrainConfig) -> None:
    """One worker, then two, then one again, stopped in the middle of an interval each time."""
    config = dataclasses.replace(
        config, max_steps=16, log_interval_steps=1, model=dataclasses.replace(config.model, dropout=0.0)
    )
    changed = dataclasses.replace(config, name="changed")
    alone = inputs_of(config, name="alone")
    fit(alone, TrainContext())
    batches = Trainer(alone, TrainContext(), "fp32", is_compiled=False).batches
    for world_size, stop_at in ((1, 5), (2, 10), (1, 0)):
        fit_in_ranks(changed, world_size, stop_at=stop_at)
    seen = samples_by_step(folder_of(changed))
    assert seen == {step: Counter(row.tobytes().hex() for row in batches.at(step).inputs) for step in range(16)}
    assert set(sum(seen.values(), Counter()).values()) == {1}, "a sample was seen twice in less than an epoch"
    assert losses(folder_of(changed)) == pytest.approx(losses(alone.folder), abs=1e-4)
    at_the_end = [checkpoint.load_state(one.latest) for one in (folder_of(changed), alone.folder)]
    assert at_the_end[0].metrics.val_loss == pytest.approx(at_the_end[1].metrics.val_loss, abs=1e-4)


def test_elastic_workers_must_divide_the_batch_at_every_number(config: TrainConfig) -> None:
    with pytest.raises(UserError, match=r"batch_size \(8\) must be divisible .*3 x 1 = 3"):
        inputs_of(config, workers="1:4", max_failures=1)
    with pytest.raises(ValueError, match="max_failures is 0"):
        dataclasses.replace(config, workers="1:2", max_failures=0)
    for wrong in ("2:1", "0:2", "two", "1:", "-1"):
        with pytest.raises(ValueError, match="must be a number or MIN:MAX"):
            dataclasses.replace(config, workers=wrong, max_failures=1)


def test_the_command_line_takes_a_range_of_workers() -> None:
    assert parse_config(["--workers", "1:2"]).worker_range == (1, 2)
    assert parse_config(["--workers", "2"]).worker_range == (2, 2)
    with pytest.raises(UserError, match=r"^workers \(.*must be a number or MIN:MAX"):
        parse_config(["--workers", "two"])


def test_a_run_is_resumed_on_other_stories_only_by_force(config: TrainConfig) -> None:
    inputs = inputs_of(config)
    fit(inputs, TrainContext())
    latest = inputs.folder.latest_valid()

    def resume(data_fingerprint: str = inputs.data_fingerprint, **changes: Any) -> None:
        changed = dataclasses.replace(inputs.config, resume=True, **changes)
        refuse_conflicts(dataclasses.replace(inputs, config=changed, data_fingerprint=data_fingerprint), latest)

    with pytest.raises(UserError, match="on its own data, or with --force"):
        resume("of another data set")
    with pytest.raises(UserError, match=r"seed was 0 and is now 1.*--force"):
        resume(seed=1)
    resume("of another data set", force=True, seed=1)
    optim = dataclasses.replace(config.optim, name="muon" if config.optim.name == "adamw" else "adamw")
    with pytest.raises(UserError, match="a resumed run keeps it"):
        resume(force=True, optim=optim)
    shape = dataclasses.replace(inputs.config.model, d_ff=128)
    with pytest.raises(UserError, match=r"model\.d_ff was 64 and is now 128: a resumed run keeps it; leave it out"):
        resume(force=True, model=shape)


def test_samples_are_counted_at_the_batch_size_they_were_seen_at(config: TrainConfig) -> None:
    fit(inputs_of(config, max_steps=4), TrainContext())
    inputs = inputs_of(config, batch_size=4)
    fit(inputs, TrainContext())
    assert checkpoint.load_state(inputs.folder.latest).samples_seen == 4 * 8 + 4 * 4


def test_a_watchdog_barks_once_nothing_was_done_for_the_time_and_not_before() -> None:
    barked = threading.Event()
    watchdog = Watchdog(0.2)
    with watchdog.watching(barked.set):
        for _ in range(30):
            watchdog.heartbeat()
            time.sleep(0.02)
        assert not barked.is_set()
        assert barked.wait(30)
    quiet = threading.Event()
    with Watchdog(0).watching(quiet.set):
        assert not quiet.wait(0.05)


def test_a_run_whose_checkpoints_are_all_damaged_is_not_written_over(config: TrainConfig) -> None:
    inputs = inputs_of(config)
    fit(inputs, TrainContext())
    for path in inputs.folder.checkpoints():
        (path / checkpoint.OPTIMIZER).write_bytes(b"")
    with pytest.raises(UserError, match="cannot be read: take another --name"):
        refuse_conflicts(inputs, inputs.folder.latest_valid())


def test_a_run_is_not_asked_to_end_before_the_step_it_is_at(config: TrainConfig) -> None:
    inputs = inputs_of(config)
    fit(inputs, TrainContext())
    shorter = dataclasses.replace(inputs, max_steps=3, config=dataclasses.replace(inputs.config, resume=True))
    with pytest.raises(UserError, match="is at step 8 already, and was asked to end at 3"):
        refuse_conflicts(shorter, inputs.folder.latest_valid())


def test_a_disk_slower_than_the_hang_timeout_is_no_hang(config: TrainConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    write, barked = checkpoint.write, threading.Event()
    monkeypatch.setattr(checkpoint, "write", lambda *rest: (time.sleep(1.5), write(*rest)))
    monkeypatch.setattr(checkpointing, "POLL_S", 0.05)
    watchdog = Watchdog(0.7)
    inputs = inputs_of(config)
    fit(inputs_of(config, name="warm", max_steps=1), TrainContext())  # what is slow at the first step is none of it
    with watchdog.watching(barked.set):
        assert fit(inputs, TrainContext(heartbeat=watchdog.heartbeat)).status == RunStatus.FINISHED
    assert not barked.is_set()


def test_the_other_ranks_wait_with_heartbeats_until_the_first_has_written(config: TrainConfig) -> None:
    writing, heartbeats = iter([1.0, 1.0, 0.0]), list[int]()
    context = TrainContext(
        rank=1,
        world_size=2,
        all_reduce_sum=lambda values: values + next(writing),
        heartbeat=lambda: heartbeats.append(1),
    )
    trainer = Trainer(inputs_of(config, batch_size=8), context, "fp32", is_compiled=False)
    assert checkpointing.Checkpointer(trainer, RunLog()).wait_together() is None
    assert len(heartbeats) == 2


def test_a_barrier_is_not_watched() -> None:
    barked = threading.Event()
    watchdog = Watchdog(0.2)
    with watchdog.watching(barked.set):
        with watchdog.paused():
            assert not barked.wait(0.6)
        assert barked.wait(30)


def test_a_checkpoint_of_a_later_version_is_refused_and_kept(config: TrainConfig) -> None:
    """Its digests are right: what this version cannot read is not corrupt."""
    inputs = inputs_of(config)
    fit(inputs, TrainContext())
    newest = inputs.folder.checkpoint_path(8)
    record = json.loads((newest / "state.json").read_text())
    (newest / "state.json").write_text(json.dumps(record | {"of_a_later_version": 7}))
    (newest / "complete.json").unlink()
    checkpoint.commit_partial(newest.rename(newest.with_name("later.partial")), newest)
    before = contents(inputs.folder)
    with pytest.raises(UserError, match=r"state.json cannot be read by this version: .*of_a_later_version"):
        fit(inputs, TrainContext())
    assert contents(inputs.folder) == before


def test_what_a_killed_writer_of_the_summary_left_is_removed(config: TrainConfig) -> None:
    inputs = inputs_of(config)
    fit(inputs, TrainContext())
    (inputs.folder.path / ".summary.json.123-abc").write_text("half")
    fit(inputs, TrainContext())
    assert_no_orphans(inputs.folder)


def test_a_copy_that_the_user_put_beside_the_checkpoints_is_left_alone(config: TrainConfig) -> None:
    inputs = inputs_of(config)
    fit(inputs, TrainContext())
    copy = inputs.folder.path / "checkpoints" / "step-00000004-keep"
    shutil.copytree(inputs.folder.checkpoint_path(4), copy)
    assert fit(dataclasses.replace(inputs, max_steps=16), TrainContext()).status == RunStatus.FINISHED
    assert (copy / "complete.json").is_file()
