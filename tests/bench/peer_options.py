"""What every side of `train.py` is given, and how its speed is taken: the same for all."""

import argparse
import json
import time

import torch


def options() -> argparse.Namespace:
    """Data set, shape, and how long."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--data", required=True, help="data set, as pipelines/prepare.py wrote it")
    parser.add_argument("--preset", default="story-5m", help="shape and optimizer of ours")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--warmup", type=int, default=20, help="steps not measured: the compiler, the caches")
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--threads", type=int, default=2)
    return parser.parse_args()


class Stopwatch:
    """Tokens per second after the warm-up."""

    def __init__(self, given: argparse.Namespace, seq_len: int) -> None:
        self.given, self.tokens_a_step = given, given.batch_size * seq_len
        self.started, self.loss = time.perf_counter(), float("nan")

    def step(self, step: int, loss: torch.Tensor) -> None:
        """Call after each step, from 0."""
        if step + 1 == self.given.warmup:
            self.started = time.perf_counter()
        if step + 1 == self.given.steps:
            self.loss = float(loss.detach())

    def report(self) -> None:
        """Print the last line, which the bench reads."""
        seconds = time.perf_counter() - self.started
        speed = (self.given.steps - self.given.warmup) * self.tokens_a_step / seconds
        print(json.dumps({"tokens_per_s": speed, "loss": self.loss}))
