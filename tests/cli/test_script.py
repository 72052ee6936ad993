"""How a script finds the modules of its checkout, in this process and in those that it starts."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.paths import ROOT

PROBE = """
import os, signal, sys
import slm_ray
from slm_ray.cli.signals import end_now
def main():
    print(slm_ray.__file__)
    print(sys.path[0])
    print(os.environ["PYTHONPATH"])
    print(signal.getsignal(signal.SIGINT) is end_now)
"""
SCRIPT = """
if __name__ == "__main__":
    import sys
    from pathlib import Path
    sys.path[0] = str(Path(__file__).resolve().parents[1])
    from slm_ray.cli.script import run
    run("tool.probe")
"""
WITH_ONNX = """
import sys
sys.path.insert(0, sys.argv[1])
from slm_ray.cli.script import set_default_environment
set_default_environment()
import onnxruntime
"""
SCRIPTS = [
    *(f"slm_ray/{name}.py" for name in ("train", "generate", "evaluate", "export")),
    *("pipelines/prepare.py", "tune/sweep.py", "serve/app.py"),
]


def checkout(folder: Path) -> Path:
    """A checkout with a script `tool/script.py`, whose `main` tells what it sees."""
    (folder / "tool").mkdir(parents=True)
    (folder / "tool" / "script.py").write_text(SCRIPT)
    (folder / "tool" / "probe.py").write_text(PROBE)
    return folder


def seen_by(script: Path, cwd: Path) -> list[str]:
    environment = os.environ | {"PYTHONPATH": str(ROOT)}  # as an installed slm_ray
    command = [sys.executable, str(script)]
    done = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, check=True)
    return done.stdout.splitlines()


@pytest.mark.parametrize("has_own", [True, False], ids=["own slm_ray", "only the installed one"])
def test_a_script_uses_its_own_checkout_from_wherever_it_is_called(has_own: bool, tmp_path: Path) -> None:
    root = checkout(tmp_path / "checkout")
    if has_own:
        (root / "slm_ray").symlink_to(ROOT / "slm_ray")
    seen = seen_by(root / "tool" / "script.py", tmp_path)
    package = root if has_own else ROOT
    assert seen == [str(package / "slm_ray" / "__init__.py"), str(root), f"{root}{os.pathsep}{ROOT}", "True"]


def test_the_folder_of_the_script_is_not_on_the_path(tmp_path: Path) -> None:
    root = checkout(tmp_path / "checkout")
    (root / "tool" / "model.py").touch()
    (root / "tool" / "probe.py").write_text("def main():\n    import model\n")
    done = subprocess.run(
        [sys.executable, str(root / "tool" / "script.py")],
        env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert "No module named 'model'" in done.stderr


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_script_puts_its_checkout_on_the_path_before_it_imports(script: str) -> None:
    """Also where no slm_ray is installed, or another one."""
    head = (ROOT / script).read_text(encoding="utf-8").partition("    run(")[0]
    assert "    sys.path[0] = str(Path(__file__).resolve().parents[1])" in head
    assert head.index("sys.path[0]") < head.index("from slm_ray")


def test_without_an_installed_slm_ray_a_script_runs(tmp_path: Path) -> None:
    root = checkout(tmp_path / "checkout")
    (root / "slm_ray").symlink_to(ROOT / "slm_ray")
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    command = [sys.executable, "-S", str(root / "tool" / "script.py")]  # without site-packages
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[1] == str(root)


def test_onnx_runtime_sends_nothing_and_keeps_no_number_of_its_own(tmp_path: Path) -> None:
    """1.32 starts a client for its maker on Linux too, unless it is told otherwise before its import."""
    environment = {name: value for name, value in os.environ.items() if name != "ORT_DISABLE_TELEMETRY"}
    command = [sys.executable, "-c", WITH_ONNX, str(ROOT)]
    subprocess.run(command, env=environment | {"TMPDIR": str(tmp_path)}, check=True, timeout=60)
    assert list(tmp_path.iterdir()) == []
