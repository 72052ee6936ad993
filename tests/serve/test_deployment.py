"""What a deployment asks of Ray, by stand-ins for what a cluster has."""

import pytest
import ray

from serve.deployment import device_for
from serve.options import AppConfig
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


@pytest.mark.parametrize(("options", "gpus", "expected"), CASES)
def test_replicas_get_a_gpu_each_or_none(
    monkeypatch: pytest.MonkeyPatch, options: dict[str, object], gpus: int, expected: str
) -> None:
    monkeypatch.setattr(ray, "is_initialized", lambda: True)
    monkeypatch.setattr(ray, "cluster_resources", lambda: {"CPU": 8.0} | ({"GPU": float(gpus)} if gpus else {}))
    assert device_for(AppConfig(**options)) == expected  # type: ignore[arg-type]


def test_without_a_cluster_it_is_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    assert device_for(AppConfig()) == "cpu"


def test_a_gpu_for_a_backend_of_cpus_is_refused_at_the_start() -> None:
    with pytest.raises(UserError, match="onnx-int8 runs on the CPU"):
        AppConfig(device="cuda", backend="onnx-int8")
