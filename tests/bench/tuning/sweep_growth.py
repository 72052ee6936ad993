"""How a sweep grows with its trials, and how long the machine waits between two of them.

    python tests/bench/tuning/sweep_growth.py --data data/tinystories [--trials 1 4 16]

Runs `tune/sweep.py` with so many learning rates, each trial a few steps of the preset `demo` with both cores, so that
trials run one after another. A trial's first and last step are seen in its record. "Between" is the time from the last
step of a trial to the first of the next: validation, checkpoint, the ends of one run and the start of another.
"""

import argparse
import itertools
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[3]
sys.path.insert(0, str(ROOT))
from tests.bench.machine import machine_line

POLL_S = 0.02


def main() -> int:
    """Run a sweep of each size, print a table."""
    parser = argparse.ArgumentParser(prog="bench/sweep_growth.py", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data", default="data/tinystories", help="data set (default: data/tinystories)")
    parser.add_argument("--trials", nargs="+", type=int, default=(1, 4, 16), help="sizes (default: 1 4 16)")
    parser.add_argument("--steps", type=int, default=20, help="of each trial (default: 20)")
    parser.add_argument("--option", nargs="*", default=(), help="options of sweep.py besides")
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # the sweep ends with it
    print(machine_line(), flush=True)
    print("| trials | seconds in all | a trial more, s | between two trials, median s (longest) |\n|---|---|---|---|")
    before: tuple[int, float] | None = None
    for count in options.trials:
        seconds, gaps = sweep(count, options)
        more = f"{(seconds - before[1]) / (count - before[0]):.1f}" if before else ""
        between = f"{statistics.median(gaps):.1f} ({max(gaps):.1f})" if gaps else ""
        print(f"| {count} | {seconds:.1f} | {more} | {between} |", flush=True)
        before = count, seconds
    return 0


def sweep(count: int, options: argparse.Namespace) -> tuple[float, list[float]]:
    """Seconds of the command, and those between two trials."""
    with tempfile.TemporaryDirectory() as scratch:
        rates = [f"{1e-3 * (1 + number / 100):g}" for number in range(count)]
        command = [
            sys.executable, "tune/sweep.py", "--config", "demo", "--data", options.data, "--output", scratch,
            "--name", "growth", "--lr", *rates, "--d-ff", "256", "--trial-steps", str(options.steps), "--no-final",
            "--log-interval-steps", "1", "--tracking-uri", f"sqlite:///{scratch}/mlflow.db",
            "--cpus-per-worker", str(float(os.cpu_count() or 1)), *options.option,
        ]  # fmt: skip
        started = time.perf_counter()
        process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
        seen: dict[Path, tuple[float, float, int]] = {}
        try:
            while process.poll() is None:
                note_steps(Path(scratch) / "growth" / "trials", seen)
                time.sleep(POLL_S)
        finally:
            process.terminate()  # of one that has ended, nothing
            process.wait()
        seconds = time.perf_counter() - started
        if process.returncode:
            raise SystemExit(f"sweep.py failed:\n{process.stderr.read()[-3000:] if process.stderr else ''}")
    for path, (first, last, step) in sorted(seen.items(), key=lambda item: item[1]):
        print(
            f"  {path.parent.name}: steps from {first - started:.1f} to {last - started:.1f} s ({step})",
            file=sys.stderr,
        )
    times = sorted((first, last) for first, last, _ in seen.values())
    return seconds, [begins - ended for (_, ended), (begins, _) in itertools.pairwise(times)]


def note_steps(folder: Path, seen: dict[Path, tuple[float, float, int]]) -> None:
    """When the first and the last step of each trial were recorded."""
    for path in folder.glob("*/metrics.jsonl"):
        lines = path.read_text(encoding="utf-8").split("\n")[:-1]
        step = max((json.loads(line).get("step", 0) for line in lines if "train_loss" in line), default=0)
        first, _, known = seen.get(path, (time.perf_counter(), 0.0, 0))
        if step > known:
            seen[path] = first, time.perf_counter(), step


if __name__ == "__main__":
    raise SystemExit(main())
