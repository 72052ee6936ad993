"""A replica whose model fails at every token, on a real Ray Serve: it is replaced."""

from pathlib import Path

import httpx
import pytest

from tests.serve.test_faults import SHORT, started, wait_for

BREAK = """
import os, sys, threading, time

def watch():
    order = os.environ["TEST_BREAK_FILE"]
    while True:
        time.sleep(0.2)
        engine = sys.modules.get("slm_ray.generation.engine")
        if engine is not None and any("ServeReplica" in word for word in _words()):
            try:
                os.rename(order, order + ".done")  # one replica takes it
            except OSError:
                continue
            engine.Engine._decode = lambda self: 1 / 0
            return

def _words():
    with open("/proc/self/cmdline") as file:
        return file.read().split("\\0")

threading.Thread(target=watch, daemon=True).start()
"""
"""Run at the start of each process of the server: a replica that finds the file has a broken backend from then on."""
pytestmark = [pytest.mark.ray, pytest.mark.slow]


def test_a_replica_whose_backend_fails_at_every_step_is_replaced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    order = tmp_path / "break"
    (tmp_path / "path").mkdir()
    (tmp_path / "path" / "sitecustomize.py").write_text(BREAK, encoding="utf-8")
    environment = {"PYTHONPATH": str(tmp_path / "path"), "TEST_BREAK_FILE": str(order)}
    with started(tmp_path, "--replicas 1 --rows 2", **environment) as server:
        first = server.line("serves tiny 1").split()[1]
        assert server.post(SHORT).status_code == 200
        order.touch()
        wait_for(lambda: not order.exists())
        broken = [server.post(SHORT).status_code for _ in range(4)]
        assert set(broken) <= {500, 503} and 500 in broken
        assert first in server.line("is gone")
        assert first not in server.line("serves tiny 1")
        wait_for(lambda: server.post(SHORT).status_code == 200)
        assert httpx.get(f"{server.url}/ready", timeout=60).status_code == 200
