"""Whether the parts of a cluster answer: asked over loopback, past any proxy that the environment names.

In: a layout. Out: what is ready. Nothing here starts or ends anything.
"""

import contextlib
import http.client
import json
import urllib.error
import urllib.request
from pathlib import Path

from infra.cluster.parts import BUCKET, Layout
from infra.cluster.state import TOKEN

ANSWER_S = 5.0
_OPENER = urllib.request.build_opener(urllib.request.ProxyHandler({}))


def ask(url: str, *, method: str = "GET", token: str = "") -> bytes | None:
    """The body of an answer; None where there is none, or an error."""
    headers = {"Authorization": f"Bearer {token}"} if token else {}
    request = urllib.request.Request(url, method=method, headers=headers)  # noqa: S310  # an address of ours
    with contextlib.suppress(OSError, http.client.HTTPException), _OPENER.open(request, timeout=ANSWER_S) as answer:
        return bytes(answer.read())
    return None


def has_store(layout: Layout) -> bool:
    """Whether the object store answers; its bucket is made where it is absent."""
    return ask(f"{layout.store}/{BUCKET}") is not None or ask(f"{layout.store}/{BUCKET}", method="PUT") is not None


def has_mlflow(layout: Layout) -> bool:
    """Whether the tracking server answers."""
    return ask(f"{layout.mlflow}/health") is not None


def alive_nodes(layout: Layout) -> set[str]:
    """Addresses of Ray's nodes that live, as the head sees them; none where it does not answer."""
    try:
        token = Path(layout.folder / TOKEN).read_text(encoding="utf-8")
        answer = ask(f"{layout.dashboard}/api/v0/nodes", token=token)
        nodes = json.loads(answer or b"{}")["data"]["result"]["result"]
        return {str(node["node_ip"]) for node in nodes if node["state"] == "ALIVE"}
    except (OSError, ValueError, KeyError, TypeError):
        return set()


def is_well(layout: Layout, node: str) -> bool:
    """Whether a node says so itself: a head that came back still knows of nodes that are gone."""
    return b"success" in (ask(f"{layout.agent(node)}/api/local_raylet_healthz") or b"")


def answers(layout: Layout, part: str, alive: set[str]) -> bool:
    """Whether a part does what it is for."""
    if part == "store":
        return has_store(layout)
    if part == "mlflow":
        return has_mlflow(layout)
    return layout.address(part) in alive and is_well(layout, part)
