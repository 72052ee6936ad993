"""A server started by a user without name and home, below a TMPDIR that is too long for sockets."""

import signal
import subprocess
import sys
import time
from pathlib import Path

import httpx
import psutil
import pytest

from tests.support import nobody
from tests.support.listening import addresses_of
from tests.support.paths import ROOT
from tests.support.ports import free_port
from tests.support.tiny_model import write_tiny_model

pytestmark = pytest.mark.ray


def answer_of(url: str, process: "subprocess.Popen[str]", within_s: float = 240) -> httpx.Response:
    """Of `/generate`, as soon as there is one."""
    deadline = time.monotonic() + within_s
    while process.poll() is None and time.monotonic() < deadline:
        try:
            found = httpx.post(f"{url}/generate", json={"prompt": "Once", "max_tokens": 5, "seed": 1}, timeout=60)
            if found.status_code == 200:
                return found
        except httpx.TransportError:
            pass
        time.sleep(0.2)
    pytest.fail("no answer in time")


@pytest.mark.slow
def test_a_user_without_name_and_home_serves(tmp_path: Path) -> None:
    folder, model = nobody.folder_of_nobody(tmp_path / "job"), write_tiny_model(tmp_path / "tiny")
    port = free_port()
    command = [sys.executable, str(ROOT / "serve" / "app.py"), "--model", str(model), "--port", str(port)]
    said = tmp_path / "said"
    with (
        said.open("w", encoding="utf-8") as stream,
        subprocess.Popen(
            [*nobody.as_nobody(), *command], cwd=folder, env=nobody.environment_of_nobody(folder), text=True,
            stdout=stream, stderr=subprocess.STDOUT,
        ) as process,
    ):  # fmt: skip
        children: list[psutil.Process] = []
        try:
            answer = answer_of(f"http://127.0.0.1:{port}", process)
            children = psutil.Process(process.pid).children(recursive=True)
            assert answer.json()["story"].startswith("Once")
            assert addresses_of(process.pid) == {"127.0.0.1"}
            if nobody.as_nobody():
                assert {child.uids().real for child in children} == {nobody.UID}
            process.send_signal(signal.SIGTERM)
            assert process.wait(120) == 0
        finally:
            print(said.read_text(encoding="utf-8"))
            for left in [process, *children]:
                if left.is_running() if isinstance(left, psutil.Process) else left.poll() is None:
                    left.kill()
    assert "Traceback" not in said.read_text(encoding="utf-8")
