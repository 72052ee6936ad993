"""The sweep: its grid, its refusals, and the whole of it on a tiny model."""

import csv
import dataclasses
import errno
import fcntl
import os
import signal
from pathlib import Path
from typing import Any

import pytest

from slm_ray.config.schema import ModelConfig, OptimConfig, TrainConfig
from slm_ray.errors import UserError
from slm_ray.locks import folder_lock
from slm_ray.tracking import mlflow_runs, registry
from slm_ray.tracking.tracker import NullTracker
from slm_ray.training.context import TrainContext
from slm_ray.training.inputs import load_inputs
from slm_ray.training.loop import fit
from slm_ray.training.preflight import resolve
from tests.support.pictures import assert_drawn, record_axes
from tune import sweep as sweep_module
from tune.config import MODEL_NAME, SweepConfig
from tune.results import Trial, TrialStatus, draw_heat_map, format_table, keep_results, ranked
from tune.sweep import _registered_name, main, parse_config, run_config, run_sweep
from tune.trials import ended_trial, trial_name

pytestmark = pytest.mark.ray


def sweep_of(config: TrainConfig, **changes: Any) -> SweepConfig:
    shared = {field.name: getattr(config, field.name) for field in dataclasses.fields(TrainConfig)}
    return SweepConfig(**(shared | {"lr": (1e-3, 1e-2), "d_ff": (32, 64), "register": "tiny"} | changes))


def test_the_default_grid_is_two_by_two() -> None:
    assert parse_config([]).points == [(1e-3, 512), (1e-3, 1024), (3e-3, 512), (3e-3, 1024)]


def test_the_grid_is_set_by_options_and_each_point_stands_once() -> None:
    sweep = parse_config(["--lr", "1e-3", "1e-3", "--d-ff", "64", "128", "--no-final"])
    assert sweep.points == [(1e-3, 64), (1e-3, 128)]
    assert (sweep.final, sweep.register) == (False, "tinystories")


def test_a_point_changes_rate_and_width_and_nothing_else(tiny_config: TrainConfig) -> None:
    config = run_config(sweep_of(tiny_config, optim=OptimConfig(min_lr=1e-3)), lr=1e-4, d_ff=96)
    assert (config.optim.lr, config.optim.min_lr, config.model.d_ff) == (1e-4, 1e-4, 96)
    assert config.batch_size == tiny_config.batch_size
    assert type(config) is TrainConfig


def test_without_a_store_nothing_is_registered_and_a_name_of_ones_own_is_refused() -> None:
    assert _registered_name("mine", "sqlite:///mlflow.db") == "mine"
    assert _registered_name(MODEL_NAME, "none") == ""
    with pytest.raises(UserError, match=r"register \(mine\) needs an MLflow store"):
        _registered_name("mine", "none")


def test_names_of_trials_are_distinct() -> None:
    assert trial_name(5e-4, 512) == "lr0.0005-dff512"
    assert trial_name(1e-4, 512) != trial_name(1.5e-4, 512)
    assert trial_name(1.0000001e-3, 512) != trial_name(1e-3, 512)  # equal to six digits


def test_two_sweeps_do_not_write_to_one_folder(tiny_config: TrainConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    sweep = resolved(tiny_config, monkeypatch)
    with folder_lock.locked(Path(sweep.output) / sweep.name, ""), pytest.raises(UserError, match=r"another sweep\.py"):
        run_sweep(sweep)


def test_a_disk_without_locks_is_no_folder_of_somebody_else(
    tiny_config: TrainConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    def without_locks(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", without_locks)
    sweep = resolved(tiny_config, monkeypatch)
    monkeypatch.setattr(sweep_module, "_run_trials", lambda *_: (_ for _ in ()).throw(UserError("came as far as this")))
    with pytest.raises(UserError, match="came as far as this"):
        run_sweep(sweep)
    folder = Path(sweep.output) / sweep.name
    with folder_lock.locked(folder, ""), pytest.raises(UserError, match=r"another sweep\.py .*it began as process"):
        run_sweep(sweep)


def resolved(config: TrainConfig, monkeypatch: pytest.MonkeyPatch, **changes: Any) -> SweepConfig:
    """A sweep that needs no Ray to be planned, without a store."""
    monkeypatch.setattr(sweep_module.cluster, "connect", lambda **_: None)
    monkeypatch.setattr(sweep_module.cluster, "check_resources", lambda _: None)
    fields = {"name": "s", "workers": 1, "tracking_uri": mlflow_runs.OFF, "register": ""}
    return sweep_of(config, **(fields | changes))


def test_a_folder_that_is_no_sweep_is_refused_and_left(
    tiny_config: TrainConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    sweep = resolved(tiny_config, monkeypatch)
    folder = Path(sweep.output) / sweep.name
    (folder / ".tune").mkdir(parents=True)
    (folder / ".tune" / "mine").write_text("mine")
    with pytest.raises(UserError, match="is not empty and no folder of a sweep"):
        run_sweep(sweep)
    assert (folder / ".tune" / "mine").read_text() == "mine"


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_says_how_to_resume(
    number: int,
    code: int,
    tiny_config: TrainConfig,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    sweep = resolved(tiny_config, monkeypatch)
    monkeypatch.setattr(sweep_module, "_run_trials", lambda *_: os.kill(os.getpid(), number))
    monkeypatch.setattr(sweep_module, "parse_config", lambda _: sweep)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a Ray that another test started has its own
    try:
        assert main([]) == code
    finally:
        signal.signal(signal.SIGINT, before)
    assert "stopped: `--resume --name s` goes on" in capsys.readouterr().err


@pytest.mark.parametrize("stop_at", [0, 4])
def test_a_trial_of_other_options_does_not_count(tiny_config: TrainConfig, stop_at: int) -> None:
    config = dataclasses.replace(tiny_config, tracking_uri=mlflow_runs.OFF, sample_prompt="")
    steps = iter(range(1, 100))
    fit(
        load_inputs(resolve(config, lambda _: 1), NullTracker()),
        TrainContext(is_stop_requested=lambda: next(steps) == stop_at),
    )
    assert (ended_trial(config) is None) == bool(stop_at)
    other = dataclasses.replace(config, optim=dataclasses.replace(config.optim, weight_decay=0.5))
    with pytest.raises(UserError, match="was trained with another optim"):
        ended_trial(other)


def test_a_trial_that_diverged_has_ended_with_its_reason_and_step(tiny_config: TrainConfig) -> None:
    optim = dataclasses.replace(tiny_config.optim, lr=1e6)
    config = dataclasses.replace(tiny_config, tracking_uri=mlflow_runs.OFF, sample_prompt="", optim=optim)
    fit(load_inputs(resolve(config, lambda _: 1), NullTracker()), TrainContext())
    trial = ended_trial(config)
    assert trial is not None
    assert trial.status == TrialStatus.DIVERGED
    assert (trial.lr, trial.d_ff, trial.metrics) == (1e6, 64, {})
    assert trial.step > 0
    assert "the loss" in trial.reason or "the gradient" in trial.reason
    assert ended_trial(dataclasses.replace(config, max_steps=99)) is None


def test_a_row_stands_for_each_trial_whatever_became_of_it(tmp_path: Path) -> None:
    finished = Trial(1e-3, 64, {"val_loss": 2.0, "val_bits_per_byte": 1.0, "step": 4}, "r")
    better = dataclasses.replace(finished, d_ff=32, metrics={**finished.metrics, "val_bits_per_byte": 0.5})
    diverged = Trial(1e3, 64, {}, "", TrialStatus.DIVERGED, "the loss, as it were, rose", 3)
    failed = Trial(1e-3, 96, {}, "", TrialStatus.FAILED, "its process was killed")
    trials = ranked([failed, diverged, finished, better])
    assert trials == [better, finished, diverged, failed]
    keep_results(trials, tmp_path, NullTracker())
    with (tmp_path / "results.csv").open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert [(row["status"], row["step"], row["val_bits_per_byte"]) for row in rows] == [
        ("finished", "4", "0.500000"), ("finished", "4", "1.000000"), ("diverged", "3", ""), ("failed", "0", ""),
    ]  # fmt: skip
    assert rows[2]["reason"] == diverged.reason
    assert "diverged at step 3: the loss, as it were, rose" in format_table(trials)
    (tmp_path / "none").mkdir()
    keep_results([diverged, failed], tmp_path / "none", NullTracker())
    assert [path.name for path in (tmp_path / "none").iterdir()] == ["results.csv"]
    assert "1 failed and 1 diverged" in sweep_module._no_result([diverged, failed], "s")
    assert "all 1 trials diverged (the loss, as it were, rose)" in sweep_module._no_result([diverged], "s")


def test_data_is_named_as_everywhere_else(tiny_config: TrainConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    sweep = resolved(dataclasses.replace(tiny_config, data=f"file://{tiny_config.data}"), monkeypatch)
    assert sweep_module._resolve(sweep).data == tiny_config.data
    monkeypatch.setenv("HOME", str(Path(tiny_config.data).parent))
    sweep = dataclasses.replace(sweep, data=f"~/{Path(tiny_config.data).name}")
    assert sweep_module._resolve(sweep).data == tiny_config.data


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": ModelConfig(seq_len=10**7)}, "the training split has .* tokens, and one sample needs"),
        ({"model": ModelConfig(vocab_size=99)}, r"vocab_size \(99\) must be the data set's"),
        ({"trial_workers": 3}, "must be divisible by workers"),
    ],
)
def test_what_no_trial_could_begin_with_is_refused_before_a_ray_starts(
    tiny_config: TrainConfig, changes: dict[str, Any], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    sweep = resolved(tiny_config, monkeypatch, trial_steps=3, **changes)
    monkeypatch.setattr(sweep_module.cluster, "connect", lambda **_: pytest.fail("a Ray was started"))
    with pytest.raises(UserError, match=message):
        run_sweep(sweep)
    assert not Path(sweep.output).exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [(["--data", "no/such"], "no manifest.json"), (["--config", "nothing"], "no preset and no file")],
)
def test_a_users_mistake_is_one_line_and_2(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments) == 2
    errors = capsys.readouterr().err.splitlines()
    assert len(errors) == 1
    assert message in errors[0]


def test_the_heat_map_and_table_show_every_trial(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = {(1e-3, 64): 1.5, (1e-2, 64): 1.25, (1e-2, 128): 1.0}  # one point of the grid is missing
    trials = [
        Trial(lr, d_ff, {"val_loss": 2.0, "val_bits_per_byte": bits, "step": 1}, "r")
        for (lr, d_ff), bits in found.items()
    ]
    drawn = record_axes(monkeypatch)
    draw_heat_map(trials, tmp_path / "map.png")
    assert_drawn(tmp_path / "map.png", (720, 480))
    ((axes, _),) = drawn  # the other are those of the colour bar
    (image,) = axes.images
    assert image.get_array().filled(-1).tolist() == [[1.5, 1.25], [-1, 1.0]]  # rows from the bottom up
    assert image.origin == "lower"
    assert [label.get_text() for label in axes.get_xticklabels()] == ["0.001", "0.01"]
    assert [label.get_text() for label in axes.get_yticklabels()] == ["64", "128"]
    assert {(text.get_position(), text.get_text()) for text in axes.texts} == {
        ((0, 0), "1.5000"), ((1, 0), "1.2500"), ((1, 1), "1.0000"),
    }  # fmt: skip
    assert len(format_table(trials).splitlines()) == 4


@pytest.mark.slow
def test_a_sweep_trains_the_best_point_and_goes_on_where_it_stopped(tiny_config: TrainConfig, local_ray: Any) -> None:
    first = sweep_of(tiny_config, name="sweep", trial_steps=4, lr=(1e-2,), d_ff=(32,), final=False)
    trials, final = run_sweep(first)
    assert final is None
    assert [(trial.lr, trial.d_ff) for trial in trials] == [(1e-2, 32)]
    folder = Path(first.output) / "sweep"
    made_at = (folder / "trials" / "lr0.01-dff32" / "summary.json").stat().st_mtime_ns

    with pytest.raises(UserError, match="holds a sweep already"):
        run_sweep(first)
    with pytest.raises(UserError, match="seed was 0 and is now 5: a sweep keeps what"):
        run_sweep(dataclasses.replace(first, resume=True, seed=5))

    trials, final = run_sweep(
        sweep_of(tiny_config, name="sweep", trial_steps=4, resume=True, lr=(1e-2,), d_ff=(32, 64))
    )
    assert {(trial.lr, trial.d_ff) for trial in trials} == {(1e-2, 32), (1e-2, 64)}
    assert trials[0].metrics["val_bits_per_byte"] <= trials[1].metrics["val_bits_per_byte"]
    assert (folder / "trials" / "lr0.01-dff32" / "summary.json").stat().st_mtime_ns == made_at
    assert final is not None
    assert final.version == "1"
    with (folder / "results.csv").open(encoding="utf-8") as file:
        assert len(list(csv.DictReader(file))) == 2
    store = mlflow_runs.client(first.tracking_uri)
    child = store.get_run(final.run_id)
    parent = store.get_run(child.data.tags["mlflow.parentRunId"])
    assert {artifact.path for artifact in store.list_artifacts(parent.info.run_id)} == {"heatmap.png", "results.csv"}
    assert parent.info.status == "FINISHED"
    best = registry.resolve_model("models:/tiny@champion", first.tracking_uri)
    assert best.run_id == final.run_id
    assert not (folder / ".tune").exists()
