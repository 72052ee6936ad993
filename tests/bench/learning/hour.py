"""What is learned in an hour, repeated data allowed: `make bench-learn-hour DATA=data/tinystories`.

`slm_ray/train.py` itself, in each arithmetic that was asked for, one after another: a short run tells the seconds of a
step, and the long one gets as many steps as fit into `--minutes`, compiling and validations included. Of the default
preset with what several passes need (`RECIPE`); further options of `train.py` stand behind `--`. Each run's best
checkpoint counts, by the fair measure on the validation split; the test split is not touched.
"""

import argparse
import math
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from product_runs import ROOT, refuse, train

from slm_ray.dataset.manifest import load_manifest

sys.path.insert(0, str(ROOT))
from tests.bench.machine import machine_line

RECIPE = ("--optim.weight-decay", "0.35", "--optim.lr", "5e-3")
"""Against learning stories by heart, which a single pass cannot, and the lower rate of a longer run. No dropout: it
costs a quarter of the passes that a CPU makes in an hour, and was not tried."""
PROBE_STEPS = 70
QUICKEST_STEP_S = 0.001
"""Of any machine: for a first look, before a run has told."""
START_S = 75.0
"""Ray's start, compiling and the last validation."""
SPARE = 0.04
"""Of the time, for the other validations and for a machine that slows down."""


def main() -> int:
    """Run every arithmetic that was asked for; print a row for each."""
    parser = argparse.ArgumentParser(prog="bench/hour.py", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data", default="data/tinystories", help="data set (default: data/tinystories)")
    parser.add_argument("--minutes", type=float, default=60.0, help="for each arithmetic (default: 60)")
    parser.add_argument("--precisions", nargs="+", default=["fp32"], help="fp32, bf16 (default: fp32)")
    parser.add_argument("--output", default="", help="where the runs stay (default: nowhere)")
    parser.add_argument("options", nargs="*", help="of train.py, behind --")
    given = parser.parse_args()
    refuse(given.options, "--precision")
    if not math.isfinite(given.minutes) or steps_within(given.minutes, QUICKEST_STEP_S) < 1:
        return _too_short(given.minutes)
    print(machine_line(), flush=True)
    print("| Arithmetic | Steps | Tokens | Passes | Minutes | Best: bits per byte | nats a token | at step |")
    print("|---|---|---|---|---|---|---|---|", flush=True)
    with tempfile.TemporaryDirectory() as temporary:
        output = Path(given.output or temporary).resolve()
        try:
            for precision in given.precisions:
                print(_row(precision, given.data, given.minutes, output, given.options), flush=True)
        except subprocess.CalledProcessError as error:  # train.py has said why
            return error.returncode
    return 0


def _too_short(minutes: float) -> int:
    sys.stderr.write(f"error: --minutes {minutes:g}: no step fits beside the {START_S:g} s of start and compiler\n")
    return 2


def steps_within(minutes: float, step_s: float) -> int:
    """Steps of so many seconds that fit, beside the start and the validations."""
    return int((minutes * 60 * (1 - SPARE) - START_S) / step_s)


def _row(precision: str, data: str, minutes: float, output: Path, options: Sequence[str]) -> str:
    every = ("--data", str(Path(data).resolve()), "--precision", precision, *RECIPE, *options)
    probe = train(output / f"probe-{precision}", *every, "--max-steps", str(PROBE_STEPS))
    steps = steps_within(minutes, probe.tokens / probe.steps / probe.tokens_per_s)
    if steps < 1:  # which train.py would take for a whole epoch
        raise SystemExit(_too_short(minutes))
    run = train(output / f"hour-{precision}", *every, "--max-steps", str(steps))
    passes = run.tokens / load_manifest(data).splits["train"].tokens
    best = run.best
    return (
        f"| {precision} | {run.steps:,} | {run.tokens:,} | {passes:.1f} | {run.seconds / 60:.1f} "
        f"| {best['val_bits_per_byte']:.4f} | {best['val_loss']:.4f} | {best['step']:,} |"
    )


if __name__ == "__main__":
    sys.exit(main())
