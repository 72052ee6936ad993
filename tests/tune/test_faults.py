"""Trials that fail, diverge and are killed: what the table says in the end."""

import csv
import dataclasses
import os
import signal
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from slm_ray.config.schema import TrainConfig
from slm_ray.tracking import mlflow_runs
from tune import sweep as sweep_module
from tune import trials as trials_module
from tune.config import SweepConfig
from tune.sweep import main

pytestmark = pytest.mark.ray


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
    sweep = sweep_of(tiny_config, trial_steps=4, lr=(1e-2, 1e6), d_ff=(32, 64), trial_retries=0)
    real = trials_module.train_trial

    def struck(plain: Mapping[str, Any], *rest: Any) -> None:
        if plain["name"] == "lr0.01-dff64":
            raise OSError(28, "No space left on device")
        if plain["name"] == "lr1e+06-dff64":
            os.kill(os.getpid(), signal.SIGKILL)
        real(plain, *rest)

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
