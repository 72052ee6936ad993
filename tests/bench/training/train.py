"""Training speed against named peers, in one run: `make bench-train DATA=data/tinystories`.

Tokens per second on this machine's cores, with the same shape, data and batch: (a) `bare_loop.py`, our model in a bare
torch loop; (b) `nanogpt_recipe.py`; (c) `transformers_trainer.py`; (d) ours with everything on: `slm_ray/train.py`
through Ray Train, with MLflow, progress and a record, as one worker with all threads, the same with AdamW, and as two
workers that share the threads.

The speed of a shared machine swings by a third from minute to minute, so the sides are compared within the same one:
each variant of ours is started together with the peers, all are stopped (SIGSTOP, with every process of Ray), and each
in turn is continued for some steps. Of these the first window, in which it was woken, does not count. One turn of all
sides gives one ratio, and the table has the median and the quartiles over the turns. Compiling, validations and
checkpoints are outside of every figure.
"""

import argparse
import contextlib
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
from peer_options import FOREVER

from slm_ray.limits import core_count

ROOT = Path(__file__).resolve().parents[3]
sys.path.insert(0, str(ROOT))
from tests.bench.machine import machine_line

BENCH = Path(__file__).resolve().parent
POLL_S = 0.2
STEP_TIMEOUT_S = 600.0
"""For as many steps as a window has, the compiler included."""
STOP_TIMEOUT_S = 120.0
QUIET = {"RAY_USAGE_STATS_ENABLED": "0", "MLFLOW_DISABLE_TELEMETRY": "true"}
PATIENT = {"RAY_health_check_timeout_ms": "3600000", "RAY_health_check_failure_threshold": "1000000"}
"""Ray takes a node that was stopped for half a minute for dead."""
BARE, NANOGPT, TRAINER = "bare torch loop", "nanoGPT's recipe", "transformers.Trainer"
SCRIPTS = {BARE: "bare_loop.py", NANOGPT: "nanogpt_recipe.py", TRAINER: "transformers_trainer.py"}
OURS = {
    "ours, 1 worker": (1, []),
    "ours, 1 worker, AdamW": (1, ["--optim.name", "adamw"]),
    "ours, 2 workers": (2, []),
}


def main() -> int:
    """Compare every variant of ours with all peers; print a table for each."""
    parser = argparse.ArgumentParser(prog="bench/train.py", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data", default="data/tinystories", help="data set (default: data/tinystories)")
    parser.add_argument("--preset", default="story-5m", help="shape and optimizer (default: story-5m)")
    parser.add_argument("--batch-size", type=int, default=32, help="sequences a step (default: 32)")
    parser.add_argument("--turns", type=int, default=8, help="of each side (default: 8)")
    parser.add_argument("--window", type=int, default=4, help="steps measured in a turn, after as many (default: 4)")
    parser.add_argument("--warmup", type=int, default=3, help="windows before the first turn (default: 3)")
    parser.add_argument("--side", action="append", choices=[*SCRIPTS, *OURS], help="only this one and others so named")
    given = parser.parse_args()
    given.threads = core_count()
    signal.signal(signal.SIGTERM, leave)
    asked = given.side or [*SCRIPTS, *OURS]
    print(f"{machine_line()}; preset {given.preset}, {given.batch_size} sequences a step", flush=True)
    for name in [name for name in OURS if name in asked]:
        compare([*(peer for peer in SCRIPTS if peer in asked), name], given)
    return 0


def compare(names: list[str], given: argparse.Namespace) -> None:
    """Run some sides in turn, and print the table of the last one over the others."""
    with contextlib.ExitStack() as stack:
        sides = []
        for name in names:
            print(f"starting {name}, which compiles for up to a minute", flush=True)
            scratch = stack.enter_context(tempfile.TemporaryDirectory())
            sides.append(stack.enter_context(Side(name, Path(scratch), given).started()))
        speeds: dict[str, list[float]] = {name: [] for name in names}
        for turn in range(given.turns):
            for side in sides if turn % 2 else sides[::-1]:
                speeds[side.name].append(side.run(2))
            shown = ", ".join(f"{name} {values[-1]:,.0f}" for name, values in speeds.items())
            print(f"turn {turn + 1}, tokens/s: {shown}", flush=True)
        print_table(sides, speeds)


class Side:
    """A program that trains for ever, and runs only when it is told to."""

    def __init__(self, name: str, scratch: Path, given: argparse.Namespace) -> None:
        self.name, self.scratch, self.given = name, scratch, given
        self.record = scratch / ("record.jsonl" if name in SCRIPTS else "bench/metrics.jsonl")
        self.peak_mib = 0.0

    @contextlib.contextmanager
    def started(self) -> Iterator["Side"]:
        """Start, warm up and stop it; end it, and all that it has started, with the body."""
        words = [sys.executable, *map(str, self._command())]
        environment = os.environ | QUIET | PATIENT
        with (self.scratch / "record.jsonl").open("wb") as output, (self.scratch / "stderr.txt").open("wb") as errors:
            self.process = subprocess.Popen(words, cwd=ROOT, env=environment, stdout=output, stderr=errors)
        self.family = [psutil.Process(self.process.pid)]
        try:
            self.run(self.given.warmup)
            yield self
        finally:
            self._end()

    def run(self, n_windows: int) -> float:
        """Let it go on for at least as many windows, and stop it. Returns the speed of the last one, in tokens/s."""
        self._signal(signal.SIGCONT)
        before, deadline = len(self.windows()), time.monotonic() + STEP_TIMEOUT_S * n_windows
        while len(self.windows()) < before + n_windows:
            if self.process.poll() is not None or time.monotonic() > deadline:
                raise SystemExit(f"{self.name} failed:\n{(self.scratch / 'stderr.txt').read_text()[-3000:]}")
            time.sleep(POLL_S)
        for _ in range(2):  # what was started while the first were stopped
            self.family = [self.family[0], *self.family[0].children(recursive=True)]
            self._signal(signal.SIGSTOP)
        self.peak_mib = max(self.peak_mib, *(_largest_mib(process.pid) for process in self.family))
        return float(self.windows()[-1]["tokens_per_s"])

    def windows(self) -> list[dict[str, Any]]:
        """What it has recorded of its speed: a line for each window."""
        if not self.record.exists():
            return []
        lines = self.record.read_text(encoding="utf-8").split("\n")[:-1]
        return [json.loads(line) for line in lines if '"tokens_per_s"' in line]

    def _command(self) -> list[Any]:
        given = self.given
        common: list[Any] = ["--data", given.data, "--batch-size", given.batch_size, "--threads"]
        if self.name in SCRIPTS:
            own = [BENCH / SCRIPTS[self.name], "--preset", given.preset, "--window", given.window]
            return [*own, *common, given.threads]
        workers, changes = OURS[self.name]
        command = [ROOT / "slm_ray" / "train.py", "--config", given.preset, *common, max(1, given.threads // workers)]
        command += ["--workers", workers, "--output", self.scratch, "--name", "bench", "--compile", "on"]
        command += ["--max-steps", FOREVER, "--eval-interval-steps", FOREVER, "--log-interval-steps", given.window]
        command += ["--mtp-weights", 0]  # the next token alone, as the peers
        command += ["--tracking-uri", f"sqlite:///{self.scratch}/mlflow.db", "--max-failures", 0]
        return [*command, *changes]

    def _signal(self, number: signal.Signals) -> None:
        for process in self.family:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.send_signal(number)

    def _end(self) -> None:
        with contextlib.suppress(psutil.NoSuchProcess):
            self.family = [self.family[0], *self.family[0].children(recursive=True)]
        self._signal(signal.SIGCONT)
        self.process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(STOP_TIMEOUT_S)
        self._signal(signal.SIGKILL)
        self.process.wait()


def leave(number: int, _frame: object) -> None:
    """End as after an error, so that nothing that was started stays."""
    raise SystemExit(128 + number)


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


def print_table(sides: list[Side], speeds: dict[str, list[float]]) -> None:
    """Medians, and the last side over each, turn by turn, as a Markdown table."""
    ours = sides[-1]
    print(f"| side | tokens/s | {ours.name} over it: median (quartiles) | largest process, MiB |\n|---|---|---|---|")
    for side in sides:
        ratios = [mine / other for mine, other in zip(speeds[ours.name], speeds[side.name], strict=True)]
        low, middle, high = statistics.quantiles(ratios, n=4) if len(ratios) > 1 else ratios * 3
        speed = statistics.median(speeds[side.name])
        print(f"| {side.name} | {speed:,.0f} | {middle:.2f} ({low:.2f} to {high:.2f}) | {side.peak_mib:,.0f} |")
    told = [line for line in ours.windows() if "data_share" in line]
    data, peak = (statistics.median(line.get(name, 0.0) for line in told) for name in ("data_share", "mfu"))
    print(f"{ours.name}: {peak:.0%} of the measured peak; reading batches takes {data:.2%} of a step\n", flush=True)


if __name__ == "__main__":
    raise SystemExit(main())
