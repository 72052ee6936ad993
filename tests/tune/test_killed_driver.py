"""A sweep whose driver is killed, and two sweeps of one name: by their real commands."""

import csv
import dataclasses
import os
import random
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

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
from tune.outcomes import validations

pytestmark = pytest.mark.ray

SEED = int(os.environ.get("FAULT_SEED") or random.SystemRandom().randrange(10**6))
RATES, RUNG, STEPS = (1e-2, 1e-3), 100, 300


def expected_rows(config: TrainConfig) -> set[tuple[str, ...]]:
    """Of the two trials, each trained alone to its end: the better one at the rung finishes, the other stops there."""
    found = {}
    for lr in RATES:
        optim = dataclasses.replace(config.optim, lr=lr)
        alone = dataclasses.replace(config, optim=optim, name=f"alone-{lr:g}")
        fit(load_inputs(resolve(alone, lambda _: 1), NullTracker()), TrainContext())
        found[lr] = validations(alone)
    better, worse = sorted(RATES, key=lambda lr: found[lr][0].val_loss)
    best = min(found[better], key=lambda one: one.val_loss)
    return {
        (f"{better:g}", "finished", str(best.step), f"{best.val_loss:.6f}"),
        (f"{worse:g}", "stopped", str(RUNG), f"{found[worse][0].val_loss:.6f}"),
    }


@pytest.mark.slow
def test_a_sweep_whose_driver_is_killed_ends_with_the_same_table_by_the_same_command(
    tiny_config: TrainConfig, tmp_path: Path
) -> None:
    chance = random.Random(SEED)
    print(f"FAULT_SEED={SEED}")
    config = dataclasses.replace(
        tiny_config,
        tracking_uri=mlflow_runs.OFF,
        sample_prompt="",
        max_steps=STEPS,
        eval_interval_steps=RUNG,
        name="",
    )
    file, space = tmp_path / "sweep.yaml", tmp_path / "space.yaml"
    file.write_text(yaml.safe_dump(dataclasses.asdict(config)), encoding="utf-8")
    space.write_text(yaml.safe_dump({"optim.lr": list(RATES)}), encoding="utf-8")
    words = ["--config", str(file), "--resume", "--name", "s", "--no-final", "--space", str(space)]
    words += ["--scheduler", "asha", "--trial-steps", str(STEPS)]
    sweep = Path(config.output) / "s"
    folder = RunFolder(sweep / "trials" / "lr0.01")

    def start() -> "subprocess.Popen[str]":
        command = [sys.executable, str(ROOT / "tune" / "sweep.py"), *words]
        environment = dict(os.environ) | {"RAY_ADDRESS": "local", "PYTHONPATH": str(ROOT)}
        return subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True, start_new_session=True)

    with start() as process:
        deadline = time.monotonic() + 240

        def wait_for(is_there: Callable[[], object]) -> None:
            while not is_there():
                assert time.monotonic() < deadline
                assert process.poll() is None
                time.sleep(0.02)

        wait_for(sweep.exists)
        with start() as second:
            errors = second.communicate(timeout=120)[1]
        assert second.returncode == 2
        assert errors.splitlines() == [
            f"error: another sweep.py is writing to {sweep}: wait for its end, or take another --name"
        ]
        wait_for(folder.checkpoints)
        time.sleep(chance.uniform(0, 3))
        process.kill()
        process.communicate()
    space.unlink()  # the record has it
    with start() as process:  # at once: what is left of the first may still be there
        errors = process.communicate(timeout=400)[1]
    assert process.returncode == 0, errors
    with (sweep / "results.csv").open(encoding="utf-8") as rows:
        table = {(row["lr"], row["status"], row["step"], row["val_loss"]) for row in csv.DictReader(rows)}
    assert table == expected_rows(config)
    assert {path.name for path in sweep.iterdir()} >= {"heatmap.png", "parallel.png", "curves.png", "best.yaml"}
