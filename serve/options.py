"""What can be set about a server, each option described once for the command line and for Ray Serve's config files.

In: `python serve/app.py --rows 16`, or the `args` of an application of `serve deploy`. Out: checked
options. `app.py` and `deployment.py` use them.
"""

import dataclasses
import os
from typing import Any, Literal

from pydantic import ConfigDict, TypeAdapter, ValidationError

from serve.api.settings import ApiSettings, check_otlp_endpoint, key_digests
from slm_ray.config.devices import DeviceName, check_device
from slm_ray.errors import UserError
from slm_ray.generation.backend import BackendName

Ingress = Literal["auto", "direct", "proxy"]
DEFAULT_MODEL = "models:/tinystories@champion"
PROXY_SPARE_S = 10.0
"""Beyond the longest time of a request, for what is not the application's."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class AppConfig:
    """How stories are served.

    Raises:
        UserError: a value is out of its range.
    """

    __pydantic_config__ = ConfigDict(extra="forbid")

    model: str = DEFAULT_MODEL
    """Registered model (models:/NAME@ALIAS or models:/NAME/VERSION), folder of a checkpoint, or a Llama, Qwen3, GPT-2
    or GPT-Neo that others made: its folder, or hub:OWNER/NAME[@REVISION]."""
    tracking_uri: str = ""
    """MLflow store of registered models; MLFLOW_TRACKING_URI or sqlite:///mlflow.db when not given."""
    replicas: int = 1
    """Processes that each hold the model; with --max-replicas the fewest."""
    max_replicas: int = 0
    """Most processes when many stories are asked for; 0 is as many as --replicas."""
    rows: int = 8
    """Stories that a replica writes at once."""
    max_waiting: int = 64
    """Requests that may wait in a replica for a row; more are answered with 429."""
    backend: BackendName = "auto"
    """What executes the model: auto is the fast one where there is one."""
    device: DeviceName = "auto"
    """Where it runs: auto is a GPU for each replica where so many of the cluster are free, else the CPU."""
    watch_interval_s: float = 5.0
    """Seconds between two looks at whether --model points to another version."""
    request_timeout_s: float = 300.0
    """Longest time of a request, waiting included."""
    drain_s: float = 30.0
    """Longest time that running stories get when the server stops."""
    requests_per_minute: int = 0
    """Of one API key, or without keys of one address, to each replica; 0 does not limit."""
    cors_origins: tuple[str, ...] = ()
    """Origins whose pages may call this server, as https://example.org; none by default."""
    allowed_hosts: tuple[str, ...] = ()
    """Names by which it may be asked for, as stories.example.org, beside localhost, this machine's name and any
    address; `*` allows all."""
    max_choices: int = 32
    """Most stories that one request to an OpenAI route may ask for."""
    otlp_endpoint: str = dataclasses.field(default="", repr=False)
    """Where spans of requests go by OTLP over HTTP, as http://127.0.0.1:4318; none are made by default."""

    def __post_init__(self) -> None:
        for name in ("replicas", "rows", "max_choices"):
            _check(name, getattr(self, name), 1)
        for name in ("max_waiting", "drain_s", "requests_per_minute"):
            _check(name, getattr(self, name), 0)
        check_device(self.device, self.backend)
        check_otlp_endpoint(self.otlp_endpoint)
        if self.max_replicas and self.max_replicas < self.replicas:
            raise UserError(f"max_replicas ({self.max_replicas}) must be at least replicas ({self.replicas})")
        for name in ("watch_interval_s", "request_timeout_s"):
            if not 0 < getattr(self, name) < float("inf"):
                raise UserError(f"{name} ({getattr(self, name)}) must be above 0")

    def api_settings(self) -> ApiSettings:
        """What protects the routes, with the keys of the environment.

        Raises:
            UserError: SLM_API_KEYS holds no keys.
        """
        return ApiSettings(
            key_digests=key_digests(),
            requests_per_minute=self.requests_per_minute,
            cors_origins=self.cors_origins,
            allowed_hosts=self.allowed_hosts,
            request_timeout_s=self.request_timeout_s,
            otlp_endpoint=self.otlp_endpoint,
            max_choices=min(self.max_choices, self.rows + self.max_waiting),  # more could never be taken at once
        )

    @property
    def most_replicas(self) -> int:
        """Processes at most."""
        return self.max_replicas or self.replicas


@dataclasses.dataclass(frozen=True, kw_only=True)
class ServeConfig(AppConfig):
    """Serve stories over HTTP with Ray Serve, until Ctrl-C."""

    host: str = "127.0.0.1"
    """Address to listen on; 0.0.0.0 opens it to the network."""
    port: int = 8000
    """Port to listen on, 1 to 65535."""
    ingress: Ingress = "auto"
    """Who answers connections: Ray Serve's proxy before the replicas (proxy, and auto), or the replicas themselves
    (direct), which is faster, where they share this machine and their number is fixed."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 1 <= self.port <= 65535:
            raise UserError(f"port ({self.port}) must be between 1 and 65535")
        if self.ingress == "direct" and self.most_replicas != self.replicas:
            raise UserError("ingress (direct) needs a fixed number of replicas: leave out max_replicas, or take proxy")

    @property
    def is_direct(self) -> bool:
        """Whether replicas answer connections by themselves."""
        return self.ingress == "direct"

    @property
    def url(self) -> str:
        """Where to ask, from this machine."""
        host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(self.host, self.host)  # noqa: S104
        return f"http://{f'[{host}]' if ':' in host else host}:{self.port}"


def _check(name: str, value: float, least: int) -> None:
    if not least <= value < float("inf"):
        raise UserError(f"{name} ({value}) must be at least {least}")


def app_config(args: dict[str, Any]) -> AppConfig:
    """Options out of the `args` of a Serve config file.

    The environment variable SLM_MODEL names the model where they do not.

    Raises:
        UserError: an unknown option, or a value that is rejected.
    """
    named = {"model": os.environ.get("SLM_MODEL", DEFAULT_MODEL)} | args
    try:
        return TypeAdapter(AppConfig).validate_python(named)
    except ValidationError as error:
        first = error.errors()[0]
        name = ".".join(str(part) for part in first["loc"])
        raise UserError(f"option {name}: {first['msg'][:1].lower()}{first['msg'][1:]}") from error
