"""Memory and cores that a control group leaves to this process: what a container may use is not what its machine has.

In: `/proc/self/cgroup`, `/sys/fs/cgroup` (both versions of them) and `/proc/meminfo`. Out: bytes and cores, or None
where there is no limit or it cannot be read. The limit of a group above counts too.
"""

import os
from collections.abc import Iterator
from pathlib import Path

_NO_LIMIT = 2**60
"""What version 1 says for none is a number near 2**63."""


def cpu_limit(root: Path = Path("/")) -> float | None:
    """Cores, as 1.5, by the quota of time."""
    found = list[float]()
    for folder in _folders(root, ""):
        words = _words(folder / "cpu.max")
        if len(words) == 2 and words[0] != "max":
            found.append(int(words[0]) / int(words[1]))
    for folder in _folders(root, "cpu"):
        quota, period = _words(folder / "cpu.cfs_quota_us"), _words(folder / "cpu.cfs_period_us")
        if quota and period and int(quota[0]) > 0:
            found.append(int(quota[0]) / int(period[0]))
    return min(found, default=None)


def memory_limit(root: Path = Path("/")) -> int | None:
    """Bytes."""
    return min((limit for limit, _ in _memory_groups(root)), default=None)


def memory_within(root: Path = Path("/")) -> tuple[int, int] | None:
    """Bytes in all and bytes that are free, of the machine or of the group that leaves less; None where unknown."""
    found = [(limit, max(0, limit - used)) for limit, used in _memory_groups(root)]
    machine = _machine_memory(root)
    if machine is not None:
        found.append(machine)
    return (min(total for total, _ in found), min(free for _, free in found)) if found else None


def _memory_groups(root: Path) -> Iterator[tuple[int, int]]:
    """Limit and use, without what is only a cache, of each group that has one."""
    for controller, names in (("", ("memory.max", "memory.current")), ("memory", _VERSION_1)):
        for folder in _folders(root, controller):
            limit, used = (_words(folder / name) for name in names)
            if limit and limit[0].isdigit() and int(limit[0]) < _NO_LIMIT:
                in_use = int(used[0]) if used else 0
                yield int(limit[0]), max(0, in_use - _cache(folder / "memory.stat"))


_VERSION_1 = ("memory.limit_in_bytes", "memory.usage_in_bytes")


def _cache(stat: Path) -> int:
    words = _words(stat)
    values = dict(zip(words[::2], words[1::2]))
    return int(values.get("total_inactive_file", values.get("inactive_file", "0")))


def _machine_memory(root: Path) -> tuple[int, int] | None:
    lines = [line.split() for line in _text(root / "proc/meminfo").splitlines()]
    values = {words[0]: int(words[1]) * 1024 for words in lines if len(words) > 1 and words[1].isdigit()}
    if {"MemTotal:", "MemAvailable:"} <= set(values):
        return values["MemTotal:"], values["MemAvailable:"]
    try:  # macOS knows how much there is, and not how much is free
        total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if root == Path("/") else 0
    except (ValueError, OSError, AttributeError):
        return None
    return (total, total) if total > 0 else None


def _folders(root: Path, controller: str) -> Iterator[Path]:
    """This process's group of a controller (of version 2 for an empty name), and the groups above it."""
    top = root / "sys/fs/cgroup" / controller
    for line in _text(root / "proc/self/cgroup").splitlines():
        _, names, path = [*line.split(":", 2), "", ""][:3]
        if (controller in names.split(",")) if controller else not names:
            inside = top / path.strip("/")
            yield inside
            yield from (above for above in inside.parents if above == top or top in above.parents)
            if not inside.is_dir():  # in a container the path may be that of the host
                yield top


def _words(path: Path) -> list[str]:
    return _text(path).split()


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
