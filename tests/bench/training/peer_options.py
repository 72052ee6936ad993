"""What every side of `train.py` is given, and how its speed is taken: the same for all."""

import argparse
import json
import signal
import sys
import time

FOREVER = 1_000_000
"""Steps of a side, which `train.py` ends when it has seen enough."""


def options() -> argparse.Namespace:
    """Data set, shape, and how often to tell the speed. SIGTERM, which ends a side, lets it clean up."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    parser = argparse.ArgumentParser()
    parser.add_argument("--data", required=True, help="data set, as pipelines/prepare.py wrote it")
    parser.add_argument("--preset", default="story-5m", help="shape and optimizer of ours")
    parser.add_argument("--window", type=int, default=4, help="steps over which the speed is taken (default: 4)")
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--threads", type=int, default=2)
    return parser.parse_args()


class Stopwatch:
    """Tokens per second over every few steps, a line of JSON each, as our `metrics.jsonl` has them."""

    def __init__(self, given: argparse.Namespace, seq_len: int) -> None:
        self.window, self.tokens = given.window, given.window * given.batch_size * seq_len
        self.started = time.perf_counter()

    def step(self, step: int) -> None:
        """Call after each step, from 0."""
        if (step + 1) % self.window == 0:
            now = time.perf_counter()
            print(json.dumps({"step": step + 1, "tokens_per_s": self.tokens / (now - self.started)}), flush=True)
            self.started = now
