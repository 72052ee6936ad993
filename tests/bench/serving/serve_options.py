"""Options, prompts and timing of every side of `serve.py`: the same for all."""

import argparse
import functools
import hashlib
import json
import random
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path

PROMPT_TOKENS = 10
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
    parser.add_argument("--prompt-tokens", type=int, default=PROMPT_TOKENS, help="of each prompt")
    parser.add_argument("--repeats", type=int, default=5, help="of each measurement, of which the median counts")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--backend", default="onnx", help="of ours, or the numbers of a peer")
    parser.add_argument("--exports", type=Path, default=Path(), help="where converted models are kept")
    parser.add_argument("--ask", action="store_true", help="ours: a round for each line of the standard input")
    parser.add_argument(
        "--ingress", default="auto", help="ours, HTTP: direct or proxy (default: what the server takes)"
    )
    parser.add_argument("--replicas", type=int, default=1, help="ours, HTTP: processes that hold the model")
    return parser.parse_args()


def shape(model: Path) -> dict[str, int]:
    """The checkpoint's own config.json, for sides that cannot load it by our code."""
    content: dict[str, int] = json.loads((model / "model" / "config.json").read_text(encoding="utf-8"))
    return content


def prompts(streams: int, vocab_size: int, length: int = PROMPT_TOKENS) -> list[list[int]]:
    """Different prompts of one length, the same for every side; none holds the end-of-text token."""
    dice = random.Random(streams)
    return [[dice.randrange(1, vocab_size) for _ in range(length)] for _ in range(streams)]


def measure(given: argparse.Namespace, vocab_size: int, write: Write) -> None:
    """Time a side at every number of streams, and print one line of JSON.

    tokens_per_s counts the written tokens over the whole time, prompts included. first_ms is how long all stories take
    together to be one token long: the time to the first token of the last of them. `stories` are digests of the first
    ten tokens of each story, by which the bench sees whether the sides compute the same.
    """
    speeds, firsts, digests = {}, {}, {}
    for streams in map(int, given.streams.split(",")):
        own = prompts(streams, vocab_size, given.prompt_tokens)
        stories = write(own, given.tokens)  # the first time is not measured
        assert [len(story) for story in stories] == [given.tokens] * streams
        speeds[streams] = streams * given.tokens / _median_s(functools.partial(write, own, given.tokens), given.repeats)
        firsts[streams] = 1000 * _median_s(functools.partial(write, own, 1), given.repeats)
        digests[streams] = [hashlib.sha256(str(list(story[:10])).encode()).hexdigest()[:12] for story in stories]
    print(json.dumps({"tokens_per_s": speeds, "first_ms": firsts, "stories": digests}))


def _median_s(work: Callable[[], object], repeats: int) -> float:
    seconds = []
    for _ in range(repeats):
        started = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - started)
    return statistics.median(seconds)
