"""Which Ray a command runs on."""

import dataclasses
import socket
from pathlib import Path
from typing import Any

import pytest

from slm_ray.config.schema import TrainConfig
from slm_ray.distributed import cluster
from slm_ray.distributed.workers import CLEANER_CALLBACK, UNUSED_CALLBACK, LeanTorchTrainer
from slm_ray.errors import UserError

pytestmark = pytest.mark.ray


def names(callbacks: list[Any]) -> set[str]:
    return {type(callback).__name__ for callback in callbacks}


def test_a_cluster_that_is_gone_is_said_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{probe.getsockname()[1]}"
    monkeypatch.setenv("RAY_ADDRESS", address)
    with pytest.raises(UserError, match=f"no Ray cluster answers at RAY_ADDRESS={address}"):
        cluster.connect()


@pytest.mark.parametrize("address", ["http://127.0.0.1:8265", "nonsense"])
def test_an_address_that_is_none_is_one_clear_line(monkeypatch: pytest.MonkeyPatch, address: str) -> None:
    monkeypatch.setenv("RAY_ADDRESS", address)
    with pytest.raises(UserError, match="no Ray cluster answers"):
        cluster.connect()


def test_elsewhere_only_what_is_never_used_is_left_out(local_ray: Any) -> None:
    trainer = LeanTorchTrainer(print)
    all_names = names(super(LeanTorchTrainer, trainer)._create_default_callbacks())
    assert {UNUSED_CALLBACK, CLEANER_CALLBACK} < all_names, "Ray names them otherwise now"
    assert names(trainer._create_default_callbacks()) == all_names - {UNUSED_CALLBACK}
    assert not cluster.is_started_here()
    assert local_ray.is_initialized()


@pytest.mark.parametrize(
    ("there", "batch_size", "accumulation_steps", "expected"),
    [(3, 32, 1, 2), (8, 32, 1, 8), (7, 32, 4, 4), (6, 32, 1, 4), (5, 7, 1, 1), (4, 6, 4, 1), (1, 32, 1, 1)],
)
def test_as_many_workers_as_share_the_batch_evenly(
    there: int, batch_size: int, accumulation_steps: int, expected: int
) -> None:
    assert cluster.largest_share(there, batch_size, accumulation_steps) == expected


@pytest.mark.parametrize(
    ("gpus", "cpus", "cpus_per_worker", "expected"),
    [
        (1, 16, 1.0, 1), (2, 16, 1.0, 2), (8, 16, 1.0, 8), (7, 16, 1.0, 4), (8, 4, 1.0, 4), (8, 16, 4.0, 4),
        (0, 2, 2.0, 1), (0, 2, 1.0, 2), (0, 64, 1.0, 2), (0, 4, 0.5, 2), (2, 1, 4.0, 1),
    ],
)  # fmt: skip
def test_without_an_option_no_more_workers_are_taken_than_there_are_gpus_and_cpus_for(
    gpus: int,
    cpus: int,
    cpus_per_worker: float,
    expected: int,
    tiny_config: TrainConfig,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    resources = {"CPU": float(cpus)} | ({"GPU": float(gpus)} if gpus else {})
    monkeypatch.setattr(cluster, "connect", lambda: False)
    monkeypatch.setattr(cluster.ray, "cluster_resources", lambda: resources)
    monkeypatch.setattr(cluster.ray, "nodes", lambda: [{"Alive": True}])
    config = dataclasses.replace(tiny_config, batch_size=32, workers=0, cpus_per_worker=cpus_per_worker)
    workers = cluster.default_workers(config)
    assert workers == expected
    if cpus >= cpus_per_worker:
        cluster.check_resources(dataclasses.replace(config, workers=workers))


@pytest.mark.parametrize("given", ["0", "65536", "80a", "-1"])
def test_a_metrics_port_that_is_none_is_one_line_before_a_ray_starts(
    given: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setenv(cluster.METRICS_PORT, given)
    monkeypatch.setattr(cluster.ray, "is_initialized", lambda: False)
    monkeypatch.setattr(cluster.ray, "init", lambda *_, **__: pytest.fail("a Ray starts"))
    with pytest.raises(UserError, match=rf"^SLM_METRICS_PORT \({given}\) must be a port, 1 to 65535$"):
        cluster.connect()


@pytest.mark.parametrize(
    ("wanted", "expected"), [(0, 3), (2, 3), (3, 3), (3.5, 4), (4, 4), (6, 6), (7, 3), (64, 3)]
)  # fmt: skip
def test_a_local_ray_has_the_cores_that_this_process_may_use(
    wanted: float, expected: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Ray counts those of the machine, whatever this process may run on, and of half a CPU it makes none. What was
    asked for in so many words shares them, as far as the machine has as many."""
    seen: dict[str, Any] = {}

    def init(*_: object, **options: Any) -> None:
        seen.update(options)
        raise RuntimeError("enough was seen")

    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr(cluster, "core_count", lambda: 3)
    monkeypatch.setattr(cluster, "machine_cores", lambda: 6)
    monkeypatch.setattr(cluster.surroundings, "keep_token", lambda: None)
    monkeypatch.setattr(cluster.surroundings, "session_folder", lambda: str(tmp_path))
    for name in cluster.LEAN_ENVIRONMENT:
        monkeypatch.setenv(name, "0")
    monkeypatch.setattr(cluster.ray, "is_initialized", lambda: False)
    monkeypatch.setattr(cluster.ray, "init", init)
    with pytest.raises(UserError, match="enough was seen"):
        cluster.connect(cpus=wanted)
    assert seen["num_cpus"] == expected
    said = f"workers share 3 CPUs as if they were {expected}: fewer (--workers) would be as fast"
    assert [record.message for record in caplog.records] == ([said] if expected > 3 else [])


def test_without_an_option_workers_follow_the_quota_where_others_share_it(
    tiny_config: TrainConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The last training of a sweep, whose trials were given more workers than there are cores."""
    monkeypatch.setattr(cluster, "connect", lambda: True)
    monkeypatch.setattr(cluster, "core_count", lambda: 1)
    monkeypatch.setattr(cluster.ray, "cluster_resources", lambda: {"CPU": 2.0})
    assert cluster.default_workers(dataclasses.replace(tiny_config, batch_size=32, workers=0)) == 1
