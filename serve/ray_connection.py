"""The Ray that a server runs on: an existing cluster, or a local one with settings of ours.

In: RAY_ADDRESS. Out: a connection for the length of a block. `deployment.py` deploys into it.
"""

import contextlib
import importlib
import logging
import os
import threading
from collections.abc import Iterator

import ray

from serve.proxy_limits import CALLBACK, PROXY_CALLBACK
from serve.replica_port import PROXY_USES_GRPC
from serve.shutdown import GRACE_S, shutdown_deadline
from slm_ray import internals
from slm_ray.distributed import cluster
from slm_ray.errors import UserError
from slm_ray.limits import core_count

LOCAL_SETTINGS = {
    # A proxy that answers already, and was slow to start, is killed under its first request with Serve's 5 s.
    "RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S": "60",
    "RAY_SERVE_PROXY_HEALTH_CHECK_TIMEOUT_S": "30",
    PROXY_USES_GRPC: "1",
    PROXY_CALLBACK: CALLBACK,
    # uvicorn believes X-Forwarded-For of every client on this machine, and the rate limit with it.
    "FORWARDED_ALLOW_IPS": "",
}
"""Environment variables of a Ray that is started here."""
OF_RAY_SERVE = ("pandas", "fastapi", "uvicorn")
"""What others wrote and Ray Serve imports, most of its time."""
FEWEST_PROCESSES = 2
"""Of Ray Serve: the controller, and a replica or the proxy."""
PRESTART = "RAY_prestart_worker_first_driver"
"""Environment variable: with 1 Ray starts a process for each CPU before anybody asks for one."""
_CLIENT = "ray.serve.context:_get_global_client"


@contextlib.contextmanager
def ray_connection() -> Iterator[bool]:
    """Connect to the cluster that RAY_ADDRESS names, or start a local one; yields whether it was started.

    Raises:
        UserError: RAY_ADDRESS names a cluster that does not answer.
    """
    for name, value in LOCAL_SETTINGS.items():
        os.environ.setdefault(name, value)
    if core_count() <= FEWEST_PROCESSES:  # all are used, the second while the first still starts
        os.environ.setdefault(PRESTART, "1")
    for name in ("ray", "ray.serve"):
        logging.getLogger(name).setLevel(logging.ERROR)
    try:
        yield cluster.connect()
    finally:
        with shutdown_deadline(GRACE_S):
            ray.shutdown()


@contextlib.contextmanager
def imported_meanwhile(*names: str) -> Iterator[None]:
    """Import modules in a thread while the block waits for processes. What one raises, its next import raises.

    None of Ray's: two threads that read one package with circular imports may see a part of it.
    """

    def load() -> None:
        for name in names:
            with contextlib.suppress(Exception):
                importlib.import_module(name)

    thread = threading.Thread(target=load, name="imports", daemon=True)
    thread.start()
    try:
        yield
    finally:
        thread.join()


def is_serve_running() -> bool:
    """Whether there is a controller of Ray Serve that answers; False where this version does not say before its end."""
    client = internals.find(_CLIENT)
    return client is not None and client(raise_if_no_controller_running=False) is not None


def check_no_other_serve() -> None:
    """One cluster has one Ray Serve.

    Raises:
        UserError: it runs already.
    """
    from ray import serve

    client = internals.find(_CLIENT)
    if client is None:
        is_running, http = bool(serve.status().proxies or serve.status().applications), None
    else:
        running = client(raise_if_no_controller_running=False)
        is_running, http = running is not None, getattr(running, "http_config", None)
    if is_running:
        raise UserError(
            f"Ray Serve runs in this cluster already{f', at {http.host} port {http.port}' if http else ''}: "
            "end it with `serve shutdown`, or add to it with `serve deploy`"
        )
