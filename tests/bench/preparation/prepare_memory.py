"""Peak memory of data preparation for an input and for ten times as much.

    python tests/bench/preparation/prepare_memory.py [--source stories.parquet]

Runs `pipelines/prepare.py` with two worker processes over 20,000 and over 200,000 stories (or `--stories`) and reports
the highest resident memory of the main process, of the largest worker, and of all together (`VmHWM` of /proc, so Linux
only; the sum counts what forked workers share once for each). Ends with exit code 1 where ten times the input takes
more than 1.2 times the memory of a worker.
"""

import argparse
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import prepare as bench  # the other script of this folder

SIZES = (20_000, 200_000)
LIMIT = 1.2
POLL_S = 0.1


def main() -> int:
    """Make the inputs, run both sizes, print a table."""
    parser = argparse.ArgumentParser(prog="bench/prepare_memory.py", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--source", help="Parquet file with a text column (default: the sample corpus)")
    parser.add_argument("--stories", nargs="+", type=int, default=SIZES, help="sizes (default: 20000 200000)")
    options = parser.parse_args()
    peaks = {}
    with tempfile.TemporaryDirectory() as scratch:
        for size in options.stories:
            folder = Path(scratch) / str(size)
            folder.mkdir()
            bench.write_input(folder / "input", options.source, stories=size)
            started = time.perf_counter()
            peaks[size] = (*peak_memory(folder), time.perf_counter() - started)
    print("| stories | main process, MiB | largest worker, MiB | all processes, MiB | seconds |\n|---|---|---|---|---|")
    for size, (main_process, worker, total, seconds) in peaks.items():
        print(f"| {size:,} | {main_process / 2**20:.0f} | {worker / 2**20:.0f} | {total / 2**20:.0f} | {seconds:.0f} |")
    first, *_, last = (worker for _, worker, _, _ in peaks.values()) if len(peaks) > 1 else (1, 1)
    growth = last / first
    print(f"a worker's peak grows by a factor of {growth:.2f}")
    return int(growth > LIMIT)


def peak_memory(folder: Path) -> tuple[int, int, int]:
    """Bytes of the main process, of its largest worker, and of all, at their highest."""
    command = [
        sys.executable, "pipelines/prepare.py", "--source", str(folder / "input"), "--output", str(folder / "data"),
        "--direct_num_workers", "2", "--direct_running_mode", "multi_processing",
    ]  # fmt: skip
    process = subprocess.Popen(command, cwd=bench.ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    seen: dict[int, int] = {}
    while process.poll() is None:
        for pid in (process.pid, *_children(process.pid)):
            seen[pid] = max(seen.get(pid, 0), _high_water_mark(pid))
        time.sleep(POLL_S)
    if process.returncode:
        raise SystemExit(f"prepare.py failed:\n{process.stderr.read()[-3000:] if process.stderr else ''}")
    total = sum(seen.values())
    return seen.pop(process.pid), max(seen.values()), total


def _children(pid: int) -> list[int]:
    found = [int(child) for task in Path(f"/proc/{pid}/task").glob("*/children") for child in _read(task).split()]
    return found + [below for child in found for below in _children(child)]


def _high_water_mark(pid: int) -> int:
    marks = [line.split()[1] for line in _read(Path(f"/proc/{pid}/status")).splitlines() if line.startswith("VmHWM")]
    return int(marks[0]) * 1024 if marks else 0


def _read(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:  # the process ended meanwhile
        return ""


if __name__ == "__main__":
    raise SystemExit(main())
