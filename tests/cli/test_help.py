"""`--help` of a command waits for no package that computes: importing them takes seconds."""

import subprocess
import sys

import pytest

from tests.support.paths import ROOT

HEAVY = {
    *("torch", "ray", "mlflow", "apache_beam", "pandas", "onnx", "onnxruntime", "fastapi", "optuna", "scipy"),
    *("matplotlib", "transformers", "datasets"),
}
COMMANDS = (
    *("pipelines/prepare.py", "slm_ray/train.py", "slm_ray/evaluate.py", "slm_ray/evaluate.py --explain MODEL"),
    *("slm_ray/generate.py", "slm_ray/export.py", "tune/sweep.py", "serve/app.py", "infra/doctor.py", "infra/demo.py"),
    *("infra/check_endpoint.py", "infra/container_packages.py", "infra/container_steps.py", "infra/local_cluster.py"),
)


@pytest.mark.parametrize("command", COMMANDS)
def test_help_imports_nothing_that_computes(command: str) -> None:
    script, *words = command.split()
    words = [sys.executable, "-X", "importtime", str(ROOT / script), *words, "--help"]
    done = subprocess.run(words, capture_output=True, text=True, check=True, cwd=ROOT)
    assert "usage: " in done.stdout
    imported = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines()}
    assert "argparse" in imported
    assert imported & HEAVY == set()


def test_every_command_is_asked() -> None:
    folders = ("pipelines", "slm_ray", "tune", "serve", "infra")
    scripts = (path for folder in folders for path in (ROOT / folder).rglob("*.py"))
    commands = {
        path.relative_to(ROOT).as_posix() for path in scripts if "\nif __name__ ==" in path.read_text(encoding="utf-8")
    }
    assert commands - {command.split()[0] for command in COMMANDS} == {"slm_ray/evaluation/harness.py"}  # lm_eval's own
