"""What a signal does to a command, without any training."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from slm_ray.cli.script import set_default_environment
from slm_ray.cli.signals import Signals, StoppedError, ending_on_sigterm
from tests.support.paths import ROOT

pytestmark = pytest.mark.ray


def test_a_stop_that_cannot_be_asked_for_ends_at_once_and_says_why() -> None:
    def refuse() -> None:
        raise PermissionError(13, "Permission denied")

    with (
        pytest.raises(StoppedError, match=r"cannot be asked to save \(Permission denied\): .* lost") as caught,
        Signals(refuse).catching(),
    ):
        os.kill(os.getpid(), signal.SIGTERM)
    assert caught.value.exit_code == 143


def test_sigterm_outside_of_the_training_is_a_stop_like_any_other() -> None:
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(StoppedError, match="outside of the training") as caught, ending_on_sigterm():
        os.kill(os.getpid(), signal.SIGTERM)
    assert caught.value.exit_code == 143
    assert signal.getsignal(signal.SIGTERM) == before


def test_sigterm_is_told_from_ctrl_c_where_ray_raises_an_interrupt_of_its_own() -> None:
    with pytest.raises(StoppedError, match="outside of the training") as caught, ending_on_sigterm():
        try:
            os.kill(os.getpid(), signal.SIGTERM)
            signal.pause()
        except StoppedError:
            raise KeyboardInterrupt from None
    assert caught.value.exit_code == 143
    with pytest.raises(StoppedError, match=r"--resume") as caught, ending_on_sigterm():
        try:
            os.kill(os.getpid(), signal.SIGTERM)
            signal.pause()
        except StoppedError:
            raise StoppedError("`--resume` goes on", signal.SIGINT) from None
    assert caught.value.exit_code == 143
    with pytest.raises(StoppedError) as caught, ending_on_sigterm():
        raise StoppedError("Ctrl-C", signal.SIGINT)
    assert caught.value.exit_code == 130


def test_an_end_at_once_first_does_what_the_block_asks_for() -> None:
    code = """
import os, signal
from slm_ray.cli.signals import ending_on_interrupt
with ending_on_interrupt(lambda: os.write(1, b"removed")):
    os.kill(os.getpid(), signal.SIGINT)
    print("goes on")
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout, done.stderr) == (130, "removed", "interrupted\n")


def test_ray_does_not_take_sigterm_for_itself(tmp_path: Path) -> None:
    code = """
import os, signal
from slm_ray.cli.script import set_default_environment
set_default_environment()
from slm_ray.distributed import cluster
from slm_ray.cli.signals import StoppedError, ending_on_sigterm
with ending_on_sigterm():
    cluster.connect()
    try:
        os.kill(os.getpid(), signal.SIGTERM)
    except StoppedError:
        print("stopped")
"""
    root = str(ROOT)
    environment = os.environ | {"PYTHONPATH": root, "RAY_ADDRESS": "local"}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=120
    )
    assert (done.returncode, done.stdout) == (0, "stopped\n"), done.stderr[-2000:]


@pytest.mark.parametrize(("address", "stays_on_loopback"), [(None, True), ("", True), ("local", True), ("a:1", False)])
def test_a_ray_of_ones_own_listens_on_loopback_only(
    address: str | None, stays_on_loopback: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", raising=False)
    monkeypatch.delenv("RAY_ADDRESS")
    if address is not None:
        monkeypatch.setenv("RAY_ADDRESS", address)
    set_default_environment()
    assert ("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER" in os.environ) == stays_on_loopback
    monkeypatch.delenv("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", raising=False)
