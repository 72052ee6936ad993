"""The attempts of a run, as children of its MLflow run."""

from mlflow.entities import Run

from slm_ray.tracking import mlflow_runs
from slm_ray.tracking.attempts import Attempt, end_lost_attempts, end_lost_run


def attempts(uri: str, run_id: str) -> list[Run]:
    store = mlflow_runs.client(uri)
    home = store.get_run(run_id).info.experiment_id
    return sorted(
        store.search_runs([home], f"tags.`mlflow.parentRunId` = '{run_id}'"), key=lambda run: run.info.run_name
    )


def test_each_start_is_a_child_and_one_that_was_killed_is_ended_by_the_next(mlflow_uri: str) -> None:
    run_id = mlflow_runs.start_run(mlflow_uri, "tests", "tried", {}).run_id
    killed = Attempt(mlflow_uri, run_id, {"from_step": 0, "workers": 2})
    killed.flush()
    second = Attempt(mlflow_uri, run_id, {"from_step": 10, "workers": 2})
    second.end("FINISHED", {"last_checkpoint_step": 20})
    first, last = attempts(mlflow_uri, run_id)
    assert (first.info.run_name, first.info.status) == ("attempt 1", "KILLED")
    assert (last.info.run_name, last.info.status) == ("attempt 2", "FINISHED")
    assert last.data.params == {"from_step": "10", "workers": "2"}
    assert last.data.tags["last_checkpoint_step"] == "20" and last.data.tags["slm_ray.kind"] == "attempt"


def test_the_driver_ends_what_its_workers_could_not_and_no_run_of_another(mlflow_uri: str) -> None:
    store = mlflow_runs.client(mlflow_uri)
    mine, other = (mlflow_runs.start_run(mlflow_uri, "tests", name, {}).run_id for name in ("mine", "other"))
    trial = mlflow_runs.start_run(mlflow_uri, "tests", "trial", {}, parent_run_id=mine).run_id
    for run_id in (mine, other):
        Attempt(mlflow_uri, run_id, {}).flush()
    end_lost_attempts(mlflow_uri, mine)
    assert [run.info.status for run in attempts(mlflow_uri, mine) if run.info.run_id != trial] == ["KILLED"]
    assert [run.info.status for run in attempts(mlflow_uri, other)] == ["RUNNING"]
    assert store.get_run(trial).info.status == "RUNNING"  # a child of another kind


def test_a_run_whose_only_process_was_killed_is_ended_once(mlflow_uri: str) -> None:
    store = mlflow_runs.client(mlflow_uri)
    run_id = mlflow_runs.start_run(mlflow_uri, "tests", "lost", {}).run_id
    Attempt(mlflow_uri, run_id, {}).flush()
    end_lost_run(mlflow_uri, run_id, "FAILED")
    assert store.get_run(run_id).info.status == "FAILED"
    assert [run.info.status for run in attempts(mlflow_uri, run_id)] == ["KILLED"]
    store.set_terminated(run_id, "FINISHED")
    end_lost_run(mlflow_uri, run_id, "KILLED")
    assert store.get_run(run_id).info.status == "FINISHED"


def test_a_store_that_is_gone_or_off_costs_nothing() -> None:
    for uri, run_id in (("http://127.0.0.1:9", "r1"), ("none", "r1"), ("sqlite:////nowhere/x.db", "")):
        Attempt(uri, run_id, {}).end("FAILED", {})
