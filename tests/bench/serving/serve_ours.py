"""Our engine for `serve.py`: continuous batching, text and all, on the backend that is named.

Arguments: see `serve_options.py`. With `--ask` it waits for lines on its standard input, each a number of streams, and
answers each with the seconds that such a round took and the tokens that it wrote: so `serve_http.py` measures both
sides in turn.
"""

import sys
import time

import torch
from serve_options import EOS_ID, measure, options, prompts

from slm_ray.generation.backend_choice import make_backend
from slm_ray.generation.engine import Engine
from slm_ray.generation.sampling import SamplingParams
from slm_ray.runs.checkpoint import load_model


def main() -> None:
    """Load the checkpoint, and print the speed."""
    given = options()
    torch.set_num_threads(given.threads)
    model, tokenizer = load_model(given.model)
    assert tokenizer.eos_id == EOS_ID
    slots = max(map(int, given.streams.split(",")))
    engine = Engine(make_backend(model, slots, given.backend, given.threads), tokenizer)

    def write(prompts: list[list[int]], count: int) -> list[list[int]]:
        params = SamplingParams(temperature=0, max_tokens=count)
        return [list(story.tokens) for story in engine.generate(prompts, [params] * len(prompts))]

    if not given.ask:
        return measure(given, tokenizer.vocab_size, write)
    for line in sys.stdin:
        own = prompts(int(line), tokenizer.vocab_size, given.prompt_tokens)
        started = time.perf_counter()
        stories = write(own, given.tokens)
        print(time.perf_counter() - started, sum(map(len, stories)), flush=True)
    return None


if __name__ == "__main__":
    main()
