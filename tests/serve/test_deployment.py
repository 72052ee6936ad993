"""What a deployment asks of Ray, by stand-ins for what a cluster has."""

import asyncio
import contextlib
import re
import threading
from collections.abc import Iterator
from types import SimpleNamespace

import pytest
import ray

from serve import deployment, gpus, replica_actors
from serve.gpus import check_gpus, device_for
from serve.options import AppConfig, ServeConfig
from slm_ray.config.devices import DeviceName
from slm_ray.errors import UserError

CASES = [
    ({}, 0, "cpu"),
    ({}, 1, "cuda"),
    ({"replicas": 2}, 1, "cpu"),  # one of them would wait for a GPU for ever
    ({"replicas": 2}, 2, "cuda"),
    ({"max_replicas": 3}, 2, "cpu"),
    ({"backend": "torch"}, 8, "cuda"),
    ({"backend": "onnx"}, 8, "cpu"),
    ({"device": "cpu"}, 8, "cpu"),
    ({"device": "cuda"}, 0, "cuda"),  # a cluster that grows may bring one
]


def has(monkeypatch: pytest.MonkeyPatch, there: float, free: float, replicas: int = 0) -> None:
    names = [f"SERVE_REPLICA::slm-ray#stories#{number}" for number in range(replicas)]
    monkeypatch.setattr(gpus, "replica_actors", lambda: names)
    monkeypatch.setattr(ray, "is_initialized", lambda: True)
    monkeypatch.setattr(ray, "cluster_resources", lambda: {"CPU": 8.0} | ({"GPU": there} if there else {}))
    monkeypatch.setattr(ray, "available_resources", lambda: {"CPU": 8.0} | ({"GPU": free} if free else {}))


@pytest.mark.parametrize(("options", "free", "expected"), CASES)
def test_replicas_get_a_gpu_each_or_none(
    monkeypatch: pytest.MonkeyPatch, options: dict[str, object], free: int, expected: str
) -> None:
    has(monkeypatch, there=free + 8, free=free)
    assert device_for(AppConfig(**options)) == expected  # type: ignore[arg-type]


def test_without_a_cluster_it_is_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    assert device_for(AppConfig()) == "cpu"


def test_a_gpu_for_a_backend_of_cpus_is_refused_at_the_start() -> None:
    with pytest.raises(UserError, match="onnx-int8 runs on the CPU"):
        AppConfig(device="cuda", backend="onnx-int8")


def test_another_deployment_of_the_same_application_keeps_its_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    has(monkeypatch, there=2, free=0, replicas=2)
    assert device_for(AppConfig(replicas=2)) == "cuda"
    assert device_for(AppConfig(replicas=3)) == "cpu"


@pytest.mark.parametrize(
    ("there", "replicas", "said"),
    [(0, 1, "no GPU here: leave it out"), (0, 2, "no GPU here"), (1, 2, "1 GPUs for 2 replicas here: .*--replicas 1$")],
)  # fmt: skip
def test_a_gpu_that_never_comes_is_refused_at_once(
    monkeypatch: pytest.MonkeyPatch, there: int, replicas: int, said: str
) -> None:
    has(monkeypatch, there=there, free=there)
    monkeypatch.setattr(deployment, "ray_connection", lambda: contextlib.nullcontext(True))
    monkeypatch.setattr(deployment, "check_no_other_serve", lambda: None)
    monkeypatch.setattr(deployment.serve, "start", lambda **_: pytest.fail("Serve starts"))
    config = ServeConfig(device="cuda", replicas=replicas)
    with pytest.raises(UserError, match=said), deployment.serving(config, config.api_settings()):
        pass


@pytest.mark.parametrize(
    ("device", "free", "said"),
    [("cuda", 0, "0 of 2 GPUs are free in this cluster: the replica may wait for one each\n"), ("cuda", 1, ""),
     ("cpu", 0, ""), ("auto", 0, "")],
)  # fmt: skip
def test_a_gpu_that_is_waited_for_is_said(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], device: DeviceName, free: int, said: str
) -> None:
    has(monkeypatch, there=2, free=free)
    check_gpus(AppConfig(device=device), is_own_cluster=False)
    assert capsys.readouterr().err == said


@pytest.fixture
def actors(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, str]]:
    """Named actors of a cluster that is not there, with their namespaces; a killed one is gone."""
    known = {
        "SERVE_REPLICA::slm-ray#stories#a1": "serve",
        "SERVE_REPLICA::other#stories-of-others#a2": "serve",
        "SERVE_REPLICA::slm-ray#stories#a3": "another",
        "SERVE_CONTROLLER_ACTOR": "serve",
        "stories": "serve",
    }
    listed = lambda all_namespaces: [{"name": name, "namespace": where} for name, where in known.items()]  # noqa: E731
    monkeypatch.setattr(replica_actors, "list_named_actors", listed)
    monkeypatch.setattr(ray, "get_actor", lambda name, namespace: name)
    monkeypatch.setattr(ray, "kill", known.pop)
    yield known


def test_a_replica_that_does_not_go_keeps_neither_port_nor_name(
    monkeypatch: pytest.MonkeyPatch, actors: dict[str, str]
) -> None:
    """In a cluster of others: Serve gives up a request that nobody reads after `request_timeout_s`, 300."""
    ended = threading.Event()

    def shut_down() -> None:  # as Serve does, whose own patience is shorter
        ended.set()

    monkeypatch.setattr(deployment, "ray_connection", lambda: contextlib.nullcontext(False))
    monkeypatch.setattr(deployment, "check_no_other_serve", lambda: None)
    monkeypatch.setattr(deployment, "_deploy", lambda *_: object())
    monkeypatch.setattr(deployment, "_drain", lambda *_: None)
    monkeypatch.setattr(deployment, "READING_S", 0.1)
    monkeypatch.setattr(deployment, "FORWARD_S", 0.1)
    monkeypatch.setattr(deployment.serve, "shutdown", shut_down)
    others = set(actors) - {"SERVE_REPLICA::slm-ray#stories#a1"}
    config = ServeConfig(drain_s=0)
    with deployment.serving(config, config.api_settings()):
        assert len(actors) == len(others) + 1
    assert ended.is_set() and set(actors) == others


def test_replicas_that_go_by_themselves_are_not_waited_for(actors: dict[str, str]) -> None:
    before = set(actors)
    with replica_actors.replicas_gone_within(3600):
        actors.pop("SERVE_REPLICA::slm-ray#stories#a1")
    assert len(actors) == len(before) - 1


def test_rays_proxy_answers_unless_replicas_are_asked_to(monkeypatch: pytest.MonkeyPatch) -> None:
    assert [ServeConfig(ingress=one).is_direct for one in ("auto", "proxy", "direct")] == [False, False, True]
    with pytest.raises(UserError, match="needs a fixed number of replicas"):
        ServeConfig(ingress="direct", max_replicas=2)
    monkeypatch.setattr(deployment, "ray_connection", lambda: contextlib.nullcontext(False))
    monkeypatch.setattr(deployment, "check_no_other_serve", lambda: None)
    config = ServeConfig(ingress="direct")
    with (
        pytest.raises(UserError, match="a Ray that is started here"),
        deployment.serving(config, config.api_settings()),
    ):
        pass


TRACEBACK = """The deployment failed to start 1 times in a row. It may be due to its constructor. Error:
\x1b[36mray::ServeReplica:slm-ray:stories.initialize_and_get_metadata()\x1b[39m (pid=1, ip=127.0.0.1)
  File "/x/ray/serve/_private/replica.py", line 1, in initialize
    raise RuntimeError(traceback.format_exc()) from None
RuntimeError: Traceback (most recent call last):
  File "/x/serve/deployment.py", line 1, in build
    from serve.replica import build_api
{last}
"""


@pytest.mark.parametrize(
    ("last", "reason"),
    [
        ("slm_ray.errors.UserError: the model is broken: mend it", "the model is broken: mend it"),
        ("ModuleNotFoundError: No module named 'serve'", "ModuleNotFoundError: No module named 'serve'"),
        ("ValueError: one\n\nDuring this, another:\n\nslm_ray.errors.UserError: two", "two"),
        ("slm_ray.errors.UserError: one\n\nDuring this, another:\n\nOSError: [Errno 5] two", "OSError: [Errno 5] two"),
        ("MemoryError", "MemoryError"),
        ("numpy.exceptions.TooBigError", "TooBigError"),
    ],
)
def test_what_a_replica_ended_with_is_one_line(monkeypatch: pytest.MonkeyPatch, last: str, reason: str) -> None:
    message = TRACEBACK.format(last=last)
    known = {"slm-ray": SimpleNamespace(deployments={"stories": SimpleNamespace(message=message)})}
    monkeypatch.setattr(deployment.serve, "status", lambda: SimpleNamespace(applications=known))
    monkeypatch.setattr(deployment, "_start_serve", lambda *_, **__: (_ for _ in ()).throw(RuntimeError("x" * 9999)))
    config = ServeConfig()
    with pytest.raises(UserError, match=f"^the model could not be deployed: {re.escape(reason)}$"):
        deployment._deploy(config, config.api_settings())


def test_a_replica_that_is_drained_sends_its_last_spans() -> None:
    done = []

    async def close(_: float) -> None:
        done.append("rollout")

    async def flush() -> None:
        done.append("spans")

    state = SimpleNamespace(record=SimpleNamespace(end=lambda: done.append("record")), flush=flush)
    replica = SimpleNamespace(app=SimpleNamespace(state=state), _rollout=SimpleNamespace(close=close))
    asyncio.run(deployment.Stories.drain(replica, 0))  # type: ignore[arg-type]
    assert done[0] == "rollout" and sorted(done[1:]) == ["record", "spans"]
