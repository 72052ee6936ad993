"""A sweep in an object store, and what becomes of it on another machine."""

import csv
import dataclasses
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from slm_ray.config.schema import TrainConfig
from slm_ray.errors import UserError
from slm_ray.storage import files_below, storage_path
from slm_ray.tracking import mlflow_runs
from tune.config import SweepConfig
from tune.record import read_record
from tune.results import TrialStatus
from tune.running import run_sweep
from tune.sweep import parse_config

pytestmark = pytest.mark.ray


@pytest.fixture
def sweep(
    tiny_config: TrainConfig, s3: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> SweepConfig:
    """Of one point with one rung, in a place of its own in the store."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    shared = {field.name: getattr(tiny_config, field.name) for field in dataclasses.fields(TrainConfig)}
    shared |= {"output": f"s3://stories/{tmp_path.name}", "tracking_uri": mlflow_runs.OFF, "name": "s"}
    shared |= {"eval_interval_steps": 2, "lr": (1e-2,), "d_ff": (32,), "register": "", "final": False}
    return SweepConfig(**shared, scheduler="asha", reduction_factor=2, trial_steps=4)


@pytest.mark.slow
def test_a_sweep_is_kept_in_the_store_and_goes_on_from_there(
    sweep: SweepConfig, s3: Callable[..., Any], local_ray: Any, tmp_path: Path
) -> None:
    kept = storage_path(sweep.output) / "s"
    trials, _ = run_sweep(sweep)
    assert [(trial.status, trial.step) for trial in trials] == [(TrialStatus.FINISHED, 4)]
    names = {file.as_posix().removeprefix(kept.as_posix()).lstrip("/") for file in files_below(kept)}
    own = {name for name in names if not name.startswith(("trials/", ".lease/"))}
    assert own == {"sweep.json", "results.csv", "heatmap.png", "parallel.png", "curves.png", "best.yaml"}
    assert {"trials/lr0.01-dff32/summary.json", "trials/lr0.01-dff32.times"} <= names
    assert [row["status"] for row in csv.DictReader((kept / "results.csv").read_text().splitlines())] == ["finished"]

    shutil.rmtree(tmp_path / "cache")  # another machine
    with pytest.raises(UserError, match="holds a sweep already"):
        run_sweep(sweep)
    again = parse_config(["--resume", "--output", sweep.output, "--name", "s"])
    assert (again.lr, again.scheduler) == (sweep.lr, "asha")
    assert run_sweep(again)[0] == trials
    with pytest.raises(UserError, match="seed was 0 and is now 7"):
        run_sweep(dataclasses.replace(again, seed=7))


def test_what_is_no_sweep_is_refused_and_a_store_that_does_not_answer_is_no_empty_one(
    sweep: SweepConfig, s3: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    place = sweep.output.removeprefix("s3://stories/")
    s3(f"{place}/s/mine.txt", b"mine")
    with pytest.raises(UserError, match="is not empty and no folder of a sweep"):
        run_sweep(sweep)
    with pytest.raises(UserError, match="--resume needs the --name of a sweep in s3://"):
        parse_config(["--resume", "--output", sweep.output])

    def refuse(*_: Any, **__: Any) -> str:
        raise PermissionError(13, "Access denied")

    folder = storage_path(sweep.output) / "s"
    monkeypatch.setattr(type(folder.fs), "_call_s3", refuse)  # type: ignore[union-attr]
    with pytest.raises(UserError, match="cannot be read: Access denied"):
        read_record(folder)
