"""A Ray that hangs while it is stopped: the process ends all the same, as it would have ended."""

import os
import signal
import subprocess
import sys

import pytest

from tests.support.paths import ROOT

HANGS = """
import threading
from serve.shutdown import shutdown_deadline
from slm_ray.errors import UserError

try:
    {reason}
finally:
    with shutdown_deadline({seconds}):
        print("hangs", flush=True)
        while True:
            try:
                threading.Event().wait()  # as Ray waits for a cluster that was interrupted while it started
            except BaseException:
                pass
"""
REAL = """
import contextlib, threading, warnings
warnings.simplefilter("ignore")
import ray
from serve import deployment, ray_connection
from serve.options import ServeConfig
from slm_ray.errors import UserError

ray_connection.cluster.connect = lambda: True
ray_connection.GRACE_S = 0.2
deployment.check_no_other_serve = lambda: None
ray.shutdown = threading.Event().wait

def fail(*_):
    raise UserError("the model could not be deployed: it is no model")

deployment._deploy = fail
config = ServeConfig()
with deployment.serving(config, config.api_settings()):
    pass
"""


def ending(script: str) -> tuple[int, str]:
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, timeout=120)
    return done.returncode, done.stderr


@pytest.mark.parametrize(
    "reason, code, said",
    [
        ("raise UserError('it is no model')", 2, "error: it is no model\n"),
        ("raise RuntimeError('no more memory')", 1, "error: no more memory\n"),
        ("raise SystemExit(0)", 0, ""),
        ("raise KeyboardInterrupt", 130, "interrupted\n"),
    ],
)
def test_a_shutdown_that_hangs_ends_as_its_reason_would_have(reason: str, code: int, said: str) -> None:
    assert ending(HANGS.format(reason=reason, seconds=0.2)) == (code, said)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_second_signal_ends_it_at_once(number: signal.Signals) -> None:
    script = HANGS.format(reason="raise KeyboardInterrupt", seconds=600)
    with subprocess.Popen(
        [sys.executable, "-c", script], cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as process:
        assert process.stdout is not None and process.stderr is not None
        assert process.stdout.readline() == "hangs\n"
        os.kill(process.pid, number)
        assert process.wait(60) == 130
        assert process.stderr.read() == "interrupted\n"


@pytest.mark.ray
def test_a_ray_that_does_not_stop_does_not_keep_a_failed_start() -> None:
    code, said = ending(REAL)
    assert code == 2
    assert said.splitlines()[-1] == "error: the model could not be deployed: it is no model"
