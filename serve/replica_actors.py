"""The replicas in a cluster, by the names that Ray Serve gives to their actors.

In: the name of the deployment. Out: which replicas there are; an end of those that Serve would wait for too long.
`gpus.py` and `deployment.py` ask.
"""

import contextlib
import threading
import time
from collections.abc import Iterator

import ray
from ray.util import list_named_actors

DEPLOYMENT = "stories"
POLL_S = 0.2
_SERVE, _REPLICA = "serve", "SERVE_REPLICA::"


def replica_actors() -> list[str]:
    """Names of the actors, `SERVE_REPLICA::APP#stories#ID`."""
    actors = ((str(one["name"]), one["namespace"]) for one in list_named_actors(all_namespaces=True))
    return [
        name for name, where in actors
        if where == _SERVE and name.startswith(_REPLICA) and name.split("#")[-2:-1] == [DEPLOYMENT]
    ]  # fmt: skip


@contextlib.contextmanager
def replicas_gone_within(seconds: float) -> Iterator[None]:
    """Kill those that are there after so long, in a block that ends Serve, and return once none are.

    Serve itself waits for a replica with a reader that does not read, or one that hangs, as long as a request may take;
    until then it keeps its port and its name.
    """
    timer = threading.Timer(seconds, _end)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        with contextlib.suppress(Exception):  # Ray is gone, and they are
            while timer.is_alive() and replica_actors():  # Serve's own patience has an end too
                time.sleep(POLL_S)
        timer.cancel()


def _end() -> None:
    with contextlib.suppress(Exception):
        for name in replica_actors():
            with contextlib.suppress(ValueError):  # it has just gone by itself
                ray.kill(ray.get_actor(name, namespace=_SERVE))
