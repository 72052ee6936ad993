"""The machine that a bench runs on, in one line: its figures mean little without it."""

import os
import platform
from pathlib import Path

from slm_ray.limits import core_count

FEATURES = ("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "avx512_fp16", "amx_bf16", "amx_int8")
"""What decides about the speed of products and of text, as Linux calls it."""


def machine_line() -> str:
    """`2 cores of AMD EPYC (avx2, avx512f; not avx512_bf16, ...), 23 GiB, Python 3.11.7`, as far as it can be told."""
    info = _cpu_info()
    name = info.get("model name") or platform.processor() or platform.machine()
    found = info.get("flags", "").split()
    has = [feature for feature in FEATURES if feature in found]
    lacks = [feature for feature in FEATURES if feature not in found]
    features = f"{', '.join(has) or 'none of these'}; not {', '.join(lacks)}" if lacks else ", ".join(has)
    memory = f", {_memory_gib():.0f} GiB" if _memory_gib() else ""
    shown = f" ({features})" if found else ""
    return f"{core_count()} cores of {name}{shown}{memory}, Python {platform.python_version()}"


def _cpu_info() -> dict[str, str]:
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:  # another system than Linux
        return {}
    lines = (line.partition(":") for line in text.split("\n\n")[0].splitlines())
    return {name.strip(): value.strip() for name, _, value in lines}


def _memory_gib() -> float:
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    except (ValueError, OSError, AttributeError):
        return 0.0
