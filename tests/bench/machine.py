"""What a measurement was made on, in one line: tables of different machines are not compared."""

import os
import platform
from pathlib import Path

FEATURES = ("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "amx_bf16", "asimd", "sve", "bf16")
"""Those of /proc/cpuinfo that decide how fast matrices are multiplied."""


def cpu_count() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def machine_line() -> str:
    """Processor, cores and features: `AMD EPYC, 2 cores, avx2 avx512f avx512_vnni avx512_bf16`."""
    fields: dict[str, str] = {}
    path = Path("/proc/cpuinfo")
    if path.is_file():
        lines = path.read_text(encoding="utf-8").splitlines()
        fields = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)}
    model = fields.get("model name") or platform.processor() or platform.machine()
    has = (fields.get("flags") or fields.get("Features") or "").split()
    return f"{model}, {cpu_count()} cores, {' '.join(name for name in FEATURES if name in has) or 'features unknown'}"
