"""Memory and cores that a control group leaves to this process: what a container may use is not what its machine has.

In: `/proc/self/cgroup`, `/sys/fs/cgroup` (both versions of them) and `/proc/meminfo`. Out: bytes and cores, or None
where there is no limit or it cannot be read. The limit of a group above counts too. `core_count` is what every command
shares out among its workers and threads.
"""

import os
from collections.abc import Iterator
from pathlib import Path

_NO_LIMIT = 2**60
"""What version 1 says for none is a number near 2**63."""


def core_count(root: Path = Path("/")) -> int:
    """Cores that this process can keep busy: those it may run on, or the whole ones of its quota, and at least one.

    A container of 1.5 CPUs on a machine of 64 cores has 1: 64 threads would run for a moment and then stand still
    together until the next period.
    """
    may, limit = allowed_cores(), cpu_limit(root)
    return may if limit is None else max(1, min(may, int(limit)))


def allowed_cores() -> int:
    """Cores that this process may run on, whatever it may use of their time."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def machine_cores() -> int:
    """Cores of the machine, whoever may use them."""
    return os.cpu_count() or 1


def cpu_limit(root: Path = Path("/")) -> float | None:
    """Cores, as 1.5, by the quota of time."""
    found = list[float]()
    for folder in _folders(root, ""):
        words = _words(folder / "cpu.max")
        found += _quota(words[:1], words[1:])
    for folder in _folders(root, "cpu"):
        found += _quota(_words(folder / "cpu.cfs_quota_us"), _words(folder / "cpu.cfs_period_us"))
    return min(found, default=None)


def _quota(quota: list[str], period: list[str]) -> list[float]:
    """Time by period, in cores; nothing where it is `max`, -1 or no number."""
    numbers = [int(word) for word in (*quota[:1], *period[:1]) if word.isdecimal() and int(word) > 0]
    return [numbers[0] / numbers[1]] if len(numbers) == 2 else []


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
    top = _top(root / "sys/fs/cgroup", controller)
    for line in _text(root / "proc/self/cgroup").splitlines():
        _, names, path = [*line.split(":", 2), "", ""][:3]
        if (controller in names.split(",")) if controller else not names:
            inside = top / path.strip("/")
            yield inside
            yield from (above for above in inside.parents if above == top or top in above.parents)
            if not inside.is_dir():  # in a container the path may be that of the host
                yield top


def _top(groups: Path, controller: str) -> Path:
    """Where the groups of a controller begin: `cpu` is as a rule a link to `cpu,cpuacct`, and not everywhere there."""
    if (groups / controller).is_dir():
        return groups / controller
    together = (one for one in groups.glob(f"*{controller}*") if controller in one.name.split(","))
    return next(together, groups / controller)


def _words(path: Path) -> list[str]:
    return _text(path).split()


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
