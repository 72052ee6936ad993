"""Options, prompts and timing of every side of `serve.py`: the same for all."""

import argparse
import hashlib
import json
import random
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path

PROMPT_TOKENS = 6
EOS_ID = 0
"""What stands before every prompt, as in training."""
Write = Callable[[list[list[int]], int], Sequence[Sequence[int]]]
"""Prompts of equal length and how many tokens to write after each -> those tokens."""


def options() -> argparse.Namespace:
    """Which model, and how much of it."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", required=True, type=Path, help="folder of a checkpoint")
    parser.add_argument("--streams", required=True, help="numbers of stories at a time, as 1,4,16")
    parser.add_argument("--tokens", type=int, default=128, help="to write in each story")
    parser.add_argument("--repeats", type=int, default=5, help="of each measurement, of which the median counts")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--backend", default="onnx", help="of ours")
    parser.add_argument("--ask", action="store_true", help="ours: a round for each line of the standard input")
    parser.add_argument(
        "--ingress", default="auto", help="ours, HTTP: direct or proxy (default: what the server takes)"
    )
    return parser.parse_args()


def prompts(streams: int, vocab_size: int) -> list[list[int]]:
    """Different short prompts of one length, the same for every side; none holds the end-of-text token."""
    dice = random.Random(streams)
    return [[dice.randrange(1, vocab_size) for _ in range(PROMPT_TOKENS)] for _ in range(streams)]


def measure(given: argparse.Namespace, vocab_size: int, write: Write) -> None:
    """Time a side at every number of streams, and print one line of JSON.

    tokens_per_s counts the written tokens over the whole time, prompts included. `stories` are digests of the first
    ten tokens of each story, by which the bench sees whether the sides compute the same.
    """
    speeds, digests = {}, {}
    for streams in map(int, given.streams.split(",")):
        own = prompts(streams, vocab_size)
        stories = write(own, given.tokens)  # the first time is not measured
        assert [len(story) for story in stories] == [given.tokens] * streams
        seconds = []
        for _ in range(given.repeats):
            started = time.perf_counter()
            write(own, given.tokens)
            seconds.append(time.perf_counter() - started)
        speeds[streams] = streams * given.tokens / statistics.median(seconds)
        digests[streams] = [hashlib.sha256(str(list(story[:10])).encode()).hexdigest()[:12] for story in stories]
    print(json.dumps({"tokens_per_s": speeds, "stories": digests}))
