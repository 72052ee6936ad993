"""The deployment on Ray Serve: the application, a server for the length of a block, the reports of its replicas.

In: options (`options.py`). Out: an application of Ray Serve; a running server. `app.py` is the command line;
`replica.py` is what each replica builds.
"""

import asyncio
import contextlib
import dataclasses
import re
import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastapi import FastAPI
from ray import serve
from ray.exceptions import RayError
from ray.serve import Application
from ray.serve.exceptions import RayServeException
from ray.serve.handle import DeploymentHandle

from serve.api.error_responses import RETRY_AFTER_S
from serve.api.settings import ApiSettings
from serve.gpus import check_gpus, device_for
from serve.listener import SharedListener, can_share, shared_listener
from serve.models.description import without_secrets
from serve.options import PROXY_SPARE_S, AppConfig, ServeConfig, app_config
from serve.ray_connection import check_no_other_serve, is_serve_running, ray_connection
from serve.replica_actors import DEPLOYMENT, replicas_gone_within
from serve.replica_port import check_replica_port
from serve.shutdown import GRACE_S, shutdown_deadline
from slm_ray import periodic
from slm_ray.errors import UserError
from slm_ray.tracking.mlflow_runs import resolve_uri

if TYPE_CHECKING:
    from serve.models.rollout import Rollout

APP_NAME = "slm-ray"
MAX_QUEUED = 64
SPARE_ONGOING = 1024
"""Requests that a replica takes beyond its slots and its queue: bodies under way, answers that nobody reads, what it
rejects by itself. So many that Serve's own line does not form, in which `/health` would stand behind them."""
FORWARD_S = 1.0
"""Time for the proxy to forward the last answers: a replica does not see whether they have arrived."""
CONTROLLER_POLL_S = 0.05
READING_S = 0.6 * GRACE_S
"""Time to read the last answers in another cluster; the rest of the grace is Serve's, to end there."""
QUIET_LOGGING = {"log_level": "WARNING", "enable_access_log": False}
_FAULT = re.compile(r"^((?:\w+\.)*)(\w*(?:Error|Exception))(?:: (?!Traceback \(most recent)(.+))?$", re.MULTILINE)
"""A line of a traceback that names an exception; Serve itself wraps one around another's whole traceback."""


class Stories:
    """What the process that started the server calls on a replica, beside its HTTP routes."""

    app: FastAPI

    @property
    def _rollout(self) -> "Rollout":
        rollout: Rollout = self.app.state.rollout
        return rollout

    async def drain(self, drain_s: float) -> None:
        """Take no more stories and wait until those that run are finished, but not for longer than `drain_s`."""
        await self._rollout.close(drain_s)
        await asyncio.gather(asyncio.to_thread(self.app.state.record.end), self.app.state.flush())

    async def __del__(self) -> None:
        """Ray Serve calls it in a replica that goes, one of too many for one, once its requests are answered."""
        with contextlib.suppress(AttributeError):  # it never came up
            await self.drain(0)

    async def check_health(self) -> None:
        """Ray Serve asks every few seconds, and starts another replica in place of one that raises."""
        self.app.state.record.look()
        self.app.state.exported.look()
        if self.app.state.http is not None and not self.app.state.http.is_alive:
            raise RuntimeError("the thread that answers connections has ended")
        await self._rollout.check()

    async def report(self) -> tuple[str, str]:
        """Which replica it is, and what it serves or how its last change of the version went."""
        detail = self._rollout.status.detail or f"serves {self._rollout.current.title}"
        return serve.get_replica_context().replica_id.unique_id, detail


def app(args: dict[str, Any]) -> Application:
    """Build the Serve application out of options by name; the model is found and read where a replica starts.

    With more waiting requests than `MAX_QUEUED` the proxy answers 429.

    Raises:
        UserError: an unknown option, or a value that is rejected.
    """
    return build_app(app_config(args))


def build_app(
    config: AppConfig, settings: ApiSettings | None = None, listener: SharedListener | None = None
) -> Application:
    """The Serve application; without settings, the keys are those of this process's environment.

    listener: of replicas that answer by themselves (`listener.py`); without one Ray Serve's proxy asks them.
    """
    reference, uri = _absolute(config.model), resolve_uri(config.tracking_uri)
    device = device_for(config)
    settings = dataclasses.replace(settings or config.api_settings(), has_proxy=not listener)

    def build() -> FastAPI:
        from serve.replica import build_api  # torch, which no other process needs to wait for

        return build_api(reference, uri, device, config, settings, listener)

    deployment = serve.deployment(
        name=DEPLOYMENT,
        **_scale(config),
        ray_actor_options=_reserved(device),
        max_ongoing_requests=config.rows + config.max_waiting + SPARE_ONGOING,
        max_queued_requests=MAX_QUEUED,
        backpressure_config={"status_code": 429, "retry_after_s": RETRY_AFTER_S},
        # One of too many has the time that its requests may take: a kill would answer them with 500 of the proxy.
        graceful_shutdown_timeout_s=max(config.drain_s, config.request_timeout_s + PROXY_SPARE_S),
        graceful_shutdown_wait_loop_s=0.5,
        health_check_period_s=2,
        max_constructor_retry_count=1,
        logging_config=QUIET_LOGGING,
    )
    return deployment(serve.ingress(build)(Stories)).bind()


def _reserved(device: str) -> dict[str, Any]:
    """No core, which would be no limit: with one, training on a small cluster would wait for ever for its last."""
    return {"num_cpus": 0} | ({"num_gpus": 1} if device == "cuda" else {})


def _scale(config: AppConfig) -> dict[str, Any]:
    """One replica more when all slots are in use, one less after minutes of idleness."""
    if config.most_replicas == config.replicas:
        return {"num_replicas": config.replicas}
    autoscaling = {
        "min_replicas": config.replicas,
        "max_replicas": config.most_replicas,
        "target_ongoing_requests": config.rows,
        "metrics_interval_s": 5,
        "look_back_period_s": 10,
        "upscale_delay_s": 10,
        "downscale_delay_s": 300,
    }
    return {"autoscaling_config": autoscaling}


def _absolute(reference: str) -> str:
    """A replica's working folder may be another."""
    return str(Path(reference).absolute()) if Path(reference).is_dir() else reference


@contextlib.contextmanager
def serving(config: ServeConfig, settings: ApiSettings) -> Iterator[DeploymentHandle]:
    """Start Serve in a cluster, and on leaving let running stories finish and end it.

    Raises:
        UserError: no cluster, one in which Serve runs already, a GPU that cannot be had, or the deployment fails.
    """
    check_replica_port()
    with ray_connection() as is_own_cluster, contextlib.ExitStack() as stack:
        check_no_other_serve()
        check_gpus(config, is_own_cluster=is_own_cluster)
        listener, handle = None, None
        if config.is_direct:
            if not (is_own_cluster and can_share()):
                raise UserError("ingress (direct) needs a Ray that is started here, on Linux or macOS: no RAY_ADDRESS")
            listener = stack.enter_context(shared_listener(config.host, config.port))
        try:
            handle = _deploy(config, settings, listener)
            yield handle
        finally:
            begun_s = time.monotonic()
            with shutdown_deadline(config.drain_s + GRACE_S):
                if handle is not None:
                    _drain(handle, config.drain_s)
                # A cluster of our own needs no tidying beyond that: deleting the application would answer the last
                # requests with 404 instead of 503.
                if not is_own_cluster:
                    left_s = config.drain_s + READING_S - (time.monotonic() - begun_s)
                    # Interrupted before Serve ran, there is none
                    with contextlib.suppress(RayServeException), replicas_gone_within(max(left_s, FORWARD_S)):
                        serve.shutdown()


def _deploy(config: ServeConfig, settings: ApiSettings, listener: SharedListener | None = None) -> DeploymentHandle:
    try:
        started = _start_serve(config, has_proxy=listener is None)
        handle = serve.run(build_app(config, settings, listener), name=APP_NAME, route_prefix="/")
        started.result()
        return handle
    except (RuntimeError, TimeoutError, RayError) as error:
        reason = _reason() or " ".join(str(error).split())
        raise UserError(f"the model could not be deployed: {without_secrets(reason)}") from error


def _start_serve(config: ServeConfig, *, has_proxy: bool) -> "Future[None]":
    """Start Ray Serve; returns when there is a controller, which starts replicas while the proxy still starts.

    Raises: what starting it raised by then; later the future does.
    """
    started: Future[None] = Future()

    def start() -> None:
        try:
            serve.start(
                proxy_location="HeadOnly" if has_proxy else "Disabled",
                http_options=_http_options(config),
                logging_config=QUIET_LOGGING,
            )
        except BaseException as error:
            started.set_exception(error)
        else:
            started.set_result(None)

    threading.Thread(target=start, name="start of Serve", daemon=True).start()
    while not (started.done() or is_serve_running()):
        time.sleep(CONTROLLER_POLL_S)
    if started.done():
        started.result()
    return started


def _http_options(config: ServeConfig) -> dict[str, Any]:
    """The proxy waits longer than the application, which answers a timeout in its own words."""
    timeout_s = config.request_timeout_s + PROXY_SPARE_S
    return {"host": config.host, "port": config.port, "request_timeout_s": timeout_s}


def _reason() -> str:
    """What a replica ended with: the last line of the traceback that Serve keeps, of Python's own errors with the name.

    `ModuleNotFoundError: No module named 'serve'`; without the name of ours, which say all of it.
    """
    with contextlib.suppress(RayServeException, RayError, KeyError):
        message = serve.status().applications[APP_NAME].deployments[DEPLOYMENT].message
        faults = _FAULT.findall(message)
        if faults:
            package, kind, said = faults[-1]
            return said if package and said else f"{kind}: {said}" if said else kind
    return ""


def _drain(handle: DeploymentHandle, drain_s: float) -> None:
    """Let every replica finish its running requests; meanwhile new ones are answered with 503."""
    with contextlib.suppress(Exception):  # a replica that died has nothing to finish
        handle.broadcast("drain", drain_s).results(timeout_s=drain_s + GRACE_S / 2)
    time.sleep(FORWARD_S)


@contextlib.contextmanager
def reporting(handle: DeploymentHandle, interval_s: float) -> Iterator[None]:
    """Within the block, a thread prints what each replica serves, whenever that changes."""
    known: dict[str, str] = {}

    def report() -> None:
        with contextlib.suppress(Exception):  # a replica that died just now is found missing the next time
            now = dict(handle.broadcast("report").results(timeout_s=interval_s + GRACE_S))
            for replica, detail in (dict.fromkeys(known, "is gone") | now).items():
                if known.get(replica) != detail:
                    print(f"replica {replica}: {detail}", flush=True)
            known.clear()
            known.update(now)

    with periodic.every(interval_s, report, at_end=False):
        yield
