"""On which kind of machine a card was made: within one kind every sum is the same to the last digit.

In: this process. Out: plain values. No name of a host, a user or a folder is among them.
"""

import hashlib
import importlib.metadata
import platform
import re
from pathlib import Path
from typing import Any

import torch

from slm_ray.limits import core_count

_CPU_INFO = Path("/proc/cpuinfo")
LEAST_THREADS, THREADS_A_CORE = 16, 4
"""A card may ask any machine for the first number, and for so many of each core."""


NUMERICS = 2
"""Counts the versions of SLM-Ray's arithmetic: up by one with every change of the last digits of a loss or of what is
drawn. A card without one has 1: rotary angles in double precision."""


def numerics_of(kind: object) -> object:
    """The arithmetic that a card's kind of machine names; 1 where it names none, as those of earlier versions."""
    return kind.get("numerics", 1) if isinstance(kind, dict) else None


def machine_kind(threads: int) -> dict[str, Any]:
    """What decides how a sum is rounded: the processor's instructions, the libraries, the number of threads; our
    own order of sums, too."""
    return {
        "architecture": platform.machine(),
        "system": platform.system(),
        "processor": _cpu_field("model name") or platform.processor(),
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "flags_sha256": hashlib.sha256(" ".join(sorted(_cpu_field("flags").split())).encode()).hexdigest()[:16],
        "torch": str(torch.__version__),
        "numpy": importlib.metadata.version("numpy"),
        "onnxruntime": _version("onnxruntime"),
        "threads": threads,
        "numerics": NUMERICS,
    }


def most_threads() -> int:
    """Threads that a card may ask of this machine: some more than it has cores, so that the card of a larger one can be
    verified to the last digit, and not a thousand."""
    return max(LEAST_THREADS, THREADS_A_CORE * core_count())


def _cpu_field(name: str) -> str:
    """A line of /proc/cpuinfo; empty where there is none, as on other systems than Linux."""
    try:
        text = _CPU_INFO.read_text(encoding="utf-8")
    except OSError:
        return ""
    found = re.search(rf"^{name}\s*:\s*(.*)$", text, re.MULTILINE)
    return found[1].strip() if found else ""


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return ""
