"""`ray job submit -- python slm_ray/train.py` on a head of the test's own, started as the README says."""

import contextlib
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from slm_ray.runs.run_folder import RunFolder
from tests.support.listening import addresses_of
from tests.support.paths import ROOT
from tests.support.ports import free_port

pytestmark = pytest.mark.ray

TINY = "--model.n_layers 1 --model.d_model 32 --model.n_heads 2 --model.d_ff 32 --model.seq_len 32 --batch-size 8"
RUN = f"--name job --workers 1 --max-steps 4 --compile off --precision fp32 --tracking-uri none {TINY}"
WITHIN_S = 120


def environment() -> dict[str, str]:
    """As README: a token, and loopback only. The job finds the test's Python first on the path."""
    path = os.pathsep.join((str(Path(sys.executable).parent), os.environ["PATH"]))
    closed = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "5" * 64, "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0"}
    hidden = {"RAY_ADDRESS", "RAY_API_SERVER_ADDRESS", "RAY_TMPDIR", "TMPDIR"}
    return {name: value for name, value in os.environ.items() if name not in hidden} | closed | {"PATH": path}


@pytest.fixture
def head() -> Iterator[tuple[int, str]]:
    """Process id of `ray start --head` with ports and a folder of its own, and the address of its dashboard."""
    dashboard = free_port()
    ports = {"port": free_port(), "ray-client-server-port": free_port(), "dashboard-agent-listen-port": free_port()}
    with tempfile.TemporaryDirectory(prefix="slm-", ignore_cleanup_errors=True) as folder:  # short, for the sockets
        options = [f"--{name}={port}" for name, port in ports.items()]
        options += [f"--dashboard-port={dashboard}", f"--temp-dir={folder}", "--num-cpus=2", "--block"]
        command = [sys.executable, "-m", "ray.scripts.scripts", "start", "--head", "--disable-usage-stats", *options]
        process = subprocess.Popen(
            command, cwd=ROOT, env=environment(), stdout=subprocess.DEVNULL, start_new_session=True
        )
        try:
            yield process.pid, f"http://127.0.0.1:{dashboard}"
        finally:
            family = [*psutil.Process(process.pid).children(recursive=True)] if process.poll() is None else []
            process.kill()  # SIGTERM would have it wait half a minute for what may still run on it
            process.wait(60)
            for left in family:
                with contextlib.suppress(psutil.NoSuchProcess):
                    left.kill()
            assert not psutil.wait_procs(family, timeout=20)[1]


def submit(address: str, line: str) -> "subprocess.CompletedProcess[str]":
    """Submit a job and wait for its end, once the head takes jobs."""
    command = [sys.executable, "-m", "ray.scripts.scripts", "job", "submit", "--address", address, "--"]
    deadline = time.monotonic() + WITHIN_S
    while True:
        done = subprocess.run(
            [*command, *line.split()], env=environment(), capture_output=True, text=True, timeout=300, check=False
        )
        if done.returncode == 0 or "Failed to connect" not in done.stderr or time.monotonic() > deadline:
            return done
        time.sleep(0.5)


@pytest.mark.slow
def test_a_submitted_job_trains_and_its_head_listens_on_loopback_only(
    head: tuple[int, str], tiny_data: Path, tmp_path: Path
) -> None:
    pid, address = head
    done = submit(address, f"python slm_ray/train.py --data {tiny_data} --output {tmp_path} {RUN}")
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    assert f"latest   {tmp_path / 'job' / 'latest'}" in done.stdout
    state = RunFolder(tmp_path / "job").latest_state()
    assert state is not None and state.step == 4
    assert addresses_of(pid) == {"127.0.0.1"}
