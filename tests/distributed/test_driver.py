"""Training through Ray Train: refusals before anything starts, two workers, resume, the registry."""

import dataclasses
import shutil
from pathlib import Path
from typing import Any

import pytest

from slm_ray.config.schema import TrainConfig
from slm_ray.distributed import driver, workers
from slm_ray.distributed.driver import run_training
from slm_ray.errors import UserError
from slm_ray.runs import checkpoint
from slm_ray.runs.history import History
from slm_ray.runs.run_folder import RunFolder
from slm_ray.tokenization.tokenizer import Tokenizer
from slm_ray.tracking import mlflow_runs, registry, tracker
from slm_ray.train import describe, main, parse_config
from slm_ray.training.context import TrainContext
from slm_ray.training.inputs import load_inputs
from slm_ray.training.loop import fit
from slm_ray.training.preflight import refuse_conflicts, resolve
from tests.support.data_sets import write_data
from tests.support.saved_models import save_talkative

pytestmark = pytest.mark.ray


def folder_of(config: TrainConfig) -> RunFolder:
    return RunFolder(Path(config.output) / config.name)


def losses(config: TrainConfig) -> dict[int, float]:
    steps, values = History(folder_of(config).path / "metrics.jsonl").series("train_loss")
    return dict(zip(steps, values, strict=True))


def fit_here(config: TrainConfig) -> None:
    """The same run in this process, without Ray."""
    fit(load_inputs(resolve(config, lambda _: 1), tracker.NullTracker()), TrainContext())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data": "no/such/folder"}, "no manifest.json in .*pipelines/prepare.py"),
        ({"batch_size": 9, "workers": 2}, r"batch_size \(9\) must be divisible"),
    ],
)
def test_a_users_mistake_is_said_before_anything_starts(
    tiny_config: TrainConfig, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        resolve(dataclasses.replace(tiny_config, **changes), lambda _: 1)
    assert not Path(tiny_config.output).exists()


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("max_steps", [0, 8])
def test_too_little_text_is_said_before_a_ray_starts(
    tiny_config: TrainConfig,
    tiny_tokenizer: Tokenizer,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    workers: int,
    max_steps: int,
) -> None:
    monkeypatch.setattr(driver.cluster, "connect", lambda **_: pytest.fail("a Ray starts"))
    (tmp_path / "data").mkdir()
    write_data(tmp_path / "data", tiny_tokenizer, {"train": [(0, 20)]})
    config = dataclasses.replace(tiny_config, workers=workers, max_steps=max_steps)
    long = dataclasses.replace(config, model=dataclasses.replace(config.model, seq_len=10**6))
    with pytest.raises(UserError, match=r"the training split has .* tokens, and one sample needs 1000000"):
        run_training(long)
    with pytest.raises(UserError, match="has no validation stories: prepare it with a larger --validation-fraction"):
        run_training(dataclasses.replace(config, data=str(tmp_path / "data")))
    assert not Path(config.output).exists()


def test_another_vocabulary_than_the_datas_is_refused(tiny_config: TrainConfig) -> None:
    model = dataclasses.replace(tiny_config.model, vocab_size=99)
    with pytest.raises(UserError, match=r"vocab_size \(99\) must be the data set's, 512"):
        resolve(dataclasses.replace(tiny_config, model=model), lambda _: 1)


def test_paths_are_absolute_before_they_leave(tiny_config: TrainConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(Path(tiny_config.data).parent)
    relative = dataclasses.replace(tiny_config, data=Path(tiny_config.data).name, output="runs", name="")
    resolved = resolve(relative, lambda _: 1)
    assert resolved.data == tiny_config.data
    assert Path(resolved.output).is_absolute()
    assert resolved.name.startswith("run-")


def test_the_command_ends_with_2_and_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--config", "no-such-preset"]) == 2
    assert main(["--resume", "--config", "no-such-preset"]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 2
    assert all(line.startswith("error: ") for line in lines)


def test_a_record_that_lacks_its_best_validation_is_said_by_the_driver(
    tiny_config: TrainConfig, caplog: pytest.LogCaptureFixture
) -> None:
    """Where the disk took no line to the end of the run, the record could not say so itself."""
    config = dataclasses.replace(tiny_config, tracking_uri=mlflow_runs.OFF, sample_prompt="")
    fit_here(config)
    plan = driver._plan(resolve(config, lambda _: 1))
    assert driver._conclude(plan, tracker.NullTracker()).metrics.step == 8
    assert "misses lines" not in caplog.text
    plan.history.rewind(6)
    assert driver._conclude(plan, tracker.NullTracker()).metrics.step == 8
    assert caplog.text.count("metrics.jsonl misses lines, which the workers' disk did not take") == 1


def test_a_run_at_its_end_needs_its_teachers_no_more(
    tiny_config: TrainConfig, tiny_tokenizer: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(driver.cluster, "connect", lambda **_: (_ for _ in ()).throw(UserError("came as far as this")))
    teacher = save_talkative(tmp_path / "teacher", tiny_tokenizer)
    config = dataclasses.replace(
        tiny_config, teacher=(str(teacher),), tracking_uri=mlflow_runs.OFF, sample_prompt="", resume=True
    )
    fit_here(config)
    shutil.rmtree(teacher)
    with pytest.raises(UserError, match="came as far as this"):
        run_training(config)
    for changes in ({"max_steps": 9}, {"teacher": (str(tmp_path / "other"),)}):
        with pytest.raises(UserError, match="no model"):
            run_training(dataclasses.replace(config, **changes))
    with pytest.raises(UserError, match="other weights than those that were learned from"):
        run_training(config, teacher_sha256=("0" * 64,))


def test_a_name_for_the_registry_needs_a_registry(tiny_config: TrainConfig) -> None:
    config = dataclasses.replace(tiny_config, register="mine", tracking_uri="none")
    with pytest.raises(UserError, match=r"register \(mine\) needs an MLflow store"):
        resolve(config, lambda _: 1)


def test_a_resumed_run_checks_options_against_its_own_config(tiny_config: TrainConfig) -> None:
    config = dataclasses.replace(tiny_config, optim=dataclasses.replace(tiny_config.optim, lr=1e-2, min_lr=1e-3))
    fit_here(config)
    output, more = config.output, ["--optim.min-lr", "5e-3", "--max-steps", "9"]  # above the default preset's rate
    for where in (["--output", output, "--name", config.name], ["--output", f"file://{output}"]):
        again = parse_config(["--resume", *where, *more])
        assert (again.optim.lr, again.optim.min_lr, again.max_steps) == (1e-2, 5e-3, 9)
    with pytest.raises(UserError, match=r"min_lr \(0.02\) must be between 0 and lr \(0.01\)"):
        parse_config(["--resume", "--output", output, "--optim.min-lr", "2e-2"])


def test_a_mistake_that_only_workers_see_is_said_once_and_not_tried_again(
    tiny_config: TrainConfig, local_ray: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The driver is made blind to a shard that was altered: of the three failures that are allowed, one is used."""
    config = dataclasses.replace(tiny_config, name="altered", data=altered_copy(tiny_config), max_failures=3)
    monkeypatch.setattr(driver, "check_files", lambda *_: None)
    monkeypatch.setattr(workers, "_failure", lambda *_: "Ray tried until it gave up")
    with pytest.raises(UserError, match=r"^\S*train/00000.parquet was truncated or altered"):
        run_training(config, is_quiet=True)
    assert folder_of(config).latest_valid() is None


def altered_copy(config: TrainConfig) -> str:
    copy = Path(config.output).parent / "altered-data"
    shutil.copytree(config.data, copy, ignore=shutil.ignore_patterns(".mapped"))  # else no worker reads a shard
    shard = copy / "train" / "00000.parquet"
    shard.write_bytes(shard.read_bytes()[:-1])
    return str(copy)


@pytest.mark.slow
def test_two_workers_train_register_and_resume(tiny_config: TrainConfig, local_ray: Any) -> None:
    """One story in one test, for each start of a worker group takes seconds."""
    config = dataclasses.replace(tiny_config, workers=2, register="tiny-stories")
    result = run_training(config, is_quiet=True)
    folder = folder_of(config)
    assert (folder.best.exists(), folder.latest.exists()) == (True, True)
    assert sorted(path.name for path in folder.path.iterdir()) == [
        ".slm-ray-run", "best", "checkpoints", "latest", "loss.png", "metrics.jsonl", "mlflow.id", "summary.json",
    ]  # fmt: skip
    assert result.version == "1"
    found = registry.resolve_model("models:/tiny-stories/1", config.tracking_uri)
    assert found.run_id == result.run_id
    run = mlflow_runs.client(config.tracking_uri).get_run(result.run_id)
    assert run.info.status == "FINISHED"
    assert run.data.params["model.d_ff"] == "64"
    assert run.data.metrics["val_loss"] == pytest.approx(checkpoint.load_state(folder.latest).metrics.val_loss)
    assert "bits per byte" in describe(result)

    with pytest.raises(UserError, match="fp16 needs a GPU"):
        run_training(dataclasses.replace(config, name="other", precision="fp16"), is_quiet=True)
    with pytest.raises(UserError, match="8 workers need 8 CPUs and this machine has 2"):
        run_training(dataclasses.replace(config, name="other", workers=8), is_quiet=True)
    with pytest.raises(UserError, match="holds a run already"):
        run_training(config, is_quiet=True)

    # two workers see the samples that one sees: the same losses
    alone = dataclasses.replace(tiny_config, name="alone", sample_prompt="")
    fit_here(alone)
    assert losses(alone) == pytest.approx(losses(config), abs=1e-4)

    # asked again, a finished run trains nothing and registers nothing
    again = run_training(dataclasses.replace(config, resume=True), is_quiet=True)
    assert (again.version, again.run_id) == ("1", result.run_id)

    # a longer run continues it
    longer = parse_config(["--resume", "--name", "tiny", "--output", config.output, "--max-steps", "10"])
    assert (longer.model.d_ff, longer.max_steps, longer.workers) == (64, 10, 2)
    assert run_training(dataclasses.replace(longer, register=""), is_quiet=True).run_id == result.run_id
    assert checkpoint.load_state(folder.latest).step == 10

    with pytest.raises(UserError, match="batch_size was 8 and is now 4"):
        run_training(dataclasses.replace(longer, batch_size=4), is_quiet=True)
    inputs = load_inputs(resolve(longer, lambda _: 1), tracker.NullTracker())
    other, latest = dataclasses.replace(inputs, data_fingerprint="other"), folder.latest_valid()
    with pytest.raises(UserError, match="was trained on data set"):
        refuse_conflicts(other, latest)
    refuse_conflicts(dataclasses.replace(other, config=dataclasses.replace(other.config, force=True)), latest)
