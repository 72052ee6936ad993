"""Where a registered version is served, since when and until when, as a run of MLflow below the run that made it.

In: which version a server has taken up. Out: a run of the kind `deployment` for the time that it serves, and the tag
`deployment` of the version, which leads to it. A store that fails costs a line in the log, never an answer.
"""

import dataclasses
import datetime
import functools
import logging
import time
from collections import deque
from typing import Any

from slm_ray.locks.process_identity import is_gone, own_process
from slm_ray.tracking.delivery_queue import DeliveryQueue
from slm_ray.tracking.mlflow_runs import KIND, OFF, PARENT, client

LOGGER = logging.getLogger(__name__)
DEPLOYMENT = "deployment"
PROCESS = "process"
"""Tag of a deployment: which process serves."""
END_WITHIN_S = 5.0
RETRY_S = 60.0


@dataclasses.dataclass(frozen=True)
class Served:
    """A registered version that a server has taken up."""

    name: str
    version: str
    run_id: str
    """The run that it comes from."""


class DeploymentLog:
    """What one server, or one replica of it, serves; a thread tells the store."""

    def __init__(self, uri: str, place: str) -> None:
        """place: where it serves, as `HOST replica ID`; nothing is written with the store `none`."""
        self._uri, self._place = uri, place
        self._queue = DeliveryQueue("MLflow", LOGGER.warning)
        self._id = ""
        self._to_end: deque[str] = deque()
        self._served: Served | None = None
        self._recorded: Served | None = None
        self._tried_s = 0.0
        self._is_under_way = False

    def serve(self, served: Served) -> None:
        """Another version is served from now on."""
        self._served, self._tried_s = served, time.monotonic()
        if self._uri != OFF:
            self._is_under_way = True
            self._queue.put(self._end)  # by itself: where that fails, what is served now is recorded all the same
            self._queue.put(functools.partial(self._try_to_begin, served))

    def repeat(self) -> None:
        """Tell the store again what is served, where it did not take it, once in a while; returns at once."""
        if self._served is None or self._is_under_way or time.monotonic() - self._tried_s < RETRY_S:
            return
        if self._served != self._recorded:
            self.serve(self._served)
        elif self._to_end:
            self._tried_s = time.monotonic()
            self._queue.put(self._end_before)

    def end(self) -> None:
        """Nothing is served any more."""
        self.flush()
        if self._id or self._to_end:
            self._queue.put(self._end)
            self.flush()

    def flush(self) -> None:
        """Wait until the store has it, but not for long."""
        self._queue.flush(END_WITHIN_S)

    def _try_to_begin(self, served: Served) -> None:
        try:
            self._begin(served)
        finally:
            self._is_under_way = False

    def _begin(self, served: Served) -> None:
        store = client(self._uri)
        home = store.get_run(served.run_id).info.experiment_id
        _end_lost(store, home)
        title = f"{served.name} {served.version}"
        tags = {
            PARENT: served.run_id,
            KIND: DEPLOYMENT,
            "model_version": f"models:/{served.name}/{served.version}",
            "place": self._place,
            PROCESS: own_process(),
        }
        begun = store.create_run(home, run_name=f"{DEPLOYMENT} of {title}", tags=tags)
        self._id, self._recorded = begun.info.run_id, served
        since = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
        value = f"{self._place} since {since}, run {self._id}"
        store.set_model_version_tag(served.name, served.version, DEPLOYMENT, value)

    def _end_before(self) -> None:
        """End what was served before and the store did not end; what is served now goes on."""
        while self._to_end:
            client(self._uri).set_terminated(self._to_end[0])
            self._to_end.popleft()

    def _end(self) -> None:
        """End what is served no more, also what the store did not end before."""
        if self._id:
            self._to_end.append(self._id)
            self._id = ""
        self._end_before()


def _end_lost(store: Any, home: str) -> None:
    """Mark as killed what processes of this machine serve no more that could not say so."""
    running = f"tags.`{KIND}` = '{DEPLOYMENT}' AND attributes.status = 'RUNNING'"
    for run in store.search_runs([home], running, max_results=1000):
        if is_gone(run.data.tags.get(PROCESS, "")):
            store.set_terminated(run.info.run_id, "KILLED")
