"""llama.cpp for `serve.py`: batched decoding of all stories in one `llama_decode` a token, greedy.

Arguments: see `serve_options.py`. The model is written as GGUF in fp32. Settings are those that were fastest here:
flash attention, a cache of its own for each story, fp16 in the cache (its default). Text is not decoded, only tokens.
"""

import argparse
import ctypes
import tempfile
from pathlib import Path
from typing import Any

import llama_cpp as llama
import numpy as np
from serve_options import EOS_ID, measure, options

from slm_ray.exports.gguf_files.file import Description, write_gguf
from slm_ray.runs.checkpoint import load_model

FLASH_ATTENTION = 1


class Streams:
    """A context for so many stories."""

    def __init__(self, model: Any, streams: int, seq_len: int, vocab_size: int, given: argparse.Namespace) -> None:
        params = llama.llama_context_default_params()
        params.n_ctx, params.n_seq_max = seq_len * streams, streams
        params.n_batch = params.n_ubatch = max(512, streams * (given.prompt_tokens + 1))
        params.n_threads = params.n_threads_batch = given.threads
        params.flash_attn_type, params.kv_unified, params.no_perf = FLASH_ATTENTION, False, True
        self.context = llama.llama_init_from_model(model, params)
        assert self.context, "llama.cpp made no context"
        self.batch = llama.llama_batch_init(params.n_batch, 0, 1)
        self.streams, self.vocab_size = streams, vocab_size

    def write(self, prompts: list[list[int]], count: int) -> list[list[int]]:
        """Read the prompts, then go on by one token each at a time."""
        llama.llama_memory_clear(llama.llama_get_memory(self.context), True)
        written: list[np.ndarray] = []
        tokens = [[EOS_ID, *prompt] for prompt in prompts]
        position = 0
        for _ in range(count):
            written.append(self.decode(tokens, position).argmax(axis=1))
            position += len(tokens[0])
            tokens = [[token] for token in written[-1].tolist()]
        return np.stack(written, axis=1).tolist()  # type: ignore[no-any-return]

    def decode(self, tokens: list[list[int]], position: int) -> np.ndarray:
        """Append tokens to every story; the logits after the last one of each, (streams, vocab_size)."""
        batch, at = self.batch, 0
        for stream, own in enumerate(tokens):
            for step, token in enumerate(own):
                batch.token[at], batch.pos[at] = token, position + step
                batch.n_seq_id[at], batch.seq_id[at][0] = 1, stream
                batch.logits[at] = step == len(own) - 1
                at += 1
        batch.n_tokens = at
        assert llama.llama_decode(self.context, batch) == 0, "llama.cpp failed to decode"
        return np.ctypeslib.as_array(llama.llama_get_logits(self.context), shape=(self.streams, self.vocab_size))

    def close(self) -> None:
        """Give the memory back."""
        llama.llama_batch_free(self.batch)
        llama.llama_free(self.context)


@llama.llama_log_callback
def silent(_level: int, _text: bytes, _data: ctypes.c_void_p) -> None:
    """llama.cpp's log is long."""


def main() -> None:
    """Convert the checkpoint, load it, and print the speed."""
    given = options()
    model, tokenizer = load_model(given.model)
    llama.llama_log_set(silent, ctypes.c_void_p(0))
    llama.llama_backend_init()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.gguf"
        write_gguf(path, model, tokenizer, Description(name="bench", license=""))
        loaded = llama.llama_model_load_from_file(str(path).encode(), llama.llama_model_default_params())
    assert loaded, "llama.cpp did not load the model"
    contexts: dict[int, Streams] = {}

    def write(prompts: list[list[int]], count: int) -> list[list[int]]:
        streams = len(prompts)
        if streams not in contexts:
            for other in contexts.values():
                other.close()
            contexts.clear()
            contexts[streams] = Streams(loaded, streams, model.config.seq_len, tokenizer.vocab_size, given)
        return contexts[streams].write(prompts, count)

    measure(given, tokenizer.vocab_size, write)


if __name__ == "__main__":
    main()
