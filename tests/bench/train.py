"""Training speed against named peers, in one run: `make bench-train DATA=data/tinystories`.

Tokens per second on this machine's cores, the same shape, data and batch, fresh processes in turn, ratios round by
round: (a) `bare_loop.py`, our model in a bare torch loop; (b) `nanogpt_recipe.py`; (c) `transformers_trainer.py`;
(d) ours with everything on: `slm_ray/train.py` through Ray Train, with MLflow, progress, validations and checkpoints,
once as one worker with all threads and once as two workers that share them. The first steps, with the compiler in them,
are not measured. Validations are outside of every figure; what they and the checkpoints take is printed apart.
"""

import argparse
import contextlib
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
from pathlib import Path
from typing import Any

import psutil

ROOT = Path(__file__).resolve().parents[2]
BENCH = Path(__file__).resolve().parent
POLL_S = 5.0
BARE, NANOGPT, TRAINER = "bare torch loop", "nanoGPT's recipe", "transformers.Trainer"
OURS, OURS_TWO = "ours, 1 worker", "ours, 2 workers"
OURS_ADAMW = "ours, 1 worker, AdamW"
SCRIPTS = {BARE: "bare_loop.py", NANOGPT: "nanogpt_recipe.py", TRAINER: "transformers_trainer.py"}


def main() -> int:
    """Run all sides in turn, print a table."""
    parser = argparse.ArgumentParser(prog="bench/train.py", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data", default="data/tinystories", help="data set (default: data/tinystories)")
    parser.add_argument("--preset", default="story-5m", help="shape and optimizer (default: story-5m)")
    parser.add_argument("--steps", type=int, default=80, help="optimizer steps of each side (default: 80)")
    parser.add_argument("--warmup", type=int, default=20, help="of which not measured (default: 20)")
    parser.add_argument("--batch-size", type=int, default=32, help="sequences a step (default: 32)")
    parser.add_argument("--rounds", type=int, default=2, help="runs of each side (default: 2)")
    parser.add_argument("--side", action="append", choices=[*SCRIPTS, OURS, OURS_ADAMW, OURS_TWO], help="only these")
    given = parser.parse_args()
    threads = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    sides = given.side or [*SCRIPTS, OURS, OURS_ADAMW, OURS_TWO]
    print(f"{threads} cores, preset {given.preset}, {given.batch_size} sequences a step", flush=True)
    rounds = []
    for number in range(given.rounds):
        rounds.append({side: run(side, given, threads) for side in sides})
        shown = ", ".join(f"{side} {result['tokens_per_s']:,.0f}" for side, result in rounds[-1].items())
        print(f"round {number + 1}, tokens/s: {shown}", flush=True)
    print_table(rounds)
    return 0


def run(side: str, given: argparse.Namespace, threads: int) -> dict[str, float]:
    """One process of one side: its speed and the largest memory of its largest process."""
    with tempfile.TemporaryDirectory() as scratch:
        if side in SCRIPTS:
            command = [str(BENCH / SCRIPTS[side]), "--data", given.data, "--preset", given.preset]
            command += ["--steps", given.steps, "--warmup", given.warmup, "--batch-size", given.batch_size]
            output, memory = watched([*command, "--threads", threads], scratch)
            return {**json.loads(output.splitlines()[-1]), "peak_mib": memory}
        workers = 2 if side == OURS_TWO else 1
        command = [
            str(ROOT / "slm_ray" / "train.py"),
            "--config",
            given.preset,
            "--data",
            given.data,
            "--workers",
            workers,
        ]
        command += [
            "--threads",
            max(1, threads // workers),
            "--batch-size",
            given.batch_size,
            "--max-steps",
            given.steps,
        ]
        command += ["--output", scratch, "--name", "bench", "--compile", "on"]
        command += ["--log-interval-steps", 5, "--eval-interval-steps", max(1, given.steps // 2)]
        command += ["--tracking-uri", f"sqlite:///{scratch}/mlflow.db", "--max-failures", 0]
        command += ["--optim.name", "adamw"] if side == OURS_ADAMW else []
        _, memory = watched(command, scratch)
        return {**from_record(Path(scratch) / "bench" / "metrics.jsonl", given), "peak_mib": memory}


def from_record(path: Path, given: argparse.Namespace) -> dict[str, float]:
    """Speed over the steps after the warm-up, from a run's own record."""
    lines: list[dict[str, Any]] = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    steps = [line for line in lines if "train_loss" in line]
    tokens = seconds = 0.0
    for before, line in itertools.pairwise(steps):
        if before["step"] >= given.warmup:
            done = line["tokens"] - before["tokens"]
            tokens, seconds = tokens + done, seconds + done / line["tokens_per_s"]
    shares = [line["data_share"] for line in steps[1:] if "data_share" in line]
    return {
        "tokens_per_s": tokens / seconds,
        "loss": steps[-1]["train_loss"],
        "data_share": statistics.mean(shares) if shares else float("nan"),
    }


def watched(command: list[Any], scratch: str) -> tuple[str, float]:
    """Run a Python command; give its standard output, and the peak memory in MiB of its largest process."""
    environment = dict(os.environ) | {"RAY_USAGE_STATS_ENABLED": "0", "MLFLOW_DISABLE_TELEMETRY": "true"}
    words = [sys.executable, *map(str, command)]
    with (Path(scratch) / "stderr.txt").open("w+", encoding="utf-8") as errors:
        process = subprocess.Popen(words, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=errors, text=True)
        peaks = [0.0]
        watcher = threading.Thread(target=_poll, args=(psutil.Process(process.pid), peaks), daemon=True)
        watcher.start()
        output, _ = process.communicate()
        if process.returncode:
            errors.seek(0)
            raise SystemExit(f"{' '.join(words)} failed:\n{errors.read()[-3000:]}")
    return output, peaks[0]


def _poll(root: psutil.Process, peaks: list[float]) -> None:
    """Ask seldom, for it takes time from what is measured; the kernel keeps every process's largest size."""
    with contextlib.suppress(psutil.NoSuchProcess):
        while root.status() != psutil.STATUS_ZOMBIE:
            family = [root, *root.children(recursive=True)]
            peaks[0] = max([peaks[0], *(_largest_mib(process.pid) for process in family)])
            threading.Event().wait(POLL_S)


def _largest_mib(pid: int) -> float:
    """The most memory a process has had; 0 for one that is gone or belongs to Ray's own C++."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text(encoding="utf-8").splitlines()
    except OSError:
        return 0.0
    fields = dict(line.split(":", 1) for line in lines if ":" in line)
    if "VmHWM" not in fields or fields["Name"].strip() in ("raylet", "gcs_server"):
        return 0.0
    return int(fields["VmHWM"].split()[0]) / 2**10


def print_table(rounds: list[dict[str, dict[str, float]]]) -> None:
    """Medians, and ours over each, as a Markdown table."""
    reference = OURS if OURS in rounds[0] else next(iter(rounds[0]))
    print(f"| side | tokens/s | {reference} is faster by | largest process, MiB |\n|---|---|---|---|")
    for side in rounds[0]:
        ratios = [results[reference]["tokens_per_s"] / results[side]["tokens_per_s"] for results in rounds]
        speed = statistics.median(results[side]["tokens_per_s"] for results in rounds)
        memory = max(results[side]["peak_mib"] for results in rounds)
        listed = ", ".join(f"{ratio:.2f}" for ratio in ratios)
        print(f"| {side} | {speed:,.0f} | {statistics.median(ratios):.2f} ({listed}) | {memory:,.0f} |")
    shares = [results[OURS]["data_share"] for results in rounds if OURS in results]
    if shares:
        print(f"reading batches takes {statistics.mean(shares):.2%} of a step")


if __name__ == "__main__":
    raise SystemExit(main())
