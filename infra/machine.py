"""What a machine has: Python and its packages, cores and memory within a container's limits, a GPU, disks, a compiler.

In: files of the system (`/proc`, `/sys`, the installed packages' records). Out: a `Finding` each, with what follows for
the commands. Nothing is imported that has to be installed, nothing is started, nothing is written.
"""

import dataclasses
import importlib.metadata
import importlib.util
import os
import platform
import re
import shutil
import sys
import sysconfig
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

from slm_ray.limits import allowed_cores, core_count, cpu_limit, memory_limit, memory_within

GIB = 2**30
OLDEST_PYTHON = (3, 11)
TRAINING_GIB = 4.0
"""Free memory for the default training: 3.2 GiB were measured (story-5m, two workers, their Ray; each shared page
counted once)."""
SERVING_GIB = 1.0
SETUP_GIB = 8.0
"""Disk that `make setup` may take where torch comes with CUDA; 2.5 GB without."""
LEAST_DISK_GIB = 1.0
SHM_SHARE = 0.3
"""Of the memory, which Ray takes for its object store."""
EXTRAS = {
    "prepare": "pipelines/prepare.py",
    "train": "slm_ray/train.py, evaluate.py and tune/sweep.py",
    "serve": "serve/app.py",
    "export": "slm_ray/export.py",
    "docs": "make docs, make notebooks",
}
BY_HAND = "pip install -c constraints.txt -e '.[{}]'"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Finding:
    """One line of the report."""

    name: str
    state: Literal["ok", "note", "missing"]  # missing: a command cannot do without
    found: str
    advice: str  # what follows, or what to do


def python() -> Finding:
    """Its version."""
    found = f"{platform.python_version()} ({sys.executable})"
    if sys.version_info < OLDEST_PYTHON:
        return Finding(name="Python", state="missing", found=found, advice="install 3.11 or newer")
    if sys.prefix == sys.base_prefix:
        return Finding(
            name="Python", state="note", found=found, advice="no virtual environment: `make setup` makes one"
        )
    return Finding(name="Python", state="ok", found=found, advice="every command runs with it")


def system() -> Finding:
    """Linux is where everything was run."""
    found = f"{platform.system()} {platform.release()} on {platform.machine()}"
    if os.name != "posix":
        return Finding(name="system", state="missing", found=found, advice="use WSL 2: locks and workers are POSIX's")
    if sys.platform != "linux":
        return Finding(name="system", state="note", found=found, advice="not run there by us: infra/PLATFORMS.md")
    return Finding(name="system", state="ok", found=found, advice="what everything was run on")


def packages(project: Path) -> Iterator[Finding]:
    """The base, then each extra that a command needs."""
    table = tomllib.loads(project.read_text(encoding="utf-8"))["project"]
    absent = _absent(table["dependencies"])
    yield Finding(
        name="base packages",
        state="missing" if absent else "ok",
        found=f"without {', '.join(absent)}" if absent else f"all {len(table['dependencies'])} packages",
        advice="`make setup`, or " + BY_HAND.format("all") if absent else "what every command needs",
    )
    for extra, commands in EXTRAS.items():
        wanted = table["optional-dependencies"][extra]
        absent = _absent(wanted)
        yield Finding(
            name=f"extra {extra}",
            state="note" if absent else "ok",
            found=f"without {', '.join(absent)}" if absent else f"all {len(wanted)} packages",
            advice=f"{commands}: `make setup`, or {BY_HAND.format(extra)}" if absent else commands,
        )


def _absent(requirements: list[str]) -> list[str]:
    names = [re.split(r"[\[<>=!~;\s]", requirement, maxsplit=1)[0] for requirement in requirements]
    return [name for name in names if version_of(name) is None]


def version_of(package: str) -> str | None:
    """The installed version, by the package's record; None where there is none."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def torch_build(has_gpu: bool) -> Finding:
    """What torch was built for, read from its own file of versions: importing it takes seconds."""
    version = version_of("torch")
    if version is None:
        return Finding(name="torch", state="note", found="not installed", advice="prepare.py needs none, all others do")
    built = _built_for()
    if has_gpu and not built:
        advice = "it sees no GPU: install torch from an index with CUDA or ROCm in it"
        return Finding(name="torch", state="note", found=f"{version}, for the CPU", advice=advice)
    advice = "trains on every GPU" if has_gpu else "trains on the CPU"
    return Finding(name="torch", state="ok", found=f"{version}, for {built or 'the CPU'}", advice=advice)


def _built_for() -> str:
    """`CUDA 13.0`, `ROCm 7.0`, or nothing for the CPU alone, or where it does not say."""
    spec = importlib.util.find_spec("torch")
    folder = Path(spec.origin).parent if spec and spec.origin else Path()
    try:
        text = (folder / "version.py").read_text(encoding="utf-8")
    except OSError:
        return ""
    found = re.search(r"^(cuda|hip)\b[^=]*= '([\d.]+)", text, re.MULTILINE)
    return f"{'CUDA' if found[1] == 'cuda' else 'ROCm'} {found[2]}" if found else ""


def cpu_features(root: Path = Path("/")) -> Finding:
    """The instructions that decide about precision and compilation."""
    try:
        text = (root / "proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return Finding(name="CPU", state="note", found=f"{platform.machine()}, features not known",
                       advice="precision auto is bf16 where torch finds AVX-512 or AMX with it, else fp32")  # fmt: skip
    match = re.search(r"^(?:flags|Features)\s*:(.*)$", text, re.MULTILINE)
    flags = set(match[1].split()) if match else set()
    model = re.search(r"^model name\s*:\s*(.+)$", text, re.MULTILINE)
    names = {"avx2": "AVX2", "avx512f": "AVX-512", "avx512_bf16": "its bf16", "amx_tile": "AMX"}
    has = [word for flag, word in names.items() if flag in flags]
    precision = "bf16" if flags & {"avx512_bf16", "amx_tile"} else "fp32"
    slower = "" if "avx512f" in flags else "; short trainings are not compiled"
    return Finding(
        name="CPU",
        state="ok",
        found=f"{model[1] if model else platform.machine()}: {', '.join(has) or 'none of AVX2, AVX-512, AMX'}",
        advice=f"on the CPU precision auto is {precision}{slower}",
    )


def cores(root: Path = Path("/")) -> Finding:
    """Those that this process may use, within its control group."""
    may, limit, count = allowed_cores(), cpu_limit(root), core_count(root)
    found = f"{may}" if limit is None or limit >= may else f"{may}, of which a limit leaves {limit:g}"
    if limit is not None and limit < may:
        advice = (
            f"workers and threads are counted by the quota, as {count}: train.py takes {min(count, 2)} CPU worker(s)"
        )
        return Finding(name="cores", state="note", found=found, advice=advice)
    return Finding(
        name="cores", state="ok", found=found, advice=f"train.py takes {min(may, 2)} CPU worker(s) by itself"
    )


def memory(root: Path = Path("/")) -> Finding:
    """What is free, within the control group."""
    seen = memory_within(root)
    if seen is None:
        return Finding(name="memory", state="note", found="not known", advice="the default training takes 3.2 GiB")
    total, free = (value / GIB for value in seen)
    limit = " by a container's limit" if memory_limit(root) == seen[0] else ""
    found = f"{free:.1f} GiB free of {total:.1f} GiB{limit}"
    if free < SERVING_GIB:
        return Finding(name="memory", state="missing", found=found, advice="too little for any command: free some")
    if free < TRAINING_GIB:
        advice = "the default training takes 3.2 GiB: --workers 1, or a smaller --batch-size; serving fits"
        return Finding(name="memory", state="note", found=found, advice=advice)
    return Finding(name="memory", state="ok", found=found, advice="the default training takes 3.2 GiB")


def gpus(root: Path = Path("/")) -> list[str]:
    """The names of NVIDIA's by their driver, or `an AMD GPU` where there is ROCm's device."""
    folders = sorted((root / "proc/driver/nvidia/gpus").glob("*/information"))
    texts = [folder.read_text(encoding="utf-8", errors="replace") for folder in folders]
    named = [match[1] for text in texts if (match := re.search(r"^Model:\s*(.+)$", text, re.MULTILINE))]
    devices = sorted((root / "dev").glob("nvidia[0-9]*"))
    found = named if len(named) >= len(devices) else ["an NVIDIA GPU"] * len(devices)
    return found or (["an AMD GPU"] if (root / "dev/kfd").exists() else [])


def gpu(found: list[str]) -> Finding:
    """What is there, and whether its metrics can be read."""
    if not found:
        return Finding(
            name="GPU", state="ok", found="none", advice="everything runs without; --precision fp16 does not"
        )
    names = ", ".join(found)
    if "NVIDIA" in names and version_of("nvidia-ml-py") is None:
        advice = f"its metrics are not at MLflow: {BY_HAND.format('gpu')}"
        return Finding(name="GPU", state="note", found=names, advice=advice)
    return Finding(
        name="GPU", state="ok", found=names, advice="train.py takes all of them; serving computes on the CPU"
    )


def disk(checkout: Path) -> Finding:
    """Where environment, data and runs lie."""
    free = shutil.disk_usage(checkout).free / GIB
    found = f"{free:.1f} GiB free where this checkout lies"
    if free < LEAST_DISK_GIB:
        return Finding(name="disk", state="missing", found=found, advice="free some, or put data and runs elsewhere")
    if free < SETUP_GIB and not (checkout / ".venv" / ".ready").exists():
        advice = "`make setup` takes up to 8 GiB where torch comes with CUDA, 2.5 GB from an index of CPU wheels"
        return Finding(name="disk", state="note", found=found, advice=advice)
    return Finding(name="disk", state="ok", found=found, advice="a checkpoint of story-5m takes 41 MB")


def shared_memory(root: Path = Path("/")) -> Finding:
    """Where Ray keeps its objects."""
    folder, seen = root / "dev/shm", memory_within(root)
    if sys.platform != "linux" or not folder.is_dir():
        return Finding(
            name="shared memory",
            state="ok",
            found="no /dev/shm",
            advice="Ray keeps its objects in its session's folder",
        )
    free, wanted = shutil.disk_usage(folder).free, SHM_SHARE * (seen[0] if seen else 0)
    found = f"{free / GIB:.1f} GiB free in /dev/shm"
    if free < wanted:
        advice = f"Ray goes to the disk, slower: give a container --shm-size {max(1, round(wanted / GIB))}g"
        return Finding(name="shared memory", state="note", found=found, advice=advice)
    return Finding(name="shared memory", state="ok", found=found, advice="room for Ray's objects")


def compiler() -> Finding:
    """What torch.compile calls: a C++ compiler, and Python's headers."""
    name = os.environ.get("CXX", "g++")
    path, headers = shutil.which(name), Path(sysconfig.get_path("include"), "Python.h")
    if path is None or not headers.is_file():
        what = "no " + " and no ".join(
            [*([name] if path is None else []), *(["Python.h"] if not headers.is_file() else [])]
        )
        advice = "training is not compiled, up to a third slower: apt-get install g++ python3-dev"
        return Finding(name="compiler", state="note", found=what, advice=advice)
    return Finding(name="compiler", state="ok", found=f"{path}, and Python.h", advice="long trainings are compiled")


def chromium() -> Finding:
    """What the tests of the page drive."""
    names = ("chromium", "chromium-browser", "google-chrome")
    path = next(filter(None, map(shutil.which, names)), None)
    if path is None:
        advice = "the tests of the page are left out: apt-get install chromium"
        return Finding(name="Chromium", state="note", found="none", advice=advice)
    return Finding(name="Chromium", state="ok", found=path, advice="`make test` tests the page too")
