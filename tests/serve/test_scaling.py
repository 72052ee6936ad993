"""One replica less while stories are written and another version is loaded: nobody is left without an answer."""

import asyncio
import concurrent.futures
import dataclasses
import threading
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import pytest

from slm_ray.runs import run_folder
from tests.support.ports import free_port
from tests.support.tiny_model import write_endless_model

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # Ray Serve uses deprecated features of pydantic
    from ray import serve

    from serve import deployment, replica
    from serve.api.routes import create_api
    from serve.api.settings import ApiSettings
    from serve.listener import SharedListener
    from serve.options import ServeConfig
    from serve.ray_connection import LOCAL_SETTINGS, ray_connection
pytestmark = pytest.mark.ray

WITHIN_S = 120.0
LONG = {"prompt": "The cat", "max_tokens": 2000, "seed": 1}


def scaled(config: ServeConfig) -> Any:
    """The deployment's settings in Serve."""
    return deployment.build_app(config)._bound_deployment._deployment_config


def test_a_replica_that_goes_has_the_time_that_a_request_may_take() -> None:
    """Serve kills it then, and what it writes would be cut off."""
    config = ServeConfig(model="nowhere", drain_s=1, request_timeout_s=200, max_replicas=2)
    settings = scaled(config)
    assert settings.graceful_shutdown_timeout_s > config.request_timeout_s
    assert scaled(dataclasses.replace(config, drain_s=900)).graceful_shutdown_timeout_s == 900
    assert (settings.autoscaling_config.min_replicas, settings.autoscaling_config.max_replicas) == (1, 2)


def test_a_replica_that_goes_says_that_it_serves_no_more() -> None:
    said: list[str] = []

    class Closing:
        async def close(self, drain_s: float) -> None:
            said.append(f"closed after {drain_s:g} s")

    async def flush() -> None:
        """There are no spans."""

    of_serve = deployment.Stories()
    record = SimpleNamespace(end=lambda: said.append("ended"))
    state = SimpleNamespace(rollout=Closing(), record=record, flush=flush)
    of_serve.app = SimpleNamespace(state=state)  # type: ignore[assignment]
    asyncio.run(of_serve.__del__())
    assert said == ["closed after 0 s", "ended"]
    unborn = deployment.Stories()
    asyncio.run(unborn.__del__())  # which never came up
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # nobody awaits what the interpreter's own end of them begins
        del of_serve, unborn


@pytest.mark.parametrize("is_direct", [False, True])
def test_a_replica_that_answers_by_itself_takes_no_more_and_finishes_what_it_has(
    is_direct: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Serve shuts the application down before it calls `__del__`, and knows nothing of those requests."""
    said: list[str] = []

    async def close(drain_s: float = 0) -> None:
        said.append(f"closed after {drain_s:g} s")

    async def shut_down() -> None:
        async with api.router.lifespan_context(api):
            pass

    rollout: Any = SimpleNamespace(close=close)
    api = create_api(rollout, ApiSettings(has_proxy=not is_direct))
    if is_direct:
        http = SimpleNamespace(leave=lambda: said.append("takes no more"), join=lambda _: said.append("all is sent"))
        monkeypatch.setattr(replica, "receive_listener", lambda _: None)
        monkeypatch.setattr(replica, "DirectHttp", lambda *_: http)
        listener = SharedListener(path="", address=())
        replica.answer_directly(api, rollout, listener, ServeConfig(request_timeout_s=200))
    asyncio.run(shut_down())
    assert said == (["takes no more", "closed after 200 s", "all is sent"] if is_direct else ["closed after 0 s"])


@pytest.fixture
def two_replicas(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A server of two replicas, of which Serve takes one away some seconds later; its address."""
    for name, value in LOCAL_SETTINGS.items():
        monkeypatch.setenv(name, value)
    config = ServeConfig(model=str(tmp_path / "best"), rows=4, port=free_port(), drain_s=0, watch_interval_s=0.2)
    autoscaling = {
        "min_replicas": 1, "initial_replicas": 2, "max_replicas": 2, "target_ongoing_requests": 1000,
        "look_back_period_s": 1, "metrics_interval_s": 0.2, "downscale_delay_s": 3,
    }  # fmt: skip
    monkeypatch.setattr(deployment, "_scale", lambda _: {"autoscaling_config": autoscaling})
    run_folder.link(tmp_path / "best", write_endless_model(tmp_path / "v1", seed=1))
    with ray_connection():
        deployment._deploy(config, config.api_settings(), None)
        yield config.url


def running_replicas() -> int:
    states = serve.status().applications[deployment.APP_NAME].deployments[deployment.DEPLOYMENT].replica_states
    return sum(states.values())


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_stories_of_a_replica_that_goes_are_finished_while_another_version_is_loaded(
    two_replicas: str, tmp_path: Path
) -> None:
    second, stop = write_endless_model(tmp_path / "v2", seed=2), threading.Event()

    def ask() -> list[httpx.Response]:
        answers = []
        while not stop.is_set():
            answers.append(httpx.post(f"{two_replicas}/generate", json=LONG, timeout=WITHIN_S))
        return answers

    with concurrent.futures.ThreadPoolExecutor(6) as pool:
        clients = [pool.submit(ask) for _ in range(6)]
        try:
            assert running_replicas() == 2
            run_folder.link(tmp_path / "best", second)
            deadline = time.monotonic() + WITHIN_S
            while running_replicas() > 1:
                assert time.monotonic() < deadline, "no replica went"
                time.sleep(0.2)
            time.sleep(1)  # some stories more
        finally:
            stop.set()
        answers = [answer for client in clients for answer in client.result(WITHIN_S)]
    assert {answer.status_code for answer in answers} == {200}
    assert all(len(answer.json()["story"]) > len(LONG["prompt"]) for answer in answers)  # type: ignore[arg-type]
    texts = {answer.json()["story"] for answer in answers}
    assert len(texts) <= 2  # each is a whole one, of the old version or, once that is loaded, of the new one
