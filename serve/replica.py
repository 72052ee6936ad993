"""What a replica builds when it starts: the model, its HTTP application, and what tells others about them.

In: options, in a process of Ray Serve. Out: the application. Imported there alone: torch takes more than a second of a
core, and the command, the controller and the proxy start on the same cores.
"""

import asyncio
import logging
import socket
from functools import partial

from fastapi import FastAPI
from ray import serve

from serve.api.metrics import Metrics
from serve.api.routes import create_api
from serve.api.settings import ApiSettings
from serve.direct_http import DirectHttp
from serve.listener import SharedListener, receive_listener
from serve.models.deployment_record import DeploymentRecord
from serve.models.rollout import Rollout, start_rollout
from serve.options import PROXY_SPARE_S, AppConfig
from serve.replica_metrics import ReplicaMetrics, metrics_of
from serve.replica_port import bind_replica_port
from slm_ray.config.devices import DeviceName
from slm_ray.tracking.deployments import DeploymentLog


def build_api(
    reference: str,
    uri: str,
    device: DeviceName,
    config: AppConfig,
    settings: ApiSettings,
    listener: SharedListener | None,
) -> FastAPI:
    """The application over the model that is served, found and read here.

    listener: of replicas that answer by themselves (`listener.py`); without one Ray Serve's proxy asks them.
    """
    bind_replica_port()
    _log_as_serve_does()
    rollout = start_rollout(
        reference,
        uri,
        config.most_replicas,
        max_slots=config.rows,
        max_waiting=config.max_waiting,
        backend=config.backend,
        device=device,
        watch_interval_s=config.watch_interval_s,
        drain_s=config.request_timeout_s,
    )
    api = create_api(rollout, settings)
    api.state.rollout = rollout
    replica = serve.get_replica_context().replica_id.unique_id
    api.state.record = DeploymentRecord(rollout, DeploymentLog(uri, f"{socket.gethostname()} replica {replica}"))
    api.state.exported = ReplicaMetrics(partial(_metrics_text, metrics_of(api), rollout), replica)
    api.state.http = answer_directly(api, rollout, listener, config) if listener else None
    return api


def answer_directly(api: FastAPI, rollout: Rollout, listener: SharedListener, config: AppConfig) -> DirectHttp:
    """Answer connections in this process. Ray Serve, which knows nothing of them, retires the replica at once.

    So it takes no more when the application is shut down, and what it has is given the time that a request may take.
    """
    slots = config.rows if config.replicas > 1 else 0
    http = DirectHttp(api, receive_listener(listener), slots, config.max_waiting)

    async def close() -> None:
        http.leave()
        await rollout.close(config.request_timeout_s)
        await asyncio.to_thread(http.join, PROXY_SPARE_S / 2)

    api.state.close = close
    return http


def _metrics_text(metrics: Metrics, rollout: Rollout) -> bytes:
    return metrics.text(rollout.current.load)


def _log_as_serve_does() -> None:
    """What this project logs goes where Ray Serve's own lines go: a file of the replica."""
    for name in ("serve", "slm_ray"):
        logger = logging.getLogger(name)
        logger.setLevel(logging.INFO)
        logger.handlers = list(logging.getLogger("ray.serve").handlers)
        logger.propagate = False
