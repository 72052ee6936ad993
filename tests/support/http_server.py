"""The application on a real socket: a uvicorn server in a thread, on a free loopback port."""

import contextlib
import socket
import threading
from collections.abc import Iterator
from pathlib import Path

import uvicorn

from serve.api.routes import create_api
from serve.api.settings import ApiSettings
from serve.models.loaded_model import LoadedModel
from serve.models.rollout import Rollout
from slm_ray.tracking.registry import resolve_model


@contextlib.contextmanager
def running(model: Path, settings: ApiSettings | None = None, *, rows: int = 4, waiting: int = 16) -> Iterator[str]:
    """Serve a checkpoint; yields the address."""
    rollout = Rollout(LoadedModel(resolve_model(str(model)), max_slots=rows, max_waiting=waiting))
    with socket.create_server(("127.0.0.1", 0)) as listener:
        config = uvicorn.Config(create_api(rollout, settings), log_level="critical", timeout_graceful_shutdown=5)
        server = uvicorn.Server(config)
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        try:
            yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        finally:
            server.should_exit = True
            thread.join()
