"""A run's record and its MLflow run: each step once, whatever was away."""

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from mlflow import MlflowClient

from slm_ray.runs.history import History
from slm_ray.runs.train_state import Evaluation
from slm_ray.tracking import mlflow_runs
from slm_ray.training.run_log import MainRunLog


@pytest.fixture
def record(tmp_path: Path) -> History:
    return History(tmp_path / "metrics.jsonl")


def log(tracker: Any, record: History, steps: range) -> None:
    """What rank 0 does: a line of metrics each step, a validation with a story each tenth."""
    run_log = MainRunLog(record, tracker)
    for step in steps:
        run_log.step(step, {"train_loss": 5.0 - step / 10, "lr": 1e-3})
        if step % 10 == 0:
            run_log.evaluation(Evaluation(val_loss=4.0, step=step), sample=f"story of step {step}")


def steps_at(uri: str, run_id: str, name: str) -> Counter[int]:
    return Counter(metric.step for metric in mlflow_runs.client(uri).get_metric_history(run_id, name))


def assert_in_line(uri: str, run_id: str, last: int) -> None:
    assert steps_at(uri, run_id, "train_loss") == Counter(range(1, last + 1))
    assert steps_at(uri, run_id, "val_loss") == Counter(range(10, last + 1, 10))
    samples = {artifact.path for artifact in mlflow_runs.client(uri).list_artifacts(run_id, "samples")}
    assert samples == {f"samples/step-{step:08d}.txt" for step in range(10, last + 1, 10)}


def test_a_resumed_run_logs_no_step_twice_and_leaves_none_out(mlflow_uri: str, record: History) -> None:
    """Killed after step 27, resumed from the checkpoint of step 20: seven steps are done and written again."""
    run_id = mlflow_runs.start_run(mlflow_uri, "tests", "resumed", {}).run_id
    first = mlflow_runs.continue_run(mlflow_uri, run_id, record=record)
    log(first, record, range(1, 28))
    first.close()
    record.rewind(20)
    second = mlflow_runs.continue_run(mlflow_uri, run_id, record=record)
    log(second, record, range(21, 41))
    second.finish()
    assert_in_line(mlflow_uri, run_id, 40)


def test_what_a_killed_process_had_not_delivered_is_sent_by_the_driver_at_the_end(
    mlflow_uri: str, record: History
) -> None:
    driver = mlflow_runs.start_run(mlflow_uri, "tests", "killed", {}, record=record)
    log(mlflow_runs.continue_run("none", driver.run_id), record, range(1, 31))  # nothing of it reached the store
    driver.finish()
    assert_in_line(mlflow_uri, driver.run_id, 30)


def test_a_server_that_was_away_has_all_of_it_when_it_is_back_and_is_spoken_of_once(
    mlflow_uri: str, record: History, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_id = mlflow_runs.start_run(mlflow_uri, "tests", "away", {}).run_id
    said: list[str] = []
    tracker = mlflow_runs.MlflowTracker(mlflow_uri, run_id, said.append, record)
    log(tracker, record, range(1, 6))
    tracker.close()

    def away(*_: object, **__: object) -> None:
        raise OSError("no route to host")

    with monkeypatch.context() as patch:
        for name in ("log_batch", "log_text", "get_run"):
            patch.setattr(MlflowClient, name, away)
        log(tracker, record, range(6, 20))
        tracker.close()
    log(tracker, record, range(20, 23))
    tracker.close()
    assert_in_line(mlflow_uri, run_id, 22)
    assert said == [
        "MLflow does not take the records, they are kept with the run: no route to host",
        "MLflow did not take 16 records: --resume sends what is kept",
    ]


def test_an_answer_that_was_lost_on_the_way_doubles_nothing(
    mlflow_uri: str, record: History, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The store took the values, and the client heard of a broken connection."""
    run_id = mlflow_runs.start_run(mlflow_uri, "tests", "unheard", {}).run_id
    tracker = mlflow_runs.continue_run(mlflow_uri, run_id, lambda _: None, record)
    whole = MlflowClient.log_batch

    def unheard(self: MlflowClient, *given: Any, **named: Any) -> None:
        whole(self, *given, **named)
        raise ConnectionError("reset by peer")

    with monkeypatch.context() as patch:
        patch.setattr(MlflowClient, "log_batch", unheard)
        log(tracker, record, range(1, 13))
        tracker.close()
    tracker.finish()
    assert_in_line(mlflow_uri, run_id, 12)


def test_a_record_longer_than_one_request_is_sent_whole(mlflow_uri: str, record: History) -> None:
    lines = [{"step": step, "train_loss": 1.0, "lr": 0.1, "gradient_norm": 2.0} for step in range(1, 501)]
    record.path.write_text("".join(json.dumps(line) + "\n" for line in [*lines, {"message": "a word"}]))
    mlflow_runs.start_run(mlflow_uri, "tests", "long", {}, record=record).finish()
    (run,) = MlflowClient(mlflow_uri).search_runs(
        [MlflowClient(mlflow_uri).get_experiment_by_name("tests").experiment_id], "attributes.run_name = 'long'"
    )
    assert steps_at(mlflow_uri, run.info.run_id, "lr") == Counter(range(1, 501))


def test_steps_done_again_otherwise_are_shown_as_they_were_done_last(mlflow_uri: str, record: History) -> None:
    """A run that exploded is stopped, and goes on from its checkpoint with a lower rate."""
    run_id = mlflow_runs.start_run(mlflow_uri, "tests", "lower rate", {}).run_id
    for rate, loss, steps in ((1e-2, 9.0, range(1, 8)), (1e-3, 4.0, range(6, 10))):
        record.rewind(5)
        tracker = mlflow_runs.continue_run(mlflow_uri, run_id, record=record)
        for step in steps:
            MainRunLog(record, tracker).step(step, {"train_loss": loss, "lr": rate, "tokens_per_s": 100.0 * step})
        tracker.finish()
    store = mlflow_runs.client(mlflow_uri)
    for name, first, then in (("train_loss", 9.0, 4.0), ("lr", 1e-2, 1e-3)):
        shown = {metric.step: metric.value for metric in store.get_metric_history(run_id, name)}  # the last one counts
        assert shown == {step: first if step < 6 else then for step in range(1, 10)}
    assert steps_at(mlflow_uri, run_id, "train_loss") == Counter([*range(1, 10), 6, 7])
    mlflow_runs.continue_run(mlflow_uri, run_id, record=record).finish()  # type: ignore[attr-defined]
    assert steps_at(mlflow_uri, run_id, "train_loss") == Counter([*range(1, 10), 6, 7])
