"""A process of a trial starts its like, idle, and the next one asked for is that: it has run nothing before."""

import importlib
import os
import subprocess
import sys
import time
from typing import Any

import psutil
import pytest

from slm_ray import internals
from slm_ray.distributed import successors
from tests.support.paths import ROOT

pytestmark = pytest.mark.ray
WITHIN_S = 60


class Trial:
    """What runs in a process of its own."""

    def __init__(self) -> None:
        self.seen = 0

    def run(self) -> tuple[int, int]:
        """The process, and how often anything ran in this object."""
        self.seen += 1
        return os.getpid(), self.seen

    def start_another(self) -> None:
        """As a worker and a controller of a trial do."""
        successors.start(["wave"])

    def has_imported(self) -> bool:
        """Whether what was ordered is there."""
        return "wave" in sys.modules


def idle_processes() -> set[int]:
    """Processes of this Ray that wait for work."""
    family = psutil.Process().children(recursive=True)
    return {
        one.pid for one in family if one.status() != psutil.STATUS_ZOMBIE and "ray::IDLE" in " ".join(one.cmdline())
    }


def trial(ray: Any, variable: str) -> Any:
    runtime = {"env_vars": {"SLM_RAY_TEST": variable, successors.HOOK_VARIABLE: successors.HOOK}}
    return ray.remote(num_cpus=0.1, runtime_env=runtime)(Trial).remote()


def wait_for_one_more(before: set[int]) -> int:
    deadline = time.monotonic() + WITHIN_S
    while not (new := idle_processes() - before):
        assert time.monotonic() < deadline, "no process was started"
        time.sleep(0.1)
    (pid,) = new
    return pid


def test_the_next_process_of_the_same_environment_is_the_one_that_waits(local_ray: Any) -> None:
    first = trial(local_ray, "a")
    pid, _ = local_ray.get(first.run.remote())
    before = idle_processes()
    local_ray.get(first.start_another.remote())
    waiting = wait_for_one_more(before)
    other = trial(local_ray, "b")
    assert local_ray.get(other.run.remote())[0] not in (pid, waiting), "of another environment"
    assert not local_ray.get(first.has_imported.remote()) and not local_ray.get(other.has_imported.remote())
    second = trial(local_ray, "a")
    assert local_ray.get(second.run.remote()) == (waiting, 1)
    assert local_ray.get(second.has_imported.remote())
    for one in (first, second, other):
        local_ray.kill(one)


def test_where_a_ray_has_no_such_call_nothing_is_started(local_ray: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(internals, "find", lambda name, default=None: default)
    monkeypatch.setattr(successors.ray, "nodes", lambda: pytest.fail("the node is asked"))
    successors.start(["wave"])


def test_a_node_that_does_not_answer_is_no_failure(local_ray: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(successors, "_ask_node", lambda *_: (_ for _ in ()).throw(RuntimeError("no answer")))
    successors.start(["wave"])


def test_what_is_ordered_can_be_imported_and_the_hook_is_there() -> None:
    for module in (*successors.WORKER_MODULES, *successors.CONTROLLER_MODULES):
        importlib.import_module(module)
    module, _, name = successors.HOOK.rpartition(".")
    assert getattr(importlib.import_module(module), name) is successors.import_ahead


def test_what_is_imported_asks_for_no_gpu() -> None:
    """Which of them a worker sees is set when it is wanted, and CUDA would have looked before."""
    script = f"""
import torch
def asked(*_):
    raise SystemExit("CUDA was asked")
for name in ("is_available", "device_count", "init", "_lazy_init", "current_device"):
    setattr(torch.cuda, name, asked)
import importlib
for module in {[*successors.CONTROLLER_MODULES, *successors.WORKER_MODULES, "mlflow"]}:
    importlib.import_module(module)
"""
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")


def test_only_runs_of_a_sweep_look_for_processes_that_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    passed_on = internals.find("ray.train.v2._internal.constants:ENV_VARS_TO_PROPAGATE")
    with successors.allowed():
        assert os.environ[successors.HOOK_VARIABLE] == successors.HOOK
        assert successors.HOOK_VARIABLE in passed_on
    assert successors.HOOK_VARIABLE not in {*os.environ, *passed_on}
