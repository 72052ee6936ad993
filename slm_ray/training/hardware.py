"""What this machine can do for training: devices, threads, arithmetic, a compiler.

In: a `TrainConfig`'s `auto` values. Out: the choices made for them.
"""

import importlib.util
import os
import shutil
import sysconfig
from pathlib import Path

import torch

from slm_ray import internals
from slm_ray.config.schema import TrainConfig
from slm_ray.malloc import ARENA_MAX, MMAP_MAX, TOP_PAD, TRIM_THRESHOLD, set_malloc

COMPILE_PAYS_FLOP = 4e13
"""Work from which compiling wins its half minute back on two CPU cores with AVX-512 (bf16, 30 % gained)."""
WITHOUT_AVX512 = 20
"""How much more it takes without: there, in fp32, 5 % were gained."""


PRECISIONS = ("fp32", "bf16", "fp16")
KEEP_MEMORY = {
    "MALLOC_ARENA_MAX": "1",
    "MALLOC_MMAP_MAX_": "0",
    "MALLOC_TRIM_THRESHOLD_": str(2**33),
    "MALLOC_TOP_PAD_": str(2**26),
}
"""Environment in which glibc keeps the memory of tensors instead of giving it back and asking again at every step.

Other C libraries do not read it. With one thread it gained a tenth on two kinds of machines; with two threads, bf16 and
AVX-512 it took a training from 5,058 to 3,144 tokens/s.
"""


def memory_settings(threads: int) -> dict[str, str]:
    """Environment of a worker of so many threads: `KEEP_MEMORY` with one, but for what is set already."""
    return {name: value for name, value in KEEP_MEMORY.items() if threads <= 1 and name not in os.environ}


def keep_memory(threads: int) -> None:
    """What `memory_settings` does, in a process that runs already: with one thread a few percent more tokens/s."""
    if memory_settings(threads) == KEEP_MEMORY:
        set_malloc({ARENA_MAX: 1, MMAP_MAX: 0, TRIM_THRESHOLD: 2**31 - 1, TOP_PAD: 2**26})


def resolve_precision(precision: str, device: torch.device) -> str:
    """`fp32` or `bf16`: auto is bf16 where the hardware multiplies matrices in it."""
    if precision != "auto":
        return precision
    if device.type == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp32"
    return "bf16" if _cpu_has("avx512_bf16") or _cpu_has("amx_tile") else "fp32"


def _cpu_has(feature: str) -> bool:
    """Whether this CPU has a feature that torch knows; no where torch can no longer be asked."""
    return bool(internals.find(f"torch.cpu:_is_{feature}_supported", bool)())


def resolve_compile(config: TrainConfig, device: torch.device, n_parameters: int, max_steps: int) -> bool:
    """Whether to use torch.compile: auto does where a compiler is found and the run is long enough for it to pay."""
    if config.compile != "auto":
        return config.compile == "on"
    flop = 6 * n_parameters * max_steps * config.batch_size * config.model.seq_len
    if device.type == "cuda":
        has_compiler = importlib.util.find_spec("triton") is not None and bool(
            shutil.which("cc") or shutil.which("gcc")
        )
        return has_compiler and flop > 100 * COMPILE_PAYS_FLOP
    threshold = COMPILE_PAYS_FLOP * (1 if _cpu_has("avx512") else WITHOUT_AVX512)
    has_headers = Path(sysconfig.get_path("include"), "Python.h").is_file()  # its kernels include them
    return shutil.which(os.environ.get("CXX", "g++")) is not None and has_headers and flop > threshold
