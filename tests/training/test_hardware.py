"""What is chosen for each kind of machine, by fakes of what torch and the system say of it."""

import ctypes
import dataclasses
import importlib.util
import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path
from typing import Literal

import pytest
import torch

from slm_ray.config.schema import ModelConfig, TrainConfig
from slm_ray.training import hardware
from tests.support.paths import ROOT


@dataclasses.dataclass(frozen=True)
class Machine:
    """A kind of machine, and what is chosen there: precision, and from how many steps of 5 M weights it compiles."""

    name: str
    precision: str
    compiles_from: int | None  # None is never
    features: tuple[str, ...] = ()
    device: str = "cpu"
    gpu_has_bf16: bool = False
    has_triton: bool = True
    has_compiler: bool = True
    has_headers: bool = True


MACHINES = [
    Machine("AVX2", "fp32", 12_999),
    Machine("AVX-512", "fp32", 650, ("avx512",)),
    Machine("AVX-512 with bf16", "bf16", 650, ("avx512", "avx512_bf16")),
    Machine("AMX", "bf16", 650, ("avx512", "amx_tile")),
    Machine("Arm", "fp32", 12_999),
    Machine("AVX-512 without a compiler", "bf16", None, ("avx512", "avx512_bf16"), has_compiler=False),
    Machine("AVX-512 without Python's headers", "bf16", None, ("avx512", "avx512_bf16"), has_headers=False),
    Machine("GPU", "bf16", 64_992, ("avx512",), device="cuda", gpu_has_bf16=True),
    Machine("older GPU", "fp32", 64_992, ("avx512", "avx512_bf16"), device="cuda"),
    Machine("GPU without Triton", "bf16", None, device="cuda", gpu_has_bf16=True, has_triton=False),
    Machine("GPU without a compiler", "bf16", None, device="cuda", gpu_has_bf16=True, has_compiler=False),
]
N_PARAMETERS = 5_008_640
SHAPE = ModelConfig(seq_len=128)


@pytest.fixture(params=MACHINES, ids=lambda machine: machine.name)
def machine(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Machine:
    fake: Machine = request.param
    for feature in ("avx512", "avx512_bf16", "amx_tile"):
        monkeypatch.setattr(torch.cpu, f"_is_{feature}_supported", lambda feature=feature: feature in fake.features)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: fake.gpu_has_bf16)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object() if fake.has_triton else None)
    monkeypatch.setattr(shutil, "which", lambda name: f"/usr/bin/{name}" if fake.has_compiler else None)
    if fake.has_headers:
        (tmp_path / "Python.h").touch()
    monkeypatch.setattr(sysconfig, "get_path", lambda name: str(tmp_path))
    return fake


def config(**changes: object) -> TrainConfig:
    return TrainConfig(batch_size=16, model=SHAPE, **changes)  # type: ignore[arg-type]


def test_auto_is_bf16_where_the_machine_multiplies_in_it(machine: Machine) -> None:
    assert hardware.resolve_precision("auto", torch.device(machine.device)) == machine.precision


@pytest.mark.parametrize("precision", hardware.PRECISIONS)
def test_a_precision_that_is_named_is_taken_everywhere(machine: Machine, precision: str) -> None:
    assert hardware.resolve_precision(precision, torch.device(machine.device)) == precision


def test_auto_compiles_runs_that_are_long_enough_where_there_is_a_compiler(machine: Machine) -> None:
    def is_compiled(max_steps: int) -> bool:
        return hardware.resolve_compile(config(), torch.device(machine.device), N_PARAMETERS, max_steps)

    if machine.compiles_from is None:
        assert not is_compiled(10**9)
    else:
        assert is_compiled(machine.compiles_from)
        assert not is_compiled(machine.compiles_from - 1)


@pytest.mark.parametrize("word", ["on", "off"])
def test_a_word_on_compiling_is_taken_everywhere(machine: Machine, word: Literal["on", "off"]) -> None:
    is_compiled = hardware.resolve_compile(config(compile=word), torch.device(machine.device), N_PARAMETERS, 1)
    assert is_compiled == (word == "on")


def test_memory_is_kept_by_workers_of_one_thread_and_as_the_user_says(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in hardware.KEEP_MEMORY:
        monkeypatch.delenv(name, raising=False)
    assert hardware.memory_settings(1) == hardware.KEEP_MEMORY
    assert hardware.memory_settings(2) == {}
    monkeypatch.setenv("MALLOC_ARENA_MAX", "4")
    assert set(hardware.memory_settings(1)) == set(hardware.KEEP_MEMORY) - {"MALLOC_ARENA_MAX"}


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallopt"), reason="of glibc")
def test_memory_is_kept_by_a_process_that_runs_already_where_it_has_one_thread() -> None:
    """64 MB at a time: more than glibc keeps by itself."""
    script = """
import resource
import torch
from slm_ray.training.hardware import keep_memory
def new_pages():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.ones(16_000_000)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
for threads in (2, 1):
    keep_memory(threads)
    print(*(new_pages() for _ in range(6)))
"""
    environment = {name: value for name, value in os.environ.items() if name not in hardware.KEEP_MEMORY}
    command = [sys.executable, "-c", script]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=True)
    given_back, kept = ([int(count) for count in line.split()] for line in done.stdout.splitlines())
    assert min(given_back) * 2 > given_back[0]
    assert kept[-1] * 10 < kept[0]  # the second may still lie elsewhere
