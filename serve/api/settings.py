"""Settings of the HTTP interface: keys, limits, origins, where spans go.

In: SLM_API_KEYS; `serve/options.py` adds the options. Out: `ApiSettings`, with digests of the keys.
"""

import dataclasses
import hashlib
import importlib.util
import os
import urllib.parse
from collections.abc import Mapping
from pathlib import Path

from slm_ray.errors import UserError

KEYS_VARIABLE = "SLM_API_KEYS"
MIN_KEY_LENGTH = 8
ENDPOINT_HELP = "otlp_endpoint must be an address such as http://127.0.0.1:4318"
_EXPORTER = ("opentelemetry", "opentelemetry.exporter", "opentelemetry.exporter.otlp",
             "opentelemetry.exporter.otlp.proto", "opentelemetry.exporter.otlp.proto.http")  # fmt: skip
_OTLP_HEADERS = ("OTEL_EXPORTER_OTLP_HEADERS", "OTEL_EXPORTER_OTLP_TRACES_HEADERS")


@dataclasses.dataclass(frozen=True, kw_only=True)
class ApiSettings:
    """What protects the routes."""

    key_digests: tuple[bytes, ...] = ()
    """SHA-256 of every API key; without any, no key is asked for."""
    requests_per_minute: int = 0
    """Of one key, or without keys of one address; 0 does not limit."""
    cors_origins: tuple[str, ...] = ()
    """Origins whose pages may call this server, as https://example.org; `*` allows all. None by default."""
    allowed_hosts: tuple[str, ...] = ()
    """Names, as stories.example.org, by which requests may ask for this server beside its addresses; `*` allows all."""
    request_timeout_s: float = 300.0
    """Longest time for a request, waiting included."""
    has_proxy: bool = False
    """Whether Ray Serve's proxy is before it, which gives each answer an id."""
    max_choices: int = 32
    """Most stories that one request may ask for."""
    otlp_endpoint: str = dataclasses.field(default="", repr=False)
    """Where spans are sent (`tracing.py`); nowhere by default. It may hold a password."""


def key_digests(environment: Mapping[str, str] = os.environ) -> tuple[bytes, ...]:
    """Digests of the keys that SLM_API_KEYS names: a file with one a line, or the keys themselves with commas between.

    Raises:
        UserError: it is set but holds no key, or one that is too short to be a secret.
    """
    value = environment.get(KEYS_VARIABLE)
    if value is None:
        return ()
    try:
        path = Path(value).expanduser()
        if value.startswith(("/", "~", ".")) and not path.is_file():
            raise UserError(f"{KEYS_VARIABLE}: there is no file {value}")
        text = path.read_text(encoding="utf-8") if path.is_file() else value
    except (OSError, UnicodeDecodeError, ValueError) as error:
        raise UserError(f"{KEYS_VARIABLE}: the file cannot be read: {error}") from error
    keys = [key.strip() for key in text.replace(",", "\n").splitlines() if key.strip()]
    if not keys:
        raise UserError(f"{KEYS_VARIABLE} is set and holds no key: unset it, or give keys or a file of them")
    if any(len(key) < MIN_KEY_LENGTH for key in keys):
        raise UserError(f"{KEYS_VARIABLE}: a key must have at least {MIN_KEY_LENGTH} characters")
    return tuple(hashlib.sha256(key.encode()).digest() for key in keys)


def check_otlp_endpoint(endpoint: str) -> None:
    """Raises: UserError where it is no address, the packages that send are not installed, or the headers are none; ""
    is fine."""
    if not endpoint:
        return
    try:
        parts = urllib.parse.urlsplit(endpoint)
        is_address = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:
        is_address = False
    if not is_address:
        raise UserError(ENDPOINT_HELP)  # without what was given: it may hold a password in the wrong place
    if not all(importlib.util.find_spec(name) for name in _EXPORTER):  # stops at the first that is absent
        raise UserError("otlp_endpoint needs the packages of the extra `otlp`: pip install 'slm-ray[otlp]'")
    for name in _OTLP_HEADERS:  # what is none would not be sent, and the collector refuse all, without a word of why
        if not all(part.partition("=")[0].strip() and "=" in part for part in _parts(os.environ.get(name, ""))):
            raise UserError(f"{name} must hold headers as NAME=VALUE, with commas between: Authorization=Bearer%20KEY")


def _parts(text: str) -> list[str]:
    return [part for part in text.split(",") if part.strip()]


def forget_keys() -> None:
    """Take the keys out of the environment, once they are read: it is handed on to every process started from here."""
    os.environ.pop(KEYS_VARIABLE, None)
