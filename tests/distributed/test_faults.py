"""Workers and drivers that are killed, hang, are stopped, leave and come back: the run ends as if they had not."""

import contextlib
import dataclasses
import gc
import os
import random
import signal
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import ray
import yaml

from slm_ray.cli.command import command
from slm_ray.config.schema import TrainConfig
from slm_ray.distributed import workers
from slm_ray.distributed.driver import run_training
from slm_ray.runs.outcome import ERROR, RunStatus
from slm_ray.runs.run_folder import RunFolder
from slm_ray.training.context import TrainContext
from slm_ray.training.loop import fit
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
from tests.support.paths import ROOT
from tests.support.ranks import fit_in_ranks

pytestmark = [
    pytest.mark.ray,
    pytest.mark.filterwarnings("ignore::ResourceWarning"),  # Ray's Cluster leaves a socket open
]


@pytest.fixture
def config(tiny_config: TrainConfig) -> TrainConfig:
    """The tiny run, with dropout on."""
    return with_dropout(tiny_config)


@pytest.fixture(scope="module")
def cluster() -> Iterator[Any]:
    """A head without room for workers, and two nodes of one CPU each, which may go and come."""
    from ray.cluster_utils import Cluster

    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
    for _ in range(2):
        cluster.add_node(num_cpus=1)
    ray.init(cluster.address, log_to_driver=False, logging_level="ERROR")
    yield cluster
    ray.shutdown()
    cluster.shutdown()
    del cluster
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)
        gc.collect()


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
    """Send each signal to one of the workers, or to all, when the run has come to its step.

    Where all of them hang there is none left to notice it, but Ray's own watch over them.
    """
    for number, (step, sent) in enumerate(plan):
        wait_for_message(folder, " worker(s), ", number + 1)  # the group has started again, and its record been cut
        wait_for_step(folder, step)
        workers = worker_processes(os.getpid())
        for worker in chance.sample(workers, chance.randint(1, len(workers))):
            worker.send_signal(sent)


@pytest.mark.slow
def test_two_workers_killed_and_hung_at_random_steps_end_as_if_nothing_had_happened(
    config: TrainConfig, cluster: Any
) -> None:
    chance = random.Random(SEED)
    steps = sorted(chance.sample(range(6, 34), 2))
    plan = list(zip(steps, chance.sample([signal.SIGKILL, signal.SIGSTOP], 2), strict=True))
    print(f"FAULT_SEED={SEED}: {plan}")
    config = dataclasses.replace(
        config, workers=2, max_steps=48, log_interval_steps=1, eval_interval_steps=6, max_failures=8, hang_timeout_s=12
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
    latest = folder.latest_valid()
    return latest.state.step if latest else 0


@pytest.mark.slow
def test_a_driver_that_is_terminated_and_one_that_is_killed_are_resumed_as_if_nothing_had_happened(
    config: TrainConfig, tmp_path: Path
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

    folder.clear_requests()  # as every driver does first; the rest is run without Ray
    assert fit(inputs_of(config), TrainContext()).status == RunStatus.FINISHED
    assert_same_run(folder, run_without_faults(config))
    assert_no_orphans(folder)


@pytest.mark.slow
def test_workers_lost_more_often_than_allowed_end_the_run_with_one_line_and_lose_no_checkpoint(
    config: TrainConfig, cluster: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    config = dataclasses.replace(config, max_steps=2_000, log_interval_steps=1, max_failures=1)
    folder = folder_of(config)
    codes: list[int] = []

    @command
    def train() -> int:
        run_training(config, is_quiet=True)
        return 0

    thread = threading.Thread(target=lambda: codes.append(train()), daemon=True)
    thread.start()
    for attempt in (1, 2):
        wait_for_message(folder, " worker(s), ", attempt)
        wait_for_step(folder, 10 * attempt)
        for worker in worker_processes(os.getpid()):
            worker.kill()
    thread.join(240)
    assert codes == [2]
    latest = folder.latest_valid()
    assert latest is not None and latest.state.step >= 4
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert line.startswith("error: the workers failed too often: ")
    assert line.endswith(f"(all of it in {folder.path / ERROR}); --resume continues from {latest.path.name}")
    assert "Traceback" in (folder.path / ERROR).read_text(encoding="utf-8")
    assert sum(" worker(s), " in message for message in messages(folder)) == 2
    config = dataclasses.replace(config, max_steps=latest.state.step + 4)  # the rest is run without Ray
    assert fit(inputs_of(config), TrainContext()).status == RunStatus.FINISHED
    assert max(losses(folder)) == config.max_steps


@pytest.mark.slow
def test_elastic_workers_go_on_when_a_node_leaves_and_when_it_comes_back(
    config: TrainConfig, cluster: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(workers, "RESIZE_CHECK_S", 2.0)
    config = dataclasses.replace(
        config,
        workers="1:2", max_steps=100_000, log_interval_steps=1, eval_interval_steps=40, max_failures=8,
        model=dataclasses.replace(config.model, dropout=0.0),
    )  # fmt: skip
    folder = folder_of(config)
    alone = inputs_of(config, name="alone")
    ends: list[BaseException] = []

    def train() -> None:
        try:
            run_training(config, is_quiet=True)
        except BaseException as error:
            ends.append(error)

    thread = threading.Thread(target=train, daemon=True)
    thread.start()
    wait_for_message(folder, "2 worker(s)", 1)
    wait_for_step(folder, 30)
    cluster.remove_node(sorted(cluster.worker_nodes, key=lambda node: node.node_id)[0], allow_graceful=False)
    wait_for_message(folder, "1 worker(s)", 1)
    cluster.add_node(num_cpus=1)  # by the main thread, as Ray wants it
    wait_for_message(folder, "2 worker(s)", 2)
    wait_for_step(folder, max(losses(folder)) + 5)
    folder.request_stop()
    thread.join(120)
    print(messages(folder))
    assert "was asked to stop" in str(ends)
    last = step_of_latest(folder)
    steps = iter(range(1, 10**9))
    fit(alone, TrainContext(is_stop_requested=lambda: next(steps) == last))
    assert sorted(losses(folder)) == list(range(1, last + 1))
    ours, theirs = losses(folder), losses(alone.folder)
    assert ours == pytest.approx(theirs, abs=1e-4)  # as the README promises; measured: 5e-7 in 68 steps
    assert_no_orphans(folder)


def wait_for_message(folder: RunFolder, text: str, times: int, timeout_s: float = 240) -> None:
    """Until the record has said something so many times."""
    deadline = time.monotonic() + timeout_s
    while sum(text in message for message in messages(folder)) < times:
        assert time.monotonic() < deadline, f"{text!r} did not come; {messages(folder)}"
        time.sleep(0.05)
