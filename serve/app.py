"""Stories over HTTP: the deployment and its command line. Ray Serve lives here only.

In: a registered model or the folder of a checkpoint. Out: `POST /generate`, `GET /health`, `GET /model` and a page,
until Ctrl-C. `api.py` has the routes, `schemas.py` the fields.

    python serve/app.py --model models:/tinystories@champion
    serve run serve.app:app model=models:/tinystories@champion
"""

if __name__ == "__main__":  # run as a script: the root of the checkout takes the place of serve/ on the path
    import sys
    from pathlib import Path

    sys.path[0] = str(Path(__file__).resolve().parents[1])
    from slm_ray.script import run

    run("serve.app")

import contextlib
import dataclasses
import logging
import os
import signal
import socket
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import FrameType

import ray
from fastapi import FastAPI
from pydantic import BaseModel, ConfigDict, Field
from ray import serve
from ray.serve import Application
from ray.serve.context import _get_global_client
from ray.serve.exceptions import RayServeException

from serve.api import create_api
from serve.refusals import RETRY_AFTER_S
from serve.rollout import start_rollout
from slm_ray import checkpoint, cluster
from slm_ray.command_line import parse
from slm_ray.errors import UserError, command, end_now
from slm_ray.registry import resolve_model
from slm_ray.script import quiet_environment
from slm_ray.tracking import resolve_uri

APP_NAME = "slm-ray"
DEFAULT_MODEL = "models:/tinystories@champion"
MAX_ONGOING = 32
MAX_QUEUED = 64
REQUEST_TIMEOUT_S = 300
TIDY_S = 20
QUIET = {"log_level": "WARNING", "enable_access_log": False}


@dataclasses.dataclass(frozen=True, kw_only=True)
class ServeConfig:
    """Serve stories over HTTP with Ray Serve, until Ctrl-C."""

    model: str = DEFAULT_MODEL
    """Registered model (models:/NAME@ALIAS or models:/NAME/VERSION) or folder of a checkpoint."""
    host: str = "127.0.0.1"
    """Address to listen on; 0.0.0.0 opens it to the network."""
    port: int = 8000
    """Port to listen on, 1 to 65535."""
    tracking_uri: str = ""
    """MLflow store of registered models; MLFLOW_TRACKING_URI or sqlite:///mlflow.db when not given."""
    replicas: int = 1
    """Processes that each hold the model."""

    def __post_init__(self) -> None:
        if not 1 <= self.port <= 65535:
            raise UserError(f"port ({self.port}) must be between 1 and 65535")
        if self.replicas < 1:
            raise UserError(f"replicas ({self.replicas}) must be at least 1")

    @property
    def url(self) -> str:
        """Where to ask, from this machine."""
        host = {"0.0.0.0": "127.0.0.1", "::": "[::1]"}.get(self.host, self.host)  # noqa: S104
        return f"http://{host}:{self.port}"


class AppOptions(BaseModel):
    """Arguments of `app`, as `serve run serve.app:app NAME=VALUE` or the `args` of a Serve config file give them."""

    model_config = ConfigDict(extra="forbid")

    model: str = Field(default_factory=lambda: os.environ.get("SLM_MODEL", DEFAULT_MODEL))
    tracking_uri: str = ""
    replicas: int = Field(1, ge=1)


def app(options: AppOptions) -> Application:
    """Build the Serve application; the model is found and read where a replica starts.

    With more waiting requests than `MAX_QUEUED` the proxy answers 429.
    """
    reference, uri, replicas = _absolute(options.model), resolve_uri(options.tracking_uri), options.replicas

    def build() -> FastAPI:
        return create_api(start_rollout(reference, uri, replicas))

    deployment = serve.deployment(
        name="stories",
        num_replicas=replicas,
        # A reservation, not a limit: with one, training on a small cluster would wait for ever for its last core.
        ray_actor_options={"num_cpus": 0},
        max_ongoing_requests=MAX_ONGOING,
        max_queued_requests=MAX_QUEUED,
        backpressure_config={"status_code": 429, "retry_after_s": RETRY_AFTER_S},
        graceful_shutdown_timeout_s=10,
        max_constructor_retry_count=1,
        logging_config=QUIET,
    )
    return deployment(serve.ingress(build)()).bind()


def _absolute(reference: str) -> str:
    """A replica's working folder may be another."""
    return str(Path(reference).absolute()) if Path(reference).is_dir() else reference


def check_port(host: str, port: int) -> None:
    """Refuse an address that cannot be listened on.

    Raises:
        UserError: it is in use, not of this machine, or not allowed.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind, protocol) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(address)
    except OSError as error:
        raise UserError(
            f"cannot listen on {host} port {port} ({error.strerror or error}): "
            "stop what listens there, or choose another with --port"
        ) from error


@contextlib.contextmanager
def joined_ray() -> Iterator[bool]:
    """Join the cluster that RAY_ADDRESS names, or start a local one; gives whether it was started.

    Raises:
        UserError: RAY_ADDRESS names a cluster that does not answer.
    """
    root = str(Path(__file__).resolve().parents[1])
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, (root, os.environ.get("PYTHONPATH"))))
    for name in ("ray", "ray.serve"):
        logging.getLogger(name).setLevel(logging.ERROR)
    try:
        yield cluster.connect(include_dashboard=False)
    finally:
        _begin_tidying()
        ray.shutdown()


@contextlib.contextmanager
def serving(config: ServeConfig) -> Iterator[None]:
    """Start Serve in a cluster, and on leaving end it.

    Raises:
        UserError: no cluster, one in which Serve runs already, or the deployment fails.
    """
    with joined_ray() as is_own_cluster:
        _refuse_second_serve()
        try:
            _deploy(config)
            yield
        finally:
            _begin_tidying()
            # Stories being written are finished first. A cluster of our own needs no tidying beyond that.
            with contextlib.suppress(RayServeException):  # interrupted before Serve ran
                serve.delete(APP_NAME) if is_own_cluster else serve.shutdown()


def _refuse_second_serve() -> None:
    running = _get_global_client(raise_if_no_controller_running=False)
    if running is not None:
        raise UserError(
            f"Ray Serve runs in this cluster already, at {running.http_config.host} port {running.http_config.port}: "
            "end it with `serve shutdown`, or add to it with `serve deploy`"
        )


def _deploy(config: ServeConfig) -> None:
    serve.start(
        proxy_location="HeadOnly",
        http_options={"host": config.host, "port": config.port, "request_timeout_s": REQUEST_TIMEOUT_S},
        logging_config=QUIET,
    )
    options = AppOptions(model=config.model, tracking_uri=config.tracking_uri, replicas=config.replicas)
    try:
        serve.run(app(options), name=APP_NAME, route_prefix="/")
    except RuntimeError as error:
        raise UserError(f"the model could not be deployed: {' '.join(str(error).split())}") from error


def _begin_tidying() -> None:
    """From here on no signal interrupts, and after `TIDY_S` the process ends all the same.

    Ray may wait for ever for a cluster that was interrupted while it started. One of our own ends with this process.
    """
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    watch = threading.Timer(TIDY_S, end_now)
    watch.daemon = True
    watch.start()


def _example(url: str) -> str:
    body = '{"prompt": "Once upon a time", "max_tokens": 200}'
    return f"curl {url}/generate -H 'Content-Type: application/json' -d '{body}'"


def _stop(_number: int, _frame: FrameType | None) -> None:
    raise SystemExit(0)


@command
def main(argv: Sequence[str] | None = None) -> int:
    """Check the model and the port, then serve until Ctrl-C (exit code 130) or SIGTERM (0)."""
    quiet_environment()
    about = (ServeConfig.__doc__ or "").splitlines()[0]
    config = parse(ServeConfig, argv, prog="serve/app.py", about=about, default=ServeConfig())
    model = resolve_model(config.model, config.tracking_uri)
    checkpoint.verify(model.path)
    check_port(config.host, config.port)
    signal.signal(signal.SIGTERM, _stop)
    with serving(config):
        signal.signal(signal.SIGTERM, _stop)  # Ray has put its own in place
        print(f"serving {model.name} {model.version} at {config.url} (Ctrl-C stops it)")
        print(_example(config.url), flush=True)
        threading.Event().wait()
    return 0
