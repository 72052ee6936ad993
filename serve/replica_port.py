"""The gRPC port of a replica, bound to one address: Ray Serve binds it to every interface and reads pickles from it.

In: the replica's process, before it is ready. Out: the port on loopback alone; where the proxy calls replicas over it
(`PROXY_USES_GRPC`) and they may be on other machines, on this node's address in the cluster. Serve has no setting for
it, so a function of its module is replaced (Ray 2.60).
"""

import functools
import importlib
import os
from typing import Any

import ray

from slm_ray import internals
from slm_ray.errors import UserError

PROXY_USES_GRPC = "RAY_SERVE_PROXY_USE_GRPC"
"""Environment variable: with 1 the proxy calls replicas over gRPC, at a fraction of the work for each streamed
chunk."""
_REPLICA, _OPEN_PORT = "ray.serve._private.replica", "add_port_to_grpc_server"


def check_replica_port() -> None:
    """Call it before a server starts.

    Raises:
        UserError: this version of Ray opens the port in another way.
    """
    if internals.find(f"{_REPLICA}:{_OPEN_PORT}") is None:
        raise UserError(
            f"Ray {ray.__version__} opens the ports of its replicas in a way that is not known here, and they would "
            "listen on every interface: install the version that constraints.txt names"
        )


def bind_replica_port() -> None:
    """Call it in the replica, while it is being built.

    Raises:
        UserError: this version of Ray opens the port in another way.
    """
    check_replica_port()
    open_port = internals.find(f"{_REPLICA}:{_OPEN_PORT}")
    host = ray.util.get_node_ip_address() if os.environ.get(PROXY_USES_GRPC) == "1" else "127.0.0.1"
    setattr(importlib.import_module(_REPLICA), _OPEN_PORT, functools.partial(_open_at, open_port, host))


def _open_at(open_port: Any, host: str, server: Any, address: str) -> int:
    number = address.rpartition(":")[2]
    port: int = open_port(server, f"[{host}]:{number}" if ":" in host else f"{host}:{number}")
    return port
