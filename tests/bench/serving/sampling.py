"""What a setting costs a step: drawing a token for each of 8 rows, as a multiple of drawing among all tokens.

    python tests/bench/serving/sampling.py [--vocab-size 50257] [--rows 8]

Logits are random; each figure is the median of repeats that take turns with those of drawing among all, in CPU time.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import numpy as np

from slm_ray.generation.logprobs import token_logprobs
from slm_ray.generation.sampling import MAX_BIASED, SamplingParams, draw
from slm_ray.generation.token_weights import token_weights, weighed

SETTINGS: dict[str, dict[str, Any]] = {
    "greedy": {"temperature": 0},
    "defaults": {},
    "defaults, top_p 0.9": {"top_p": 0.9},
    "top_p 0.9": {"top_k": 0, "top_p": 0.9},
    "min_p 0.1": {"top_k": 0, "min_p": 0.1},
    "top_p 0.999999, temperature 2": {"top_k": 0, "top_p": 0.999999, "temperature": 2.0},
    "top_p 0.9999, temperature 100": {"top_k": 0, "top_p": 0.9999, "temperature": 100.0},
    "top_p 0.5, temperature 100": {"top_k": 0, "top_p": 0.5, "temperature": 100.0},
    "top_p 0.01, temperature 100": {"top_k": 0, "top_p": 0.01, "temperature": 100.0},
    "top_k 512": {"top_k": 512},
    "top_k 513": {"top_k": 513},
    "top_k V / 2": {"top_k": -2},
    "top_k V - 1": {"top_k": -1},
    "top_k V - 1, top_p 0.9, temperature 2": {"top_k": -1, "top_p": 0.9, "temperature": 2.0},
    "penalties and 1,024 biases": {"presence_penalty": 1.0, "repetition_penalty": 1.1, "logit_bias": True},
    "20 log-probabilities": {"logprobs": 20},
}


class Pieces:
    """Stands for a tokenizer, whose texts are no part of the figure."""

    def pieces(self, ids: list[int]) -> list[str]:
        """A text for each."""
        return [""] * len(ids)


def step(options: dict[str, Any], logits: np.ndarray) -> Callable[[list[float]], object]:
    """What an engine does for every row with these settings."""
    vocab_size = logits.shape[1]
    top_k = {-1: vocab_size - 1, -2: vocab_size // 2}.get(options.get("top_k", 50), options.get("top_k", 50))
    biases = tuple((token, 1.0) for token in range(MAX_BIASED)) if options.get("logit_bias") else ()
    params = [SamplingParams(**{**options, "top_k": top_k, "logit_bias": biases})] * len(logits)
    weights = [token_weights(own, range(1000)) for own in params]

    def run(uniforms: list[float]) -> None:
        drawn = draw(weighed(logits, weights), params, uniforms)
        if "logprobs" in options:
            for row, token in zip(logits, drawn, strict=True):
                token_logprobs(row[None], [token], options["logprobs"], Pieces())  # type: ignore[arg-type]

    return run


def main() -> None:
    """Print a table in Markdown."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vocab-size", type=int, default=50_257)
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=40)
    given = parser.parse_args()
    generator = np.random.default_rng(0)
    logits = generator.normal(0, 3, (given.rows, given.vocab_size)).astype(np.float32)
    plain = step({"top_k": 0}, logits)
    print("| settings | ms | times all |\n| --- | --- | --- |")
    for name, options in SETTINGS.items():
        own, times = step(options, logits), {}
        for _ in range(given.repeats):
            uniforms = generator.random(given.rows).tolist()
            for run in (plain, own):
                start = time.thread_time()
                run(uniforms)
                times.setdefault(run, []).append(1e3 * (time.thread_time() - start))
        took, among_all = (statistics.median(times[run]) for run in (own, plain))
        print(f"| {name} | {took:.2f} | {took / among_all:.1f} |", flush=True)


if __name__ == "__main__":
    main()
