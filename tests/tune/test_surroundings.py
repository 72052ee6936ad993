"""A sweep by a user without name and home, below a TMPDIR that is too long for sockets."""

import csv
import dataclasses
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from slm_ray.config.schema import TrainConfig
from slm_ray.tracking import mlflow_runs
from tests.support import nobody
from tests.support.paths import ROOT

pytestmark = pytest.mark.ray


@pytest.mark.slow
def test_a_user_without_name_and_home_sweeps(tiny_config: TrainConfig, tmp_path: Path) -> None:
    folder = nobody.folder_of_nobody(tmp_path / "job")
    config = dataclasses.replace(
        tiny_config,
        output="runs",
        tracking_uri=mlflow_runs.OFF,
        sample_prompt="",
        max_steps=2,
        eval_interval_steps=2,
        name="",
    )
    (tmp_path / "sweep.yaml").write_text(yaml.safe_dump(dataclasses.asdict(config)), encoding="utf-8")
    words = ["--config", str(tmp_path / "sweep.yaml"), "--name", "s", "--no-final", "--trial-steps", "2"]
    command = [sys.executable, str(ROOT / "tune" / "sweep.py"), *words, "--lr", "1e-3", "1e-2", "--d-ff", "64"]
    environment = nobody.environment_of_nobody(folder)
    done = subprocess.run(
        [*nobody.as_nobody(), *command], cwd=folder, env=environment, capture_output=True, text=True, timeout=300
    )
    print(done.stdout, done.stderr)
    assert done.returncode == 0
    assert "Traceback" not in done.stdout + done.stderr
    with (folder / "runs" / "s" / "results.csv").open(encoding="utf-8") as file:
        assert [row["status"] for row in csv.DictReader(file)] == ["finished", "finished"]
    owner = nobody.UID if nobody.as_nobody() else os.getuid()
    assert (folder / "runs").stat().st_uid == owner
