"""The attempts of a run: a child of its MLflow run for each time that its workers began.

In: what an attempt began with, and how it ended. Out: child runs; one that was killed could not say so, which the next
attempt or the driver does for it. A store that fails costs a line in the log, never the training.
"""

import logging
from collections.abc import Mapping
from typing import Any

from slm_ray.tracking.delivery_queue import DeliveryQueue
from slm_ray.tracking.mlflow_runs import KIND, OFF, PARENT, client

LOGGER = logging.getLogger(__name__)
ATTEMPT = "attempt"


class Attempt:
    """One start of a run's workers, told to the store by a thread."""

    def __init__(self, uri: str, run_id: str, facts: Mapping[str, Any]) -> None:
        """facts: parameters of the child run, such as from_step and workers."""
        self._uri, self._run_id, self._facts = uri, run_id, facts
        self._id = ""
        self._queue = DeliveryQueue("MLflow", LOGGER.info)
        if run_id and uri != OFF:
            self._queue.put(self._begin)

    def end(self, status: str, facts: Mapping[str, Any]) -> None:
        """End it with MLflow's word (FINISHED, FAILED, KILLED); facts: its tags."""
        self.flush()
        if self._id:
            self._queue.put(lambda: self._end(status, facts))
            self.flush()

    def flush(self) -> None:
        """Wait until the store has it, but not for ever."""
        self._queue.flush()

    def _begin(self) -> None:
        from mlflow.entities import Param

        store = client(self._uri)
        number = 1 + len(_attempts(store, self._run_id))
        end_lost_attempts(self._uri, self._run_id)
        home = store.get_run(self._run_id).info.experiment_id
        tags = {PARENT: self._run_id, KIND: ATTEMPT}
        begun = store.create_run(home, run_name=f"{ATTEMPT} {number}", tags=tags)
        store.log_batch(begun.info.run_id, params=[Param(name, str(value)) for name, value in self._facts.items()])
        self._id = begun.info.run_id

    def _end(self, status: str, facts: Mapping[str, Any]) -> None:
        store = client(self._uri)
        for name, value in facts.items():
            store.set_tag(self._id, name, str(value))
        store.set_terminated(self._id, status)


def end_lost_attempts(uri: str, run_id: str) -> None:
    """Mark as killed what is still shown as running: only for who holds the run's lock. Raises what MLflow raises."""
    store = client(uri)
    for run in _attempts(store, run_id):
        if run.info.status == "RUNNING":
            store.set_terminated(run.info.run_id, "KILLED")


def end_lost_run(uri: str, run_id: str, status: str) -> None:
    """Give a run that status, and its attempts KILLED, where it is still shown as running: only for who knows that
    nobody works on it. Raises what MLflow raises."""
    store = client(uri)
    if store.get_run(run_id).info.status == "RUNNING":
        end_lost_attempts(uri, run_id)
        store.set_terminated(run_id, status)


def _attempts(store: Any, run_id: str) -> list[Any]:
    home = store.get_run(run_id).info.experiment_id
    mine = f"tags.`{PARENT}` = '{run_id}' AND tags.`{KIND}` = '{ATTEMPT}'"
    found, token = [], None
    while True:
        page = store.search_runs([home], mine, max_results=1000, page_token=token)
        found += page
        token = page.token
        if not token:
            return found
