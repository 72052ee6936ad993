"""How many cores a process counts: those of its container, on a machine that has many more."""

import os
import re
from pathlib import Path

import pytest

from slm_ray import limits
from slm_ray.cli.script import set_default_environment
from slm_ray.generation import cache_size
from tests.support.paths import ROOT

V1, V2 = "4:memory:/pod\n3:cpu,cpuacct:/pod\n", "0::/pod\n"
TOP = "sys/fs/cgroup"


def machine(root: Path, groups: str, files: dict[str, str]) -> Path:
    """The files of a system that is not this one."""
    for name, text in {"proc/self/cgroup": groups, **{f"{TOP}/{name}": text for name, text in files.items()}}.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


def first(quota: str, period: str = "100000") -> dict[str, str]:
    return {"cpu/pod/cpu.cfs_quota_us": quota, "cpu/pod/cpu.cfs_period_us": period}


@pytest.mark.parametrize(
    ("groups", "files", "expected"),
    [
        ("", {}, 64),
        (V2, {}, 64),
        (V2, {"pod/cpu.max": "150000 100000\n"}, 1),
        (V2, {"pod/cpu.max": "50000 100000\n"}, 1),
        (V2, {"pod/cpu.max": "390000 100000\n"}, 3),
        (V2, {"pod/cpu.max": "400000 100000\n"}, 4),
        (V2, {"pod/cpu.max": "40000 10000\n"}, 4),
        (V2, {"pod/cpu.max": "12800000 100000\n"}, 64),
        (V2, {"pod/cpu.max": "max 100000\n"}, 64),
        (V2, {"pod/cpu.max": "max 100000\n", "cpu.max": "200000 100000\n"}, 2),
        (V2, {"pod/cpu.max": "800000 100000\n", "cpu.max": "200000 100000\n"}, 2),
        (V2, {"cpu.max": "200000 100000\n"}, 2),  # in a container the path is that of the host
        *(
            (V2, {"pod/cpu.max": text}, 64)
            for text in ("", "150000", "a b", "150000 0", "0 100000", "-1 100000", "\xb2 1")
        ),
        (V1, first("150000"), 1),
        (V1, first("300000\n", "100000\n"), 3),
        (V1, first("-1"), 64),
        (V1, first("0"), 64),
        (V1, first("150000", "0"), 64),
        (V1, first(""), 64),
        (V1, {"cpu/cpu.cfs_quota_us": "200000", "cpu/cpu.cfs_period_us": "100000"}, 2),
        *(
            (V1, {f"{name}/pod/cpu.cfs_quota_us": "200000", f"{name}/pod/cpu.cfs_period_us": "100000"}, 2)
            for name in ("cpu,cpuacct", "cpuacct,cpu")
        ),
        (V1, {"cpuset/pod/cpu.cfs_quota_us": "200000", "cpuset/pod/cpu.cfs_period_us": "100000"}, 64),
        (V1 + V2, first("-1") | {"pod/cpu.max": "250000 100000"}, 2),
        ("3:cpuset:/pod\n", first("150000"), 64),  # a quota of another group's
    ],
)
def test_a_quota_counts_and_not_the_machine(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, groups: str, files: dict[str, str], expected: int
) -> None:
    monkeypatch.setattr(limits, "allowed_cores", lambda: 64)
    assert limits.core_count(machine(tmp_path, groups, files)) == expected


def test_a_quota_above_the_cores_that_are_allowed_is_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "allowed_cores", lambda: 2)
    assert limits.core_count(machine(tmp_path, V2, {"pod/cpu.max": "800000 100000"})) == 2


@pytest.mark.parametrize(("quota", "expected"), [(1.5, "1"), (3.0, "3"), (None, None), (64.0, None)])
def test_what_counts_by_itself_is_told_of_the_quota(
    monkeypatch: pytest.MonkeyPatch, quota: float | None, expected: str | None
) -> None:
    """Torch, numpy and pyarrow would start a thread for each core of the machine."""
    monkeypatch.setattr(limits, "cpu_limit", lambda _: quota)
    monkeypatch.setattr("slm_ray.limits.allowed_cores", lambda: 64)
    monkeypatch.setattr("slm_ray.cli.script.allowed_cores", lambda: 64)
    monkeypatch.setattr(os, "environ", os.environ.copy())
    os.environ.pop("OMP_NUM_THREADS", None)
    set_default_environment()
    assert os.environ.get("OMP_NUM_THREADS") == expected
    os.environ["OMP_NUM_THREADS"] = "7"
    set_default_environment()
    assert os.environ["OMP_NUM_THREADS"] == "7"


def test_a_cache_counts_the_memory_of_the_container(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also by version 1, and by a group above."""
    usage = {"memory/pod/memory.limit_in_bytes": str(3 * 2**30), "memory/pod/memory.usage_in_bytes": str(2**30)}
    root = machine(tmp_path, V1, usage)
    (root / "proc/meminfo").write_text("MemTotal: 16777216 kB\nMemAvailable: 12582912 kB\n")
    monkeypatch.setattr(cache_size, "memory_within", lambda: limits.memory_within(root))
    assert cache_size.available_bytes() == 2 * 2**30


def test_cores_are_counted_in_one_place() -> None:
    """What counts the machine's starts 64 threads in a container of 1.5 CPUs."""
    counts = re.compile(r"\bcpu_count\(|sched_getaffinity")
    rooms = (ROOT / room for room in ("pipelines", "slm_ray", "tune", "serve", "infra"))
    found = {path for room in rooms for path in room.rglob("*.py") if counts.search(path.read_text(encoding="utf-8"))}
    assert found == {ROOT / "slm_ray" / "limits.py"}
