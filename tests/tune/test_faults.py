"""Trials that fail, diverge and are killed, and a sweep whose driver is killed: what the table says in the end."""

import csv
import dataclasses
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml

from slm_ray.config.schema import TrainConfig
from slm_ray.runs.run_folder import RunFolder
from slm_ray.tracking import mlflow_runs
from slm_ray.tracking.tracker import NullTracker
from slm_ray.training.context import TrainContext
from slm_ray.training.inputs import load_inputs
from slm_ray.training.loop import fit
from slm_ray.training.preflight import resolve
from tests.support.paths import ROOT
from tune import sweep as sweep_module
from tune import trials as trials_module
from tune.config import SweepConfig
from tune.sweep import main, run_config

pytestmark = pytest.mark.ray

SEED = int(os.environ.get("FAULT_SEED") or random.SystemRandom().randrange(10**6))


def sweep_of(config: TrainConfig, **changes: Any) -> SweepConfig:
    shared = {field.name: getattr(config, field.name) for field in dataclasses.fields(TrainConfig)}
    own = {"tracking_uri": mlflow_runs.OFF, "register": "", "name": "s", "final": False, "resume": True}
    return SweepConfig(**(shared | own | changes))


def rows(folder: Path) -> dict[str, dict[str, str]]:
    with (folder / "results.csv").open(encoding="utf-8") as file:
        return {f"{row['lr']} {row['d_ff']}": row for row in csv.DictReader(file)}


@pytest.mark.slow
def test_trials_that_fail_diverge_and_are_killed_are_rows_and_the_others_go_on(
    tiny_config: TrainConfig, local_ray: Any, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    sweep = sweep_of(tiny_config, trial_steps=4, lr=(1e-2, 1e6), d_ff=(32, 64))
    real = trials_module.train_trial

    def struck(plain: Mapping[str, Any], parent_run_id: str, tracking_uri: str) -> None:
        if plain["name"] == "lr0.01-dff64":
            raise OSError(28, "No space left on device")
        if plain["name"] == "lr1e+06-dff64":
            os.kill(os.getpid(), signal.SIGKILL)
        real(plain, parent_run_id, tracking_uri)

    monkeypatch.setattr(trials_module, "train_trial", struck)
    monkeypatch.setattr(sweep_module, "parse_config", lambda _: sweep)
    capfd.readouterr()
    assert main([]) == 0
    said = capfd.readouterr()
    print(said.out, said.err)
    folder = Path(sweep.output) / sweep.name
    table = rows(folder)
    assert {name: row["status"] for name, row in table.items()} == {
        "0.01 32": "finished", "0.01 64": "failed", "1e+06 32": "diverged", "1e+06 64": "failed",
    }  # fmt: skip
    assert "the loss" in table["1e+06 32"]["reason"] or "the gradient" in table["1e+06 32"]["reason"]
    assert int(table["1e+06 32"]["step"]) > 0
    assert "No space left on device" in table["0.01 64"]["reason"]
    assert "its process was killed" in table["1e+06 64"]["reason"]
    for name in ("lr0.01-dff64", "lr1e+06-dff64"):
        assert str(folder / "trials" / f"{name}.log") in said.out
    assert "No space left on device" in (folder / "trials" / "lr0.01-dff64.log").read_text()
    assert "2 of 4 trials failed: `--resume --name s` tries them again" in said.out
    assert "best: lr 0.01, d_ff 32" in said.out
    assert "Traceback" not in said.out + said.err

    monkeypatch.setattr(trials_module, "train_trial", real)  # the same command again
    diverged_at = (folder / "trials" / "lr1e+06-dff32" / "summary.json").stat().st_mtime_ns
    assert main([]) == 0
    again = rows(folder)
    assert {name: row["status"] for name, row in again.items()} == {
        "0.01 32": "finished", "0.01 64": "finished", "1e+06 32": "diverged", "1e+06 64": "diverged",
    }  # fmt: skip
    assert (folder / "trials" / "lr1e+06-dff32" / "summary.json").stat().st_mtime_ns == diverged_at
    assert not (folder / "trials" / "lr0.01-dff64.log").exists()

    hopeless = dataclasses.replace(sweep, lr=(1e6,))
    monkeypatch.setattr(sweep_module, "parse_config", lambda _: hopeless)
    capfd.readouterr()
    assert main([]) == 2  # all have ended before: no Ray
    assert "error: all 2 trials diverged" in capfd.readouterr().err.splitlines()[-1]


@pytest.mark.slow
def test_a_sweep_whose_driver_is_killed_ends_with_the_same_table_by_the_same_command(
    tiny_config: TrainConfig, tmp_path: Path
) -> None:
    chance = random.Random(SEED)
    print(f"FAULT_SEED={SEED}")
    config = dataclasses.replace(tiny_config, tracking_uri=mlflow_runs.OFF, sample_prompt="", log_interval_steps=1)
    steps = 400
    expected = {}
    for lr in (1e-2, 1e-3):
        point = run_config(
            sweep_of(config), lr, 32, name=f"alone-{lr:g}", max_steps=steps, eval_interval_steps=50, resume=False
        )
        fit(load_inputs(resolve(point, lambda _: 1), NullTracker()), TrainContext())
        best = RunFolder(Path(point.output) / point.name).latest_valid()
        assert best is not None
        assert best.state.best is not None
        expected[f"{lr:g} 32"] = (str(best.state.best.step), f"{best.state.best.val_loss:.6f}")

    file = tmp_path / "sweep.yaml"
    file.write_text(yaml.safe_dump(dataclasses.asdict(config) | {"eval_interval_steps": 50}), encoding="utf-8")
    words = ["--config", str(file), "--resume", "--output", config.output, "--name", "s", "--no-final"]
    words += ["--trial-steps", str(steps), "--lr", "1e-2", "1e-3", "--d-ff", "32"]
    environment = dict(os.environ) | {"RAY_ADDRESS": "local", "PYTHONPATH": str(ROOT)}
    folder = RunFolder(Path(config.output) / "s" / "trials" / "lr0.01-dff32")

    def start() -> "subprocess.Popen[str]":
        command = [sys.executable, str(ROOT / "tune" / "sweep.py"), *words]
        return subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True, start_new_session=True)

    with start() as process:
        deadline = time.monotonic() + 240
        while not folder.checkpoints():
            assert time.monotonic() < deadline
            assert process.poll() is None
            time.sleep(0.02)
        time.sleep(chance.uniform(0, 3))
        family = psutil.Process(process.pid).children(recursive=True)
        process.kill()
        process.communicate()
    agents = ("ray::Dashboard", "ray::RuntimeEnv")  # Ray's own take a minute and more to notice
    psutil.wait_procs([one for one in family if not one.name().startswith(agents)], timeout=30)
    with start() as process:
        errors = process.communicate(timeout=400)[1]
    assert process.returncode == 0, errors
    table = rows(folder.path.parents[1])
    assert {name: (row["step"], row["val_loss"]) for name, row in table.items()} == expected
