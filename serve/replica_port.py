"""Where a replica listens for the proxy. Ray Serve opens that port on every interface and reads pickles from it.

In: the replica's process, before it is ready. Out: the port on one address alone: loopback, or where the proxy asks
replicas there (`BY_PORT`) and they may be on other machines, the address under which Ray knows this one. Serve has no
setting for it, so a function of its module is replaced (Ray 2.60).
"""

import functools
import os
from typing import Any

import ray
from ray.serve._private import replica

BY_PORT = "RAY_SERVE_PROXY_USE_GRPC"
"""Environment: 1 lets the proxy ask replicas by that port, at a fraction of the work for each piece of a stream."""
_OPENS = "add_port_to_grpc_server"


def keep_to_this_machine() -> None:
    """Call it in the replica, while it is being built.

    Raises:
        RuntimeError: this version of Ray opens the port in another way.
    """
    open_port = getattr(replica, _OPENS, None)
    if open_port is None:
        raise RuntimeError(f"ray.serve has no {_OPENS}: its replicas may listen on every interface")
    host = ray.util.get_node_ip_address() if os.environ.get(BY_PORT) == "1" else "127.0.0.1"
    setattr(replica, _OPENS, functools.partial(_open_at, open_port, host))


def _open_at(open_port: Any, host: str, server: Any, address: str) -> int:
    number = address.rpartition(":")[2]
    port: int = open_port(server, f"[{host}]:{number}" if ":" in host else f"{host}:{number}")
    return port
