"""`--help` of a command waits for no package that computes: importing them takes seconds."""

import subprocess
import sys

import pytest

from tests.support.paths import ROOT

HEAVY = {"torch", "ray", "mlflow", "pandas", "onnxruntime", "fastapi"}


@pytest.mark.parametrize(
    "script", ["slm_ray/train.py", "slm_ray/generate.py", "slm_ray/export.py", "serve/app.py", "infra/doctor.py"]
)
def test_help_imports_nothing_that_computes(script: str) -> None:
    words = [sys.executable, "-X", "importtime", str(ROOT / script), "--help"]
    done = subprocess.run(words, capture_output=True, text=True, check=True, cwd=ROOT)
    imported = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines()}
    assert "argparse" in imported
    assert imported & HEAVY == set()
