"""What a server's processes import when they start, and what starts at the same time."""

import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.paths import ROOT
from tests.support.tiny_model import write_tiny_model

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # Ray Serve uses deprecated features of pydantic
    from serve import deployment, ray_connection
    from serve.options import ServeConfig
    from serve.ray_connection import imported_meanwhile
    from slm_ray.errors import UserError

DRIVER = """
import sys, warnings
warnings.simplefilter("ignore")
import ray.cloudpickle
from serve import deployment
from serve.options import ServeConfig
from slm_ray.runs import verification
from slm_ray.tracking.registry import resolve_model

config = ServeConfig(model=sys.argv[1])
verification.verify(resolve_model(config.model, "sqlite:///none.db").path)
app = deployment.build_app(config, config.api_settings())
body = ray.cloudpickle.dumps(app._bound_deployment.func_or_class)
slow = {"torch", "onnx", "onnxruntime", "mlflow", "serve.replica", "serve.api.routes"}
print(sorted(slow & set(sys.modules)))
"""
CONNECTION = """
import sys
import serve.ray_connection
print(sorted({"ray.serve", "torch", "pandas", "fastapi"} & set(sys.modules)))
"""


@pytest.mark.parametrize("script", [DRIVER, CONNECTION])
def test_only_replicas_wait_for_torch_and_ray_starts_before_ray_serve_is_read(tmp_path: Path, script: str) -> None:
    model = write_tiny_model(tmp_path / "tiny")
    words = [sys.executable, "-c", script, str(model)]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)
    assert done.stdout == "[]\n", done.stderr


def test_modules_are_imported_while_the_block_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "read_meanwhile.py").write_text("import threading\nWHERE = threading.current_thread().name\n")
    (tmp_path / "broken_meanwhile.py").write_text("raise RuntimeError('it is broken')\n")
    with imported_meanwhile("broken_meanwhile", "absent_meanwhile", "read_meanwhile"):
        pass
    import read_meanwhile

    assert read_meanwhile.WHERE == "imports"
    with pytest.raises(RuntimeError, match="it is broken"):
        import broken_meanwhile  # noqa: F401


def test_what_is_imported_meanwhile_is_none_of_rays() -> None:
    words = [sys.executable, "-c", f"import sys, {', '.join(ray_connection.OF_RAY_SERVE)}; print('ray' in sys.modules)"]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)
    assert done.stdout == "False\n", done.stderr


@pytest.mark.parametrize(("cores", "expected"), [(1, "1"), (2, "1"), (3, None), (64, None)])
def test_no_process_is_started_ahead_that_nobody_uses(
    monkeypatch: pytest.MonkeyPatch, cores: int, expected: str | None
) -> None:
    """Ray starts as many as there are cores, and they stay."""
    with monkeypatch.context() as patch:
        patch.setattr(ray_connection.os, "environ", {})
        patch.setattr(ray_connection, "core_count", lambda: cores)
        patch.setattr(ray_connection.cluster, "connect", lambda: True)
        with ray_connection.ray_connection():
            assert ray_connection.os.environ.get(ray_connection.PRESTART) == expected


@pytest.fixture
def running(monkeypatch: pytest.MonkeyPatch) -> Iterator[threading.Event]:
    """Whether there is a controller."""
    event = threading.Event()
    monkeypatch.setattr(deployment, "is_serve_running", event.is_set)
    monkeypatch.setattr(deployment, "build_app", lambda *_: None)
    monkeypatch.setattr(deployment, "_reason", lambda: "")
    yield event


def test_replicas_are_started_while_the_proxy_starts(running: threading.Event, monkeypatch: pytest.MonkeyPatch) -> None:
    said, replica_is_up = [], threading.Event()

    def start(**options: object) -> None:
        said.append(options["proxy_location"])
        running.set()
        assert replica_is_up.wait(60)
        said.append("proxy")

    def run(*_: object, **__: object) -> str:
        said.append("replica")
        replica_is_up.set()
        return "handle"

    monkeypatch.setattr(deployment.serve, "start", start)
    monkeypatch.setattr(deployment.serve, "run", run)
    config = ServeConfig()
    assert deployment._deploy(config, config.api_settings()) == "handle"
    assert said == ["HeadOnly", "replica", "proxy"]


@pytest.mark.parametrize("has_controller", [False, True])
def test_a_proxy_that_does_not_start_is_said(
    running: threading.Event, monkeypatch: pytest.MonkeyPatch, has_controller: bool
) -> None:
    ran = []

    def start(**_: object) -> None:
        if has_controller:
            running.set()
            while not ran:
                time.sleep(0.01)
        raise RuntimeError("the port is taken")

    monkeypatch.setattr(deployment.serve, "start", start)
    monkeypatch.setattr(deployment.serve, "run", lambda *_, **__: ran.append(True))
    config = ServeConfig()
    with pytest.raises(UserError, match="could not be deployed: the port is taken"):
        deployment._deploy(config, config.api_settings())
    assert bool(ran) == has_controller
