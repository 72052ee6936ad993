"""Processes that wait, with everything imported, for the next trial of a sweep: to start its four takes ten seconds.

In: a process of Ray that belongs to a trial, its controller or one of its workers. Out: others of its kind, idle, which
Ray gives to the next trial. They have run nothing before: no seed, no weights and no memory of a GPU are shared. Only
where the sweep started its Ray itself, which ends with it.
"""

import contextlib
import importlib
import logging
import os
import threading
import uuid
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import ray

from slm_ray import internals

LOGGER = logging.getLogger(__name__)
HOOK_VARIABLE = "__RAY_WORKER_PROCESS_SETUP_HOOK_ENV_VAR"
"""Variable with the function that a process of Ray calls before all else, as its `worker_process_setup_hook`."""
HOOK = f"{__name__}.import_ahead"
CONTROLLER_MODULES = ("ray.train.torch", "slm_ray.distributed.ray_metrics")
WORKER_MODULES = ("slm_ray.distributed.worker_process",)
N_BESIDES_WORKERS = 3
"""Processes of a trial in the controller's environment: itself, Train's for checkpoints, and its cleaner."""
KEEP_S = 24 * 3600
"""How long one that nobody takes stays; all end with their Ray."""
ANSWER_TIMEOUT_S = 10.0
_BASE: type[Any] = internals.find("ray.train.v2._internal.execution.callback:WorkerGroupCallback", object)


@contextlib.contextmanager
def allowed() -> Iterator[None]:
    """Let the processes of a run that starts in the block take those that wait."""
    passed_on: set[str] = internals.find("ray.train.v2._internal.constants:ENV_VARS_TO_PROPAGATE", set())
    passed_on.add(HOOK_VARIABLE)
    os.environ[HOOK_VARIABLE] = HOOK
    try:
        yield
    finally:
        passed_on.discard(HOOK_VARIABLE)
        del os.environ[HOOK_VARIABLE]


def import_ahead() -> None:
    """Import what an order of `start` names, if there is one; a process that is wanted at once finds none."""
    with contextlib.suppress(Exception):  # whatever it is, the process can do without; an error would end it
        for order in _orders().iterdir():
            with contextlib.suppress(FileNotFoundError):  # another process has taken it
                modules = order.read_text(encoding="utf-8").split()
                order.unlink()
                for module in modules:
                    importlib.import_module(module)
                return


def start(modules: Sequence[str], count: int = 1) -> None:
    """Let this node start processes with the environment of this one, which import these modules.

    Where it cannot, the next trial waits for its own.
    """
    try:
        _ask_node(modules, count)
    except Exception as error:  # of gRPC, of the disk, or of another version of Ray
        LOGGER.debug("no process is started ahead: %s", error)


def start_worker(is_tracked: bool) -> None:
    """One like this worker, from a thread."""
    modules = (*WORKER_MODULES, *(["mlflow"] if is_tracked else []))
    threading.Thread(target=start, args=(modules,), daemon=True).start()


class ControllerSuccessor(_BASE):  # type: ignore[misc]  # Ray is not typed
    """In the process of a controller: starts its successor and those beside it, once its workers train."""

    def __init__(self) -> None:
        self._is_done = False

    def after_worker_group_training_start(self, *_: Any, **__: Any) -> None:
        """As Ray Train calls it, for each start of the workers."""
        if not self._is_done:
            self._is_done = True
            threading.Thread(target=start, args=(CONTROLLER_MODULES, N_BESIDES_WORKERS), daemon=True).start()


def _orders() -> Path:
    here = ray.get_runtime_context()
    folder: Path = Path(here.get_temp_dir()) / here.get_session_name() / "slm_ray_ahead" / here.get_node_id()
    return folder


def _ask_node(modules: Sequence[str], count: int) -> None:
    """`PrestartWorkers`, which Ray's own C++ asks a node for, and no Python of it."""
    channel_to = internals.find("ray._private.grpc_utils:init_grpc_channel")
    service = internals.find("ray.core.generated.node_manager_pb2_grpc:NodeManagerServiceStub")
    request_of = internals.find("ray.core.generated.node_manager_pb2:PrestartWorkersRequest")
    if channel_to is None or service is None or request_of is None:
        return
    here = ray.get_runtime_context()
    node = next(one for one in ray.nodes() if one["NodeID"] == here.get_node_id())
    # the language is left at 0, Python's number
    request = request_of(job_id=bytes.fromhex(here.get_job_id()), num_workers=count, keep_alive_duration_secs=KEEP_S)
    request.runtime_env_info.serialized_runtime_env = here.get_runtime_env_string()
    _orders().mkdir(parents=True, exist_ok=True)
    for _ in range(count):
        (_orders() / uuid.uuid4().hex).write_text(" ".join(modules), encoding="utf-8")
    with channel_to(f"{node['NodeManagerAddress']}:{node['NodeManagerPort']}") as channel:
        service(channel).PrestartWorkers(request, timeout=ANSWER_TIMEOUT_S)
