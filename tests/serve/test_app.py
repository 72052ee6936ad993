"""The command: mistakes before Ray starts, and the whole of it once."""

import os
import signal
import socket
import subprocess
import sys
import time
import warnings
from pathlib import Path

import httpx
import psutil
import pytest

from serve.api.middleware import MAX_ARRIVING, MAX_BODIES, MAX_BODY_BYTES
from serve.api.settings import ApiSettings
from serve.replica_port import bind_replica_port
from slm_ray.distributed import cluster
from slm_ray.errors import UserError
from tests.support.paths import ROOT
from tests.support.ports import free_port
from tests.support.tiny_model import write_tiny_model

pytestmark = pytest.mark.ray


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("serve") / "tiny")


def start(*options: str, cwd: Path = ROOT) -> subprocess.Popen[str]:
    command = [sys.executable, str(ROOT / "serve" / "app.py"), *options]
    environment = os.environ | {"RAY_ADDRESS": "local"}
    return subprocess.Popen(
        command, cwd=cwd, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )


@pytest.mark.parametrize(
    "options, message",
    [
        (["--model", "nowhere"], "no model 'nowhere'"),
        (["--port", "0"], "port (0) must be between 1 and 65535"),
        (["--replicas", "0"], "replicas (0) must be at least 1"),
        (["--host", "192.0.2.1"], "cannot listen on 192.0.2.1 port 8000"),
    ],
)
def test_a_mistake_ends_before_ray_starts(
    model: Path, options: list[str], message: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Ray Serve uses deprecated features of pydantic
        from serve import app
    monkeypatch.setattr(cluster, "connect", lambda: pytest.fail("Ray must not start"))
    assert app.main(["--model", str(model), *options]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


def test_keys_are_read_once_and_no_process_inherits_them(
    model: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # as above
        from serve import app, deployment
    seen: list[object] = []

    def serving(_: object, settings: ApiSettings) -> None:
        seen.extend([settings.key_digests, os.environ.get("SLM_API_KEYS")])
        raise UserError("that is enough")

    monkeypatch.setattr(deployment, "serving", serving)
    monkeypatch.setenv("SLM_API_KEYS", "a-secret-of-many-letters")
    assert app.main(["--model", str(model), "--port", str(free_port())]) == 2
    assert "that is enough" in capsys.readouterr().err
    assert len(seen[0]) == 1 and seen[1] is None  # type: ignore[arg-type]


def test_serves_own_line_does_not_form_before_health() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # as above
        from serve import deployment
    assert deployment.SPARE_ONGOING >= MAX_ARRIVING + MAX_BODIES


def test_a_port_in_use_is_one_line_and_exit_code_2(model: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        process = start("--model", str(model), "--port", str(port))
        output, error = process.communicate(timeout=120)
    assert process.returncode == 2 and output == ""
    assert f"cannot listen on 127.0.0.1 port {port}" in error and error.count("\n") == 1


def wait_until_healthy(url: str, process: subprocess.Popen[str], within_s: float = 180) -> None:
    deadline = time.monotonic() + within_s
    while time.monotonic() < deadline and process.poll() is None:
        try:
            if httpx.get(f"{url}/health", timeout=5).status_code == 200:
                return
        except httpx.TransportError:
            pass
        time.sleep(0.2)
    process.kill()
    pytest.fail(f"not healthy: {process.communicate()}")


def test_a_replica_of_a_ray_whose_port_cannot_be_kept_is_not_started(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr("ray.serve._private.replica.add_port_to_grpc_server")
    with pytest.raises(UserError, match="would listen on every interface"):
        bind_replica_port()


@pytest.mark.slow
def test_the_command_serves_until_ctrl_c_and_leaves_no_process(model: Path, tmp_path: Path) -> None:
    url = f"http://127.0.0.1:{free_port()}"
    options = ["--port", url.rsplit(":", 1)[1], "--requests-per-minute", "20"]
    process = start("--model", str(model), *options, cwd=tmp_path)  # any folder will do
    children: list[psutil.Process] = []
    try:
        wait_until_healthy(url, process)
        answer = httpx.post(f"{url}/generate", json={"prompt": "Once", "max_tokens": 5, "seed": 1}, timeout=60)
        assert answer.status_code == 200 and answer.json()["story"].startswith("Once")
        assert httpx.post(f"{url}/generate", json={"prompt": "Once", "max_tokens": 0}, timeout=60).status_code == 422
        assert httpx.post(f"{url}/generate", content=b"x" * (MAX_BODY_BYTES + 1), timeout=60).status_code == 413
        assert httpx.get(f"{url}/model", timeout=60).json()["name"] == "tiny"
        made_up = [{"X-Forwarded-For": f"10.0.0.{number}"} for number in range(30)]
        assert 429 in [httpx.get(f"{url}/model", headers=own, timeout=60).status_code for own in made_up]
        children = psutil.Process(process.pid).children(recursive=True)
        listening = {c.laddr.ip for one in children for c in one.net_connections() if c.status == psutil.CONN_LISTEN}
        assert {ip.removeprefix("::ffff:") for ip in listening} == {"127.0.0.1"}
        assert process.stdout is not None
        assert process.stdout.readline().startswith(f"serving tiny step-12 at {url}")
        process.send_signal(signal.SIGINT)
        _, error = process.communicate(timeout=60)
        assert (process.returncode, error) == (130, "interrupted\n")
        assert psutil.wait_procs(children, timeout=30)[1] == []
    finally:
        for left in (psutil.Process(process.pid), *children) if process.poll() is None else children:
            if left.is_running():
                left.kill()
