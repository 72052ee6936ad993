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
from slm_ray.runs.run_folder import RAY_STATE
from slm_ray.tokenization.tokenizer import Tokenizer
from slm_ray.tokenization.training import train_bpe
from slm_ray.tracking import mlflow_runs, registry
from slm_ray.tracking.tracker import NullTracker
from slm_ray.train import parse_config as parse_training
from slm_ray.training.context import TrainContext
from slm_ray.training.inputs import load_inputs
from slm_ray.training.loop import fit
from slm_ray.training.preflight import resolve
from tests.support.data_sets import write_data
from tune import planning as planning_module
from tune import running
from tune import sweep as sweep_module
from tune.config import MODEL_NAME, SweepConfig, run_config, space_of
from tune.outcomes import ended_trial, refuse_other_trial
from tune.planning import plan_sweep, registered_name
from tune.record import write_record
from tune.results import Trial, TrialStatus, format_table, ranked, trial_name
from tune.running import run_sweep
from tune.shown.report import keep_results
from tune.space import Point, grid
from tune.sweep import main, parse_config

pytestmark = pytest.mark.ray


def sweep_of(config: TrainConfig, **changes: Any) -> SweepConfig:
    shared = {field.name: getattr(config, field.name) for field in dataclasses.fields(TrainConfig)}
    return SweepConfig(**(shared | {"lr": (1e-3, 1e-2), "d_ff": (32, 64), "register": "tiny"} | changes))


def at(lr: float, d_ff: int) -> Point:
    return {"optim.lr": lr, "model.d_ff": d_ff}


def points(sweep: SweepConfig) -> list[tuple[float, int]]:
    return [tuple(point.values()) for point in grid(space_of(sweep))]


def test_the_default_grid_is_two_by_two() -> None:
    assert points(parse_config([])) == [(3e-3, 512), (3e-3, 1024), (7e-3, 512), (7e-3, 1024)]
    assert parse_config(["--config", "keras-4x256"]).lr == (2e-4, 5e-4)
    assert parse_config(["--config", "keras-4x256", "--lr", "1e-3"]).lr == (1e-3,)


@pytest.mark.parametrize(
    ("words", "needed"),
    [
        (["--reduction-factor", "4"], "--scheduler asha"),
        (["--batch_trials=2"], "--search optuna"),
        (["--batch-trials", "2", "--search", "random", "--num-trials", "3"], "--search optuna"),
    ],
)
def test_an_option_of_another_way_to_search_is_refused(words: list[str], needed: str) -> None:
    with pytest.raises(UserError, match=f"goes with {needed}"):
        parse_config(words)
    assert parse_config(["--reduction-factor", "4", "--scheduler", "asha"]).reduction_factor == 4


def test_the_grid_is_set_by_options_and_each_point_stands_once() -> None:
    sweep = parse_config(["--lr", "1e-3", "1e-3", "--d-ff", "64", "128", "--no-final"])
    assert points(sweep) == [(1e-3, 64), (1e-3, 128)]
    assert (sweep.final, sweep.register) == (False, "tinystories")


def test_a_point_changes_rate_and_width_and_nothing_else(tiny_config: TrainConfig) -> None:
    config = run_config(sweep_of(tiny_config, optim=OptimConfig(min_lr=1e-3)), at(1e-4, 96))
    assert (config.optim.lr, config.optim.min_lr, config.model.d_ff) == (1e-4, 1e-4, 96)
    assert config.batch_size == tiny_config.batch_size
    assert type(config) is TrainConfig


def test_without_a_store_nothing_is_registered_and_a_name_of_ones_own_is_refused() -> None:
    assert registered_name("mine", "sqlite:///mlflow.db") == "mine"
    assert registered_name(MODEL_NAME, "none") == ""
    with pytest.raises(UserError, match=r"register \(mine\) needs an MLflow store"):
        registered_name("mine", "none")


def test_names_of_trials_are_distinct() -> None:
    assert trial_name(at(5e-4, 512)) == "lr0.0005-dff512"
    assert trial_name(at(1e-4, 512)) != trial_name(at(1.5e-4, 512))
    assert trial_name(at(1.0000001e-3, 512)) != trial_name(at(1e-3, 512))  # equal to six digits


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
    monkeypatch.setattr(running, "_run_trials", lambda *_: (_ for _ in ()).throw(UserError("came as far as this")))
    with pytest.raises(UserError, match="came as far as this"):
        run_sweep(sweep)
    folder = Path(sweep.output) / sweep.name
    with folder_lock.locked(folder, ""), pytest.raises(UserError, match=r"another sweep\.py .*it began as process"):
        run_sweep(sweep)


def resolved(config: TrainConfig, monkeypatch: pytest.MonkeyPatch, **changes: Any) -> SweepConfig:
    """A sweep that needs no Ray to be planned, without a store."""
    monkeypatch.setattr(planning_module.cluster, "connect", lambda **_: None)
    monkeypatch.setattr(planning_module.cluster, "check_resources", lambda _: None)
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
    monkeypatch.setattr(running, "_run_trials", lambda *_: os.kill(os.getpid(), number))
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
    point = at(config.optim.lr, config.model.d_ff)
    refuse_other_trial(config)
    assert (ended_trial(config, point) is None) == bool(stop_at)
    other = dataclasses.replace(config, optim=dataclasses.replace(config.optim, weight_decay=0.5))
    with pytest.raises(UserError, match="was trained with another optim"):
        refuse_other_trial(other)


def test_a_trial_that_diverged_has_ended_with_its_reason_and_step(tiny_config: TrainConfig) -> None:
    optim = dataclasses.replace(tiny_config.optim, lr=1e6)
    config = dataclasses.replace(tiny_config, tracking_uri=mlflow_runs.OFF, sample_prompt="", optim=optim)
    fit(load_inputs(resolve(config, lambda _: 1), NullTracker()), TrainContext())
    trial = ended_trial(config, at(1e6, 64))
    assert trial is not None
    assert trial.status == TrialStatus.DIVERGED
    assert (trial.point, trial.metrics, trial.tokens) == (at(1e6, 64), {}, trial.step * 8 * 32)
    assert trial.step > 0
    assert "the loss" in trial.reason or "the gradient" in trial.reason
    assert ended_trial(dataclasses.replace(config, max_steps=99), at(1e6, 64)) is None


def test_a_row_stands_for_each_trial_whatever_became_of_it(
    tiny_config: TrainConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = plan_sweep(resolved(tiny_config, monkeypatch))
    plan.folder.mkdir(parents=True)
    value = {"val_loss": 2.0, "val_bits_per_byte": 1.0, "step": 4.0}
    finished = Trial(point=at(1e-3, 64), metrics=value, run_id="r", step=8, tokens=2048, wall_s=1.25)
    better = dataclasses.replace(finished, point=at(1e-3, 32), metrics={**value, "val_bits_per_byte": 0.5})
    early = Trial(point=at(1e-2, 32), metrics={**value, "val_bits_per_byte": 0.1}, status=TrialStatus.STOPPED, step=2)
    later = Trial(point=at(1e-2, 64), metrics=value, status=TrialStatus.STOPPED, step=4)
    diverged = Trial(point=at(1e3, 64), status=TrialStatus.DIVERGED, reason="the loss, as it were, rose", step=3)
    failed = Trial(point=at(1e-3, 96), status=TrialStatus.FAILED, reason="its process was killed")
    trials = ranked([failed, diverged, early, finished, later, better])
    assert trials == [better, finished, later, early, diverged, failed]
    keep_results(plan, trials, NullTracker())
    with (plan.folder / "results.csv").open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert [(row["lr"], row["d_ff"], row["status"], row["step"], row["val_bits_per_byte"]) for row in rows] == [
        ("0.001", "32", "finished", "4", "0.500000"), ("0.001", "64", "finished", "4", "1.000000"),
        ("0.01", "64", "stopped", "4", "1.000000"), ("0.01", "32", "stopped", "2", "0.100000"),
        ("1000", "64", "diverged", "3", ""), ("0.001", "96", "failed", "0", ""),
    ]  # fmt: skip
    assert rows[4]["reason"] == diverged.reason
    assert (rows[0]["tokens"], rows[0]["wall_s"]) == ("2048", "1.2")
    assert "diverged at step 3: the loss, as it were, rose" in format_table(trials)
    assert len(format_table(trials).splitlines()) == 7
    made = {path.name for path in plan.folder.iterdir()}
    assert made == {"results.csv", "heatmap.png", "parallel.png", "best.yaml"}  # curves are of trials that ran
    best = parse_training(["--config", str(plan.folder / "best.yaml")])  # as train.py takes it
    assert best == run_config(plan.sweep, better.point, name="", register="")
    keep_results(plan, [diverged, failed], NullTracker())
    assert [path.name for path in plan.folder.iterdir()] == ["results.csv"]
    assert "1 failed and 1 diverged" in running._no_result([diverged, failed], "s")
    assert "1 failed and 1 diverged, 1 stopped early" in running._no_result([diverged, failed, early], "s")
    assert "all 1 trials diverged (the loss, as it were, rose)" in running._no_result([diverged], "s")


def test_data_is_named_as_everywhere_else(tiny_config: TrainConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    sweep = resolved(dataclasses.replace(tiny_config, data=f"file://{tiny_config.data}"), monkeypatch)
    assert plan_sweep(sweep).sweep.data == tiny_config.data
    monkeypatch.setenv("HOME", str(Path(tiny_config.data).parent))
    sweep = dataclasses.replace(sweep, data=f"~/{Path(tiny_config.data).name}")
    assert plan_sweep(sweep).sweep.data == tiny_config.data


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
    monkeypatch.setattr(planning_module.cluster, "connect", lambda **_: pytest.fail("a Ray was started"))
    with pytest.raises(UserError, match=message):
        run_sweep(sweep)
    assert not Path(sweep.output).exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--data", "no/such"], "no manifest.json"),
        (["--config", "nothing"], "no preset and no file"),
        (["--data", "A=0.7", "B=0.3"], "no manifest.json in A"),
        (["--data", "A=0.7", "--data", "B=-1"], "B=-1 must be FOLDER=WEIGHT with a weight above 0"),
        (["--data", "A=0.7", "B=much", "--resume", "--output", "no/such"], "B=much must be FOLDER=WEIGHT"),
        (["--data", "A=0.7", "./A=1"], "./A is named twice"),
    ],
)
def test_a_users_mistake_is_one_line_and_2(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments) == 2
    errors = capsys.readouterr().err.splitlines()
    assert len(errors) == 1
    assert message in errors[0]


@pytest.fixture
def mixed_config(tiny_config: TrainConfig, tiny_tokenizer: Tokenizer, tmp_path: Path) -> TrainConfig:
    """A run on two data sets."""
    write_data(tmp_path / "more-data", tiny_tokenizer, {"train": [(500, 530)], "validation": [(530, 534)]})
    return dataclasses.replace(tiny_config, data=f"{tiny_config.data}=0.7 {tmp_path / 'more-data'}=0.3")


def test_a_mixture_is_that_of_every_trial_and_of_the_record(
    mixed_config: TrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    one = mixed_config.data.split("=")[0]
    words = ["--data", f"{one}=0.7", "more-data=0.3", "--output", "runs", "--name", "mixed", "--max-steps", "8"]
    given = parse_config([*words, "--precision", "fp32", "--model.seq-len", "32"])
    plan = plan_sweep(resolved(given, monkeypatch, name="mixed"))
    assert plan.trial_config(at(1e-2, 32)).data == plan.sweep.data == mixed_config.data
    plan.run_folder.path.mkdir(parents=True)
    write_record(plan.folder, plan.sweep, "run", plan.space, "")
    assert plan_sweep(parse_config(["--resume", "--output", "runs", "--name", "mixed"])).sweep.data == plan.sweep.data
    other = [f"{one}=0.5", "more-data=0.5"]
    assert main(["--resume", "--output", "runs", "--name", "mixed", "--data", *other]) == 2
    name = Path(one).name
    said = f"data was {name}=0.7 more-data=0.3 ("
    err = capsys.readouterr().err
    assert said in err and f") and is now {name}=0.5 more-data=0.5 (" in err and err.count("\n") == 1


def test_data_sets_that_do_not_go_together_are_refused_before_a_ray_starts(
    mixed_config: TrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_data(tmp_path / "foreign", train_bpe(["a b c d e f g h"] * 3, vocab_size=300), {"train": [(0, 9)]})
    sweep = resolved(mixed_config, monkeypatch, trial_steps=3)
    monkeypatch.setattr(planning_module.cluster, "connect", lambda **_: pytest.fail("a Ray was started"))
    one, other = (word.rpartition("=")[0] for word in mixed_config.data.split())
    for data, message in (
        (f"{one}=1 {tmp_path / 'foreign'}=1", "has another tokenizer than"),
        (f"{one}=1 {other}=1e-9", "is too small a share"),
        (f"{one}=1 {tmp_path / 'nowhere'}=1", "no manifest.json"),
    ):
        with pytest.raises(UserError, match=message):
            run_sweep(dataclasses.replace(sweep, data=data))
    assert not Path(mixed_config.output).exists()


@pytest.mark.slow
def test_a_sweep_trains_the_best_point_and_goes_on_where_it_stopped(mixed_config: TrainConfig, local_ray: Any) -> None:
    """Of a mixture, as of one data set."""
    early: dict[str, Any] = {"scheduler": "asha", "reduction_factor": 2, "eval_interval_steps": 2, "trial_steps": 4}
    first = sweep_of(mixed_config, name="sweep", lr=(1e-2,), d_ff=(32,), final=False, **early)
    trials, final = run_sweep(first)
    assert final is None
    assert [trial.point for trial in trials] == [at(1e-2, 32)]
    folder = Path(first.output) / "sweep"
    made_at = (folder / "trials" / "lr0.01-dff32" / "summary.json").stat().st_mtime_ns

    with pytest.raises(UserError, match="holds a sweep already"):
        run_sweep(first)
    with pytest.raises(UserError, match="seed was 0 and is now 5: a sweep keeps what"):
        run_sweep(dataclasses.replace(first, resume=True, seed=5))

    trials, final = run_sweep(sweep_of(mixed_config, name="sweep", resume=True, lr=(1e-2,), d_ff=(32, 64), **early))
    assert {trial.name for trial in trials} == {"lr0.01-dff32", "lr0.01-dff64"}
    assert [(trial.status, trial.step) for trial in trials] == [("finished", 4), ("stopped", 2)]
    assert (folder / "trials" / "lr0.01-dff32" / "summary.json").stat().st_mtime_ns == made_at
    assert final is not None
    assert final.version == "1"
    with (folder / "results.csv").open(encoding="utf-8") as file:
        assert len(list(csv.DictReader(file))) == 2
    store = mlflow_runs.client(first.tracking_uri)
    child = store.get_run(final.run_id)
    parent = store.get_run(child.data.tags["mlflow.parentRunId"])
    assert {artifact.path for artifact in store.list_artifacts(parent.info.run_id)} == {
        "heatmap.png", "results.csv", "parallel.png", "curves.png", "best.yaml"
    }  # fmt: skip
    assert parent.info.status == "FINISHED"
    best = registry.resolve_model("models:/tiny/1", first.tracking_uri)
    assert best.run_id == final.run_id
    for run in (child, parent):
        weights = [{tag.key: tag.value for tag in one.tags}["slm_ray.weight"] for one in run.inputs.dataset_inputs]
        assert sorted(weights) == ["0.3", "0.7"] and run.data.tags["data_mixtures"]
    assert not (folder / RAY_STATE).exists()
