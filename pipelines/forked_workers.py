"""Worker processes of Beam's FnApiRunner that are ready at once: forked from this process after its imports.

In: a number of workers. Out: `ForkedEnvironment`, in which the runner starts its workers. Used by `runners`. Beam
starts a worker as a new Python that imports Beam again, which takes about three seconds of a core. A fork has
everything imported, and shares that memory. Forks are made while this process has one thread, before any server runs.
With more threads, or when no fork is left, a worker is started as Beam does it.
"""

import contextlib
import ctypes
import json
import logging
import os
import signal
import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, NoReturn

from apache_beam.runners.portability.fn_api_runner.worker_handlers import SubprocessSdkWorkerHandler, WorkerHandler
from apache_beam.runners.worker import sdk_worker_main
from apache_beam.transforms.environments import Environment, SubprocessSDKEnvironment
from google.protobuf import json_format, text_format  # type: ignore[import-untyped, unused-ignore]

LOGGER = logging.getLogger(__name__)
URN = "slm_ray:env:forked:v1"
PR_SET_PDEATHSIG = 1  # of Linux' prctl


@dataclass(frozen=True)
class Fork:
    """A process that waits for its work, and ends when this one does."""

    pid: int
    pipe: int  # to send it its work

    @classmethod
    def make(cls, meanwhile: Callable[[], object]) -> "Fork":
        """Fork this process. The fork calls `meanwhile` before it waits."""
        receiving, sending = os.pipe()
        pid = os.fork()
        if not pid:
            for pipe in (sending, *(fork.pipe for fork in ForkedWorkerHandler.waiting)):
                os.close(pipe)  # or it would not notice the end of the process that made it
            _wait_and_work(receiving, meanwhile)
        os.close(receiving)
        return cls(pid, sending)

    def send(self, work: dict[str, Any]) -> None:
        """Send it its work."""
        with os.fdopen(self.pipe, "w") as pipe:
            pipe.write(json.dumps(work) + "\n")


def prepare_forks(n_workers: int, meanwhile: Callable[[], object]) -> None:
    """Fork workers for later, where it is safe: on Linux, as long as there is one thread.

    Each calls `meanwhile`, while this process plans.
    """
    if sys.platform == "linux" and threading.active_count() == 1:
        for _ in range(n_workers):
            ForkedWorkerHandler.waiting.append(Fork.make(meanwhile))


@Environment.register_urn(URN, bytes)
class ForkedEnvironment(SubprocessSDKEnvironment):
    """Where the steps run: in forks, or where there are none in processes of a command."""

    def to_runner_api_parameter(self, context: Any) -> tuple[str, bytes]:  # noqa: ARG002 - as Beam calls it
        """The command, under this environment's own name."""
        return URN, self.command_string.encode("utf-8")

    @staticmethod
    def from_runner_api_parameter(
        payload: bytes,
        capabilities: Any,
        artifacts: Any,
        resource_hints: Any,
        context: Any,  # noqa: ARG004 - as Beam calls it
    ) -> "ForkedEnvironment":
        """The environment that `to_runner_api_parameter` wrote."""
        return ForkedEnvironment(payload.decode("utf-8"), capabilities, artifacts, resource_hints)


@WorkerHandler.register_environment(URN, bytes)
class ForkedWorkerHandler(SubprocessSdkWorkerHandler):
    """Beam's view of one worker."""

    waiting: ClassVar[list[Fork]] = []
    log: ClassVar[str] = os.devnull  # file for what workers print
    _fork: Fork | None = None

    def start_worker(self) -> None:
        """Give a waiting fork the addresses that it needs."""
        environment = self._environment() if self.waiting else None
        if environment is None:
            super().start_worker()
            return
        self._fork = self.waiting.pop()
        self._fork.send({"environment": environment, "log": self.log})

    def _environment(self) -> dict[str, str] | None:
        """What a worker is told by its environment; None where this version of Beam tells it otherwise."""
        try:
            return {
                "CONTROL_API_SERVICE_DESCRIPTOR": text_format.MessageToString(self.control_api_service_descriptor()),
                "LOGGING_API_SERVICE_DESCRIPTOR": text_format.MessageToString(self.logging_api_service_descriptor()),
                "PIPELINE_OPTIONS": json_format.MessageToJson(self.provision_info.provision_info.pipeline_options),
                "WORKER_ID": self.worker_id,
            }
        except AttributeError as error:
            LOGGER.debug("workers are started as Beam does it: %s", error)
            return None

    def stop_worker(self) -> None:
        """Wait for its end, which comes with the end of the connection."""
        if self._fork is None:
            super().stop_worker()
        else:
            os.waitpid(self._fork.pid, 0)


def _wait_and_work(pipe: int, meanwhile: Callable[[], object]) -> NoReturn:
    """Run a fork: it ignores Ctrl-C, which is for the process that made it, and ends with that process."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # without it, a worker tries for a minute to reach the process that is gone
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    code = 1
    try:
        with contextlib.suppress(Exception):  # what fails now is said when it is needed
            meanwhile()
        with os.fdopen(pipe) as receiving:
            line = receiving.readline()
        if line:
            work = json.loads(line)
            log = os.open(work["log"], os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
            os.dup2(log, 1)
            os.dup2(log, 2)
            os.environ.update(work["environment"])
            sdk_worker_main.main([])
        code = 0
    finally:
        os._exit(code)
