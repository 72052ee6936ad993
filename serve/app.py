"""Command line of the server: stories over HTTP.

In: a registered model or the folder of a checkpoint. Out: `POST /generate`, `POST /v1/completions`, a conversation at
`POST /v1/chat/completions`, a page and more, until Ctrl-C. `api/` has the routes, `models/` the model behind them,
`deployment.py` puts both on Ray Serve.

    python serve/app.py --model models:/tinystories@champion

Ray Serve's config files (`serve deploy`, KubeRay) import `serve.app:app`. `serve run` is not for this: the Ray that it
starts listens on every interface, without a token. The options are in `options.py`.
"""

if __name__ == "__main__":
    import sys
    from pathlib import Path

    sys.path[0] = str(Path(__file__).resolve().parents[1])  # the checkout, in place of this folder
    from slm_ray.cli.script import run

    run("serve.app")

import contextlib
import signal
import threading
from collections.abc import Sequence
from types import FrameType
from typing import TYPE_CHECKING, Any

from serve.api.settings import forget_keys
from serve.options import ServeConfig
from slm_ray.cli.command import command
from slm_ray.cli.ports import check_port
from slm_ray.cli.script import set_default_environment
from slm_ray.config.options import parse
from slm_ray.errors import UserError

if TYPE_CHECKING:
    from ray.serve import Application


def app(args: dict[str, Any]) -> "Application":
    """The application for Ray Serve's config files: see `deployment.app`."""
    from serve import deployment

    return deployment.app(args)


@command
def main(argv: Sequence[str] | None = None) -> int:
    """Check the model and the port, then serve until Ctrl-C (exit code 130) or SIGTERM (0)."""
    set_default_environment()
    about = (ServeConfig.__doc__ or "").splitlines()[0]
    config = parse(ServeConfig, argv, prog="serve/app.py", about=about, default=ServeConfig())
    settings = config.api_settings()
    forget_keys()
    from slm_ray.runs import verification  # what `--help` and a wrong option need not wait for
    from slm_ray.tracking.registry import discard, resolve_model

    model = resolve_model(config.model, config.tracking_uri)
    try:
        verification.verify(model.path)
    finally:
        discard(model)
    _check_address(config.host, config.port)
    signal.signal(signal.SIGTERM, _stop)
    from serve.ray_connection import OF_RAY_SERVE, imported_meanwhile, ray_connection

    with contextlib.ExitStack() as stack:
        with imported_meanwhile(*OF_RAY_SERVE):  # Ray's processes take seconds to start
            stack.enter_context(ray_connection())
        from serve import deployment

        handle = stack.enter_context(deployment.serving(config, settings))
        stack.enter_context(deployment.reporting(handle, config.watch_interval_s))
        signal.signal(signal.SIGTERM, _stop)  # Ray has put its own in place
        print(f"serving {model.name} {model.version} at {config.url} (Ctrl-C stops it)")
        print(_example(config.url), flush=True)
        threading.Event().wait()
    return 0


def _check_address(host: str, port: int) -> None:
    try:
        check_port(host, port)
    except OSError as error:
        raise UserError(
            f"cannot listen on {host} port {port} ({error.strerror or error}): "
            "stop what listens there, or choose another with --port"
        ) from error


def _stop(_number: int, _frame: FrameType | None) -> None:
    raise SystemExit(0)


def _example(url: str) -> str:
    body = '{"prompt": "Once upon a time", "max_tokens": 200}'
    return f"curl {url}/generate -H 'Content-Type: application/json' -d '{body}'"
