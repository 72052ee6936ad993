"""What may befall a run: kills, hangs, signals, damage, a full disk, and other workers; and what is left of it."""

import contextlib
import dataclasses
import errno
import os
import random
import resource
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import ray
import torch
import yaml

from slm_ray import checkpoint, loop, tracking, worker_group
from slm_ray.config import TrainConfig
from slm_ray.errors import UserError
from slm_ray.history import History
from slm_ray.loop import fit
from slm_ray.preflight import load_task, parse_config, refuse_conflicts, resolve
from slm_ray.run_folder import RunFolder
from slm_ray.task import Surroundings, Task
from slm_ray.tracking import NullTracker
from slm_ray.train import run_training
from slm_ray.trainer import Trainer
from slm_ray.watchdog import Watchdog
from tests.ranks import fit_in_ranks, samples_by_step

ROOT = Path(__file__).resolve().parents[1]
FILES = [
    "complete.json",
    "state.json",
    "optimizer.pt",
    "model/config.json",
    "model/generation_config.json",
    "model/model.safetensors",
    "model/tokenizer.json",
    "model/tokenizer_config.json",
]


@pytest.fixture
def config(tiny_config: TrainConfig) -> TrainConfig:
    """The tiny run with dropout on, and no tracker."""
    model = dataclasses.replace(tiny_config.model, dropout=0.1)
    return dataclasses.replace(tiny_config, model=model, tracking_uri=tracking.OFF, sample_prompt="")


def task_of(config: TrainConfig, **changes: Any) -> Task:
    return load_task(resolve(dataclasses.replace(config, **changes), lambda: 1), NullTracker())


def folder_of(config: TrainConfig) -> RunFolder:
    return RunFolder(Path(config.output) / config.name)


def losses(folder: RunFolder, name: str = "train_loss") -> dict[int, float]:
    return dict(zip(*History(folder.path / "metrics.jsonl").series(name), strict=True))


def assert_same_run(folder: RunFolder, expected: RunFolder) -> None:
    """The same losses and the same weights, to the last bit."""
    assert losses(folder) == losses(expected)
    assert losses(folder, "val_loss") == losses(expected, "val_loss")
    ours, theirs = (checkpoint.load_model(one.latest)[0].state_dict() for one in (folder, expected))
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in ours.items())


def assert_no_orphans(folder: RunFolder) -> None:
    """Nothing but the run: its record, its links, and whole checkpoints, no more than it is to keep."""
    allowed = {"best", "latest", "checkpoints", "metrics.jsonl", "summary.json", "loss.png"}
    assert {path.name for path in folder.path.iterdir()} <= allowed
    assert len(folder.checkpoints()) <= 3
    assert folder.checkpoints() == sorted((folder.path / "checkpoints").iterdir())
    for path in folder.checkpoints():
        checkpoint.verify(path)


def messages(folder: RunFolder) -> list[str]:
    return [line["message"] for line in History(folder.path / "metrics.jsonl").lines() if "message" in line]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, tiny_data: Path) -> Iterator[Callable[[TrainConfig], RunFolder]]:
    """The uninterrupted run of a config with one worker, made once a module."""
    output = tmp_path_factory.mktemp("whole")
    made: dict[str, RunFolder] = {}

    def run(config: TrainConfig) -> RunFolder:
        key = f"run-{len(made)}"
        alone = dataclasses.replace(config, output=str(output), name="", workers=1)
        if str(alone) not in made:
            task = task_of(alone, name=key)
            fit(task, Surroundings())
            made[str(alone)] = task.folder
        return made[str(alone)]

    yield run


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("damage", ["flip", "truncate", "remove"])
def test_damage_to_any_file_of_a_checkpoint_leads_to_the_one_before(
    config: TrainConfig, whole: Callable[[TrainConfig], RunFolder], name: str, damage: str
) -> None:
    task = task_of(config)
    fit(task, Surroundings())
    path = task.folder.checkpoint_path(8) / name
    content = bytearray(path.read_bytes())
    if damage == "remove":
        path.unlink()
    elif damage == "truncate":
        path.write_bytes(content[: random.Random(name).randrange(len(content))])
    else:
        content[random.Random(name).randrange(len(content))] ^= 1
        path.write_bytes(content)
    fit(task, Surroundings())
    assert "resumed at step 4" in messages(task.folder)[-1]
    assert_same_run(task.folder, whole(config))
    assert_no_orphans(task.folder)


def test_every_file_of_a_checkpoint_is_damaged_in_these_tests(config: TrainConfig) -> None:
    task = task_of(config, max_steps=1)
    fit(task, Surroundings())
    found = {
        path.relative_to(task.folder.latest).as_posix() for path in task.folder.latest.rglob("*") if path.is_file()
    }
    assert found == set(FILES)


def test_damage_to_every_checkpoint_begins_anew(config: TrainConfig, whole: Callable[[TrainConfig], RunFolder]) -> None:
    task = task_of(config)
    fit(task, Surroundings())
    for path in task.folder.checkpoints():
        (path / checkpoint.OPTIMIZER).write_bytes(b"")
    fit(task, Surroundings())
    assert_same_run(task.folder, whole(config))
    assert_no_orphans(task.folder)


def test_a_damaged_best_checkpoint_is_replaced_by_the_best_of_the_others(config: TrainConfig) -> None:
    task = task_of(config, max_steps=12)
    fit(task, Surroundings())
    assert checkpoint.load_state(task.folder.best).step == 12
    (task.folder.best / checkpoint.OPTIMIZER).write_bytes(b"")
    assert task.folder.relink(8, {"step": 12.0})["step"] == 8
    assert checkpoint.load_state(task.folder.best).step == 8


@pytest.mark.parametrize("file", ["model.safetensors", "optimizer.pt", "state.json", "complete.json"])
def test_a_full_disk_costs_one_checkpoint_and_the_run_goes_on(
    config: TrainConfig, whole: Callable[[TrainConfig], RunFolder], file: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first checkpoint finds no room from one of its files on; the second one does."""
    real = checkpoint.write
    tries: list[int] = []

    def write(folder: Path, *rest: Any) -> None:
        tries.append(1)
        with pytest.MonkeyPatch.context() as patch:
            if len(tries) == 1:
                fill_disk_at(file, patch)
            real(folder, *rest)

    monkeypatch.setattr(checkpoint, "write", write)
    task = task_of(config)
    summary = fit(task, Surroundings())
    assert summary["status"] == loop.FINISHED
    assert any("could not be written (No space left on device)" in message for message in messages(task.folder))
    assert [path.name for path in task.folder.checkpoints()] == ["step-00000008"]
    assert_same_run(task.folder, whole(config))
    assert_no_orphans(task.folder)


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
    task = task_of(config)
    fit(task, Surroundings())
    expected = checkpoint.load_model(task.folder.latest)[0].state_dict()
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    longer = task_of(config, max_steps=12)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, before[1]))
    try:
        summary = fit(longer, Surroundings())
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert summary["status"] == loop.UNSAVED
    assert any("could not be written" in message for message in messages(task.folder))
    assert checkpoint.load_state(task.folder.latest).step == 8
    kept = checkpoint.load_model(task.folder.latest)[0].state_dict()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in kept.items())
    assert fit(longer, Surroundings())["status"] == loop.FINISHED
    assert_no_orphans(task.folder)


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
    assert [line["step"] for line in history.lines()] == [1, 3]


def test_another_number_of_workers_sees_the_same_samples_each_once(config: TrainConfig) -> None:
    """One worker, then two, then one again, stopped in the middle of an interval each time."""
    config = dataclasses.replace(
        config, max_steps=16, log_interval_steps=1, model=dataclasses.replace(config.model, dropout=0.0)
    )
    changed = dataclasses.replace(config, name="changed")
    alone = task_of(config, name="alone")
    fit(alone, Surroundings())
    batches = Trainer(alone, Surroundings(), "fp32", is_compiled=False).batches
    for world_size, stop_at in ((1, 5), (2, 10), (1, 0)):
        fit_in_ranks(changed, world_size, stop_at=stop_at)
    seen = samples_by_step(folder_of(changed))
    assert seen == {step: Counter(row.tobytes().hex() for row in batches.at(step)[0]) for step in range(16)}
    assert set(sum(seen.values(), Counter()).values()) == {1}, "a sample was seen twice in less than an epoch"
    assert losses(folder_of(changed)) == pytest.approx(losses(alone.folder), abs=1e-4)
    at_the_end = [checkpoint.load_state(one.latest) for one in (folder_of(changed), alone.folder)]
    assert at_the_end[0].metrics["val_loss"] == pytest.approx(at_the_end[1].metrics["val_loss"], abs=1e-4)


def test_elastic_workers_must_divide_the_batch_at_every_number(config: TrainConfig) -> None:
    with pytest.raises(UserError, match=r"batch_size \(8\) must be divisible .*3 x 1 = 3"):
        task_of(config, workers="1:4", max_failures=1)
    with pytest.raises(ValueError, match="max_failures is 0"):
        dataclasses.replace(config, workers="1:2", max_failures=0)
    for wrong in ("2:1", "0:2", "two", "1:", "-1"):
        with pytest.raises(ValueError, match="must be a number or MIN:MAX"):
            dataclasses.replace(config, workers=wrong, max_failures=1)


def test_the_command_line_takes_a_range_of_workers() -> None:
    assert parse_config(["--workers", "1:2"]).worker_range == (1, 2)
    assert parse_config(["--workers", "2"]).worker_range == (2, 2)
    with pytest.raises(UserError, match="must be a number or MIN:MAX"):
        parse_config(["--workers", "two"])


def test_a_run_is_resumed_on_other_stories_only_by_force(config: TrainConfig) -> None:
    task = task_of(config)
    fit(task, Surroundings())
    other = dataclasses.replace(task, data_fingerprint="of another data set")
    config = dataclasses.replace(task.config, resume=True)
    with pytest.raises(UserError, match="on its own data, or with --force"):
        refuse_conflicts(config, other)
    with pytest.raises(UserError, match=r"seed was 0 and is now 1.*--force"):
        refuse_conflicts(dataclasses.replace(config, seed=1), task)
    refuse_conflicts(dataclasses.replace(config, force=True, seed=1), other)
    optim = dataclasses.replace(config.optim, name="muon" if config.optim.name == "adamw" else "adamw")
    with pytest.raises(UserError, match="a resumed run keeps it"):
        refuse_conflicts(dataclasses.replace(config, force=True, optim=optim), task)
    shape = dataclasses.replace(config.model, d_ff=128)
    with pytest.raises(UserError, match="model was d_ff 64 and is now 128"):
        refuse_conflicts(dataclasses.replace(config, force=True, model=shape), task)


def test_samples_are_counted_at_the_batch_size_they_were_seen_at(config: TrainConfig) -> None:
    fit(task_of(config, max_steps=4), Surroundings())
    task = task_of(config, batch_size=4)
    fit(task, Surroundings())
    assert checkpoint.load_state(task.folder.latest).samples_seen == 4 * 8 + 4 * 4


def test_a_watchdog_barks_once_nothing_was_done_for_the_time_and_not_before() -> None:
    barked = threading.Event()
    watchdog = Watchdog(0.2)
    with watchdog.watching(barked.set):
        for _ in range(30):
            watchdog.beat()
            time.sleep(0.02)
        assert not barked.is_set()
        assert barked.wait(30)
    quiet = threading.Event()
    with Watchdog(0).watching(quiet.set):
        assert not quiet.wait(0.05)


SEED = int(os.environ.get("FAULT_SEED") or random.SystemRandom().randrange(10**6))


def worker_processes(of: int) -> list[psutil.Process]:
    """Ray Train's workers below a process, in the order in which they were started."""
    found = []
    for process in psutil.Process(of).children(recursive=True):
        with contextlib.suppress(psutil.Error):
            if "RayTrainWorker" in " ".join(process.cmdline()):
                found.append(process)
    return found


def wait_for_step(folder: RunFolder, step: int, timeout_s: float = 240) -> None:
    """Until the record has reached a step, in whichever attempt."""
    deadline = time.monotonic() + timeout_s
    while max(losses(folder), default=0) < step:
        assert time.monotonic() < deadline, f"step {step} was not reached; {messages(folder)}"
        time.sleep(0.01)


def strike(folder: RunFolder, plan: list[tuple[int, signal.Signals]], chance: random.Random) -> None:
    """Send each signal to one of the workers when the run has come to its step."""
    for step, sent in plan:
        wait_for_step(folder, step)
        if workers := worker_processes(os.getpid()):
            chance.choice(workers).send_signal(sent)


@pytest.mark.slow
def test_two_workers_killed_and_hung_at_random_steps_end_as_if_nothing_had_happened(
    config: TrainConfig, local_ray: Any
) -> None:
    chance = random.Random(SEED)
    steps = sorted(chance.sample(range(6, 90), 2))
    plan = list(zip(steps, chance.sample([signal.SIGKILL, signal.SIGSTOP], 2), strict=True))
    print(f"FAULT_SEED={SEED}: {plan}")
    config = dataclasses.replace(
        config, workers=2, max_steps=120, log_interval_steps=1, eval_interval_steps=6, max_failures=8, hang_timeout_s=12
    )
    fit_in_ranks(dataclasses.replace(config, name="whole"), 2)
    whole = folder_of(dataclasses.replace(config, name="whole"))
    for path in whole.path.glob("samples-*"):
        path.unlink()
    striker = threading.Thread(target=strike, args=(folder_of(config), plan, chance))
    striker.start()
    run_training(config, is_quiet=True)
    striker.join()
    said = messages(folder_of(config))
    print(said)
    assert sum("resumed at step" in message or "from the start" in message for message in said) >= 1 + len(plan)
    assert_same_run(folder_of(config), whole)
    assert_no_orphans(folder_of(config))


class Command:
    """`python slm_ray/train.py` as a user runs it."""

    def __init__(self, config: TrainConfig, *more: str) -> None:
        options = ["--output", config.output, "--name", config.name, *more]
        environment = dict(os.environ) | {"RAY_ADDRESS": "local", "PYTHONWARNINGS": "default", "PYTHONPATH": str(ROOT)}
        self.process = subprocess.Popen(
            [sys.executable, str(ROOT / "slm_ray" / "train.py"), *options],
            env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True,
        )  # fmt: skip

    def __enter__(self) -> "Command":
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.communicate()

    def strike(self, number: signal.Signals) -> tuple[int, str]:
        """Send a signal to the driver alone; gives its exit code and what it said, once its processes are gone.

        After a kill Ray's own two agents take a minute and more to notice; they are not waited for.
        """
        family = psutil.Process(self.process.pid).children(recursive=True)
        if number == signal.SIGKILL:
            family = [process for process in family if "Agent" not in " ".join(process.cmdline()[:1])]
        self.process.send_signal(number)
        said = self.process.communicate(timeout=120)[1]
        _, left = psutil.wait_procs(family, timeout=60)
        assert not left, f"processes left behind: {left}"
        return self.process.returncode, said


def step_of_latest(folder: RunFolder) -> int:
    newest = folder.newest_whole()
    return checkpoint.load_state(newest).step if newest else 0


@pytest.mark.slow
def test_a_driver_that_is_terminated_killed_and_interrupted_is_resumed_as_if_nothing_had_happened(
    config: TrainConfig, tmp_path: Path, whole: Callable[[TrainConfig], RunFolder]
) -> None:
    chance = random.Random(SEED)
    print(f"FAULT_SEED={SEED}")
    config = dataclasses.replace(config, max_steps=600, log_interval_steps=1, eval_interval_steps=50)
    folder = folder_of(config)
    file = tmp_path / "run.yaml"
    file.write_text(yaml.safe_dump(dataclasses.asdict(config)), encoding="utf-8")

    with Command(config, "--config", str(file)) as command:
        wait_for_step(folder, chance.randrange(2, 100))
        code, said = command.strike(signal.SIGTERM)
    assert code == 143, said
    assert f"stopped, with a checkpoint of step {step_of_latest(folder)}: `--resume --name tiny` goes on" in said
    assert "Traceback" not in said
    assert step_of_latest(folder) == max(losses(folder))

    before = step_of_latest(folder)
    with Command(config, "--resume") as command:
        wait_for_step(folder, before + chance.randrange(20, 100))
        code, said = command.strike(signal.SIGKILL)
    assert code == -signal.SIGKILL
    assert max(losses(folder)) - step_of_latest(folder) <= 50

    before = max(losses(folder))
    with Command(config, "--resume") as command:
        wait_for_step(folder, before + 1)
        code, said = command.strike(signal.SIGINT)
    assert (code, said.splitlines()[-1]) == (130, "interrupted"), said
    assert "Traceback" not in said
    assert step_of_latest(folder) == max(losses(folder))

    assert run_in_process(config) == loop.FINISHED
    assert_same_run(folder, whole(config))
    assert_no_orphans(folder)


def run_in_process(config: TrainConfig) -> str:
    """The rest of a run, without Ray."""
    return str(fit(task_of(config), Surroundings())["status"])


@pytest.fixture
def two_nodes() -> Iterator[Any]:
    """A cluster of a head without room for workers, to which nodes of one CPU may come and go."""
    from ray.cluster_utils import Cluster

    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
    ray.init(cluster.address, log_to_driver=False, logging_level="ERROR")
    yield cluster
    ray.shutdown()
    cluster.shutdown()


@pytest.mark.slow
def test_elastic_workers_go_on_when_a_node_leaves_and_when_it_comes_back(
    config: TrainConfig, two_nodes: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(worker_group, "RESIZE_CHECK_S", 2.0)
    config = dataclasses.replace(
        config,
        workers="1:2", max_steps=100_000, log_interval_steps=1, eval_interval_steps=40, max_failures=8,
        model=dataclasses.replace(config.model, dropout=0.0),
    )  # fmt: skip
    folder = folder_of(config)
    alone = task_of(config, name="alone")
    nodes = [two_nodes.add_node(num_cpus=1) for _ in range(2)]  # by the main thread, as Ray wants it
    ends: list[BaseException] = []

    def train() -> None:
        try:
            run_training(config, is_quiet=True)
        except BaseException as error:
            ends.append(error)

    thread = threading.Thread(target=train, daemon=True)
    thread.start()
    wait_for_message(folder, "2 worker(s)", 1)
    wait_for_step(folder, 60)
    two_nodes.remove_node(nodes[1], allow_graceful=False)
    wait_for_message(folder, "1 worker(s)", 1)
    two_nodes.add_node(num_cpus=1)
    wait_for_message(folder, "2 worker(s)", 2)
    wait_for_step(folder, max(losses(folder)) + 5)
    folder.request_stop()
    thread.join(120)
    print(messages(folder))
    assert "was asked to stop" in str(ends)
    last = step_of_latest(folder)
    steps = iter(range(1, 10**9))
    fit(alone, Surroundings(is_stop_requested=lambda: next(steps) == last))
    assert sorted(losses(folder)) == list(range(1, last + 1))
    assert losses(folder) == pytest.approx(losses(alone.folder), abs=1e-3)
    assert_no_orphans(folder)


def wait_for_message(folder: RunFolder, text: str, times: int, timeout_s: float = 240) -> None:
    """Until the record has said something so many times."""
    deadline = time.monotonic() + timeout_s
    while sum(text in message for message in messages(folder)) < times:
        assert time.monotonic() < deadline, f"{text!r} did not come; {messages(folder)}"
        time.sleep(0.05)
