"""`make demo`: what it says when something is in the way. The demo itself runs the four commands, tested elsewhere."""

import importlib.util
import re
import shlex
import socket
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

from pipelines import options
from tests.support.paths import ROOT
from tune import sweep
from tune.config import space_of
from tune.space import n_points

pytestmark = pytest.mark.ray


@pytest.fixture(scope="module")
def demo() -> ModuleType:
    spec = importlib.util.spec_from_file_location("demo", ROOT / "infra" / "demo.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_a_port_in_use_is_one_clear_line_before_anything_starts(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        command = [sys.executable, str(ROOT / "infra" / "demo.py"), "--port", str(port), "--once"]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 2
    assert done.stderr == f"error: port {port} on 127.0.0.1 is in use: `make demo PORT=8001`\n"
    assert done.stdout == ""


def test_its_commands_are_ones_that_the_scripts_accept(demo: ModuleType) -> None:
    _, settings = options.parse(shlex.split(demo.PREPARE)[1:])
    assert settings.source == ("sample",)
    config = sweep.parse_config(shlex.split(demo.SWEEP)[1:])
    assert n_points(space_of(config)) == 4
    assert config.workers == 2
    config.check_batch(2)


def test_a_failed_step_is_named(demo: ModuleType, capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(
        demo.DemoError, match=re.escape("exit code 2, see above: python slm_ray/train.py --config none")
    ):
        demo._run("slm_ray/train.py --config none")
