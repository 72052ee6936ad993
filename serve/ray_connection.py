"""The Ray that a server runs on: an existing cluster, or a local one with settings of ours.

In: RAY_ADDRESS. Out: a connection for the length of a block. `deployment.py` deploys into it.
"""

import contextlib
import logging
import os
from collections.abc import Iterator

import ray
from ray import serve

from serve.proxy_limits import CALLBACK, PROXY_CALLBACK
from serve.replica_port import PROXY_USES_GRPC
from serve.shutdown import GRACE_S, shutdown_deadline
from slm_ray import internals
from slm_ray.distributed import cluster
from slm_ray.errors import UserError

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


@contextlib.contextmanager
def ray_connection() -> Iterator[bool]:
    """Connect to the cluster that RAY_ADDRESS names, or start a local one; yields whether it was started.

    Raises:
        UserError: RAY_ADDRESS names a cluster that does not answer.
    """
    for name, value in LOCAL_SETTINGS.items():
        os.environ.setdefault(name, value)
    for name in ("ray", "ray.serve"):
        logging.getLogger(name).setLevel(logging.ERROR)
    try:
        yield cluster.connect()
    finally:
        with shutdown_deadline(GRACE_S):
            ray.shutdown()


def check_no_other_serve() -> None:
    """One cluster has one Ray Serve.

    Raises:
        UserError: it runs already.
    """
    client = internals.find("ray.serve.context:_get_global_client")
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
