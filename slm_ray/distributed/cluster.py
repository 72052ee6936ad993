"""Which Ray a command runs on.

In: RAY_ADDRESS. Out: this process connected to the cluster it names (a submitted job has it set), or to a local Ray of
its own. A cluster that merely runs on this machine is not joined: its address may be left over from one that was
killed, and Ray ends a process that asks a dead one, after a minute and without a word to mend it by.
"""

import contextlib
import logging
import math
import os
import signal
import socket
import threading
from collections.abc import Iterator
from typing import Any

import ray

from slm_ray.config.schema import TrainConfig
from slm_ray.distributed import surroundings
from slm_ray.errors import UserError, one_line
from slm_ray.limits import core_count, machine_cores

MAX_CPU_WORKERS = 2

LOGGER = logging.getLogger(__name__)
LOCAL = "local"
ANSWER_TIMEOUT_S = 5.0
METRICS_PORT = "SLM_METRICS_PORT"
"""Variable with the port at which a local Ray exports its metrics; by default a free one."""
LEAN_ENVIRONMENT = {
    "RAY_prestart_worker_first_driver": "0",  # a worker started ahead that nobody asks for stays
    "RAY_enable_worker_prestart": "0",
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",  # a node that is taken away takes its driver with it
    "RAY_LOG_MONITOR_MANY_FILES_THRESHOLD": "0",  # look for new log files, which nobody is shown, now and then ...
    "LOG_NAME_UPDATE_INTERVAL_S": "10",  # ... not ten times a second
}
"""What a local Ray does without. Its 27 processes wake 2,300 times a second for nothing, and each time one of the
threads that train waits for them and the others for it: an eighth of the speed of a training on two cores."""

_started_here = ""


def connect(*, with_dashboard: bool = False, cpus: float = 0) -> bool:
    """Connect once a process. Returns whether the Ray was started here, and so ends with this process.

    cpus: what the workers that were asked for in so many words take. Where this process may use fewer, and the machine
    has as many, a local Ray lets them share those.

    A local Ray does without what only a cluster needs (see `LEAN_ENVIRONMENT`; what the user set stays) and, unless
    asked for, without the dashboard, which Train's cleaner of lost trials asks who is alive.

    Raises:
        UserError: RAY_ADDRESS names no cluster that answers, SLM_METRICS_PORT is no port, or a local Ray does not
            start.
    """
    address = os.environ.get("RAY_ADDRESS") or LOCAL
    if ray.is_initialized():
        return address == LOCAL
    quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
    if address == LOCAL:
        _start_local(with_dashboard, cpus, quiet)
        return True
    _check_answers(address)
    try:
        with _own_sigterm():
            ray.init(address, **quiet)
    except (ConnectionError, ValueError) as error:
        raise _no_answer(address) from error
    return False


def is_started_here() -> bool:
    """Whether this process started the Ray that it is connected to, which then ends with it."""
    return bool(ray.get_runtime_context().gcs_address == _started_here)


def _start_local(with_dashboard: bool, cpus: float, options: dict[str, Any]) -> None:
    global _started_here  # a process is connected to one Ray
    for name, value in LEAN_ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    port = _metrics_port()
    surroundings.keep_token()
    folder = surroundings.session_folder()
    options["num_cpus"] = _cpus_of_local(math.ceil(cpus))
    try:
        with _own_sigterm(), surroundings.short_tmpdir(folder):
            ray.init(LOCAL, include_dashboard=with_dashboard, _temp_dir=folder, _metrics_export_port=port, **options)
    except Exception as error:  # a plain one is what Ray raises where its processes do not come up in time
        logs = f"{folder}/session_latest/logs"
        raise UserError(f"no local Ray could be started: {one_line(error)} (its logs are in {logs})") from error
    _started_here = ray.get_runtime_context().gcs_address


def _cpus_of_local(wanted: int) -> int:
    """Ray itself knows no affinity and no group above, and of half a CPU it makes none."""
    count = core_count()
    if not count < wanted <= machine_cores():
        return count
    LOGGER.warning("workers share %d CPUs as if they were %d: fewer (--workers) would be as fast", count, wanted)
    return wanted


def _metrics_port() -> int | None:
    """The port of `SLM_METRICS_PORT`; None where it is not set. Raises: UserError when it is none."""
    given = os.environ.get(METRICS_PORT, "")
    if not given:
        return None
    if not (given.isascii() and given.isdigit() and 1 <= int(given) <= 65535):
        raise UserError(f"{METRICS_PORT} ({given}) must be a port, 1 to 65535")
    return int(given)


@contextlib.contextmanager
def _own_sigterm() -> Iterator[None]:
    """Keep what this process does on SIGTERM: Ray's own handler ends it without a word, with exit code 15."""
    before = signal.getsignal(signal.SIGTERM)
    try:
        yield
    finally:
        if callable(before) and threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, before)


def _check_answers(address: str) -> None:
    """Knock at HOST:PORT; any other form is left to Ray."""
    host, _, port = address.rpartition(":")
    if not port.isdigit() or "/" in host:
        return
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=ANSWER_TIMEOUT_S).close()
    except OSError as error:
        raise _no_answer(address) from error


def _no_answer(address: str) -> UserError:
    return UserError(f"no Ray cluster answers at RAY_ADDRESS={address}: unset it to start a local one")


def check_resources(config: TrainConfig) -> None:
    """On a single node, more workers than it has CPUs would wait for ever; a cluster of several may still grow.

    Raises:
        UserError: too many workers, or some would get a GPU and others none.
    """
    resources = ray.cluster_resources()
    cpus, gpus = resources.get("CPU", 0), resources.get("GPU", 0)
    fewest, _ = config.worker_range
    if config.precision == "fp16" and not gpus:
        raise UserError("precision fp16 needs a GPU, and there is none: take bf16 or fp32, or leave it to auto")
    if 0 < gpus < fewest:
        raise UserError(f"{config.workers} workers and {gpus:g} GPU(s): give --workers {int(gpus) or 1}, one each")
    wanted = least_cpus(config)
    if sum(node["Alive"] for node in ray.nodes()) == 1 and wanted > cpus:
        raise UserError(f"{config.workers} workers need {wanted:g} CPUs and this machine has {cpus:g}: lower --workers")


def least_cpus(config: TrainConfig) -> float:
    """CPUs that the fewest workers of a run take."""
    return config.worker_range[0] * config.cpus_per_worker


def default_workers(config: TrainConfig) -> int:
    """As many of the cluster's GPUs or, without one, of up to two CPU workers as have their `cpus_per_worker` and can
    share out the batch evenly."""
    is_local, resources = connect(), ray.cluster_resources()
    gpus, cpus = int(resources.get("GPU", 0)), resources.get("CPU", 1)
    cpus = min(cpus, core_count()) if is_local else cpus
    room = int(cpus / config.cpus_per_worker + 1e-9)
    there = max(1, min(gpus or MAX_CPU_WORKERS, room))
    if there < gpus:
        LOGGER.warning("%d of %d GPUs: %g CPUs have no room for more workers, of %g each (cpus_per_worker)",
                       there, gpus, cpus, config.cpus_per_worker)  # fmt: skip
    workers = largest_share(there, config.batch_size, config.accumulation_steps)
    if workers < there:
        LOGGER.warning(
            "%d workers of %d that are there: batch_size %d in %d accumulation steps is not divisible by more",
            workers, there, config.batch_size, config.accumulation_steps,
        )  # fmt: skip
    return workers


def largest_share(there: int, batch_size: int, accumulation_steps: int) -> int:
    """The largest number of workers, at most `there`, that a batch can be shared out among: `(3, 32, 1) -> 2`."""
    fitting = (count for count in range(there, 0, -1) if batch_size % (count * accumulation_steps) == 0)
    return next(fitting, 1)
