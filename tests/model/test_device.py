"""Where a model runs: names, backends, and machines with and without a GPU, by stand-ins for what torch says."""

import pytest
import torch

from slm_ray.config.devices import DeviceName
from slm_ray.config.schema import ModelConfig
from slm_ray.errors import UserError
from slm_ray.model.decoder import Decoder
from slm_ray.model.device import find_device, free_on_gpu, moved

CASES: list[tuple[DeviceName, str, bool, str]] = [
    ("auto", "auto", False, "cpu"),
    ("auto", "auto", True, "cuda"),
    ("auto", "torch", True, "cuda"),
    ("auto", "onnx", True, "cpu"),
    ("auto", "onnx-int8", True, "cpu"),
    ("cpu", "auto", True, "cpu"),
    ("cpu", "onnx", False, "cpu"),
    ("cuda", "auto", True, "cuda"),
    ("cuda", "torch", True, "cuda"),
]


@pytest.fixture
def gpus(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    return monkeypatch


@pytest.mark.parametrize(("name", "backend", "has_gpu", "expected"), CASES)
def test_device_of_each_kind_of_machine(
    gpus: pytest.MonkeyPatch, name: DeviceName, backend: str, has_gpu: bool, expected: str
) -> None:
    gpus.setattr(torch.cuda, "is_available", lambda: has_gpu)
    assert find_device(name, backend).type == expected


def test_a_gpu_that_is_not_there_is_refused(gpus: pytest.MonkeyPatch) -> None:
    gpus.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UserError, match="torch sees no GPU here"):
        find_device("cuda")


@pytest.mark.parametrize("has_gpu", [False, True])
def test_a_gpu_for_a_backend_of_cpus_is_refused(gpus: pytest.MonkeyPatch, has_gpu: bool) -> None:
    gpus.setattr(torch.cuda, "is_available", lambda: has_gpu)
    with pytest.raises(UserError, match="onnx runs on the CPU"):
        find_device("cuda", "onnx")


def test_a_gpu_without_room_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    model = Decoder(ModelConfig(vocab_size=16, seq_len=8, n_layers=1, d_model=8, n_heads=2, d_ff=16))

    def full(*_: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")

    monkeypatch.setattr(model, "to", full)
    with pytest.raises(UserError, match="no room for this model's weights: give --device cpu"):
        moved(model, torch.device("cuda", 0))


def test_what_torch_keeps_of_a_gpu_for_later_is_free(gpus: pytest.MonkeyPatch) -> None:
    gpus.setattr(torch.cuda, "mem_get_info", lambda _: (1000, 8000))
    gpus.setattr(torch.cuda, "memory_reserved", lambda _: 700)
    gpus.setattr(torch.cuda, "memory_allocated", lambda _: 200)
    assert free_on_gpu(torch.device("cuda", 0)) == 1500
    assert free_on_gpu(torch.device("cpu")) is None
