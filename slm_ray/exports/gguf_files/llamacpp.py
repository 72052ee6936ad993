"""llama.cpp itself, where `llama-cpp-python` is installed: what it computes of a GGUF file.

In: a file. Out: a `Runtime`. Keys and values are kept in fp32, so that what differs is the file and llama.cpp's
arithmetic. It is a package that compiles for minutes: CI does without it, `make bench-export` has it.
"""

import ctypes
import importlib.metadata
from collections.abc import Collection, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from slm_ray.config.schema import ModelConfig
from slm_ray.exports.parity import ParityError, greedy

Array = NDArray[Any]
_FLASH_ATTENTION_OFF, _F32 = 0, 0
_MAX_BATCH = 512  # tokens of one call


def slack(config: ModelConfig) -> float:
    """What is added to the bounds of `parity` for llama.cpp: on CPUs it looks GELU up in a table of f16 numbers."""
    return 2e-3 if config.mlp == "gelu" else 0.0


class LlamaCppRuntime:
    """A model, its vocabulary and one context of its whole length. Close it, or use it as a context manager."""

    def __init__(self, path: Path, stop_ids: Collection[int], threads: int = 2) -> None:
        """stop_ids: those that are asked for in the file. Raises: ParityError when llama.cpp does not load it."""
        import llama_cpp

        self._llama: Any = llama_cpp
        self.name = f"llama.cpp (llama-cpp-python {importlib.metadata.version('llama-cpp-python')})"
        self._silent = llama_cpp.llama_log_callback(lambda *_: None)  # kept: C holds no reference
        llama_cpp.llama_log_set(self._silent, ctypes.c_void_p(0))
        llama_cpp.llama_backend_init()
        options = llama_cpp.llama_model_default_params()
        self._model = llama_cpp.llama_model_load_from_file(str(path).encode(), options)
        if not self._model:
            raise ParityError(f"llama.cpp does not load {path.name}")
        self._words = llama_cpp.llama_model_get_vocab(self._model)
        # its own list has more, by their letters: <|im_end|>, <|endoftext|>
        self.stop_ids = frozenset(one for one in stop_ids if llama_cpp.llama_vocab_is_eog(self._words, one))
        self._entries = int(llama_cpp.llama_vocab_n_tokens(self._words))
        settings = llama_cpp.llama_context_default_params()
        settings.n_ctx = int(llama_cpp.llama_model_n_ctx_train(self._model))
        settings.n_batch = settings.n_ubatch = _MAX_BATCH
        settings.n_threads = settings.n_threads_batch = threads
        settings.flash_attn_type, settings.type_k, settings.type_v = _FLASH_ATTENTION_OFF, _F32, _F32
        self._context = llama_cpp.llama_init_from_model(self._model, settings)
        if not self._context:
            raise ParityError(f"llama.cpp makes no context of {path.name}")
        self._position = 0

    def __enter__(self) -> "LlamaCppRuntime":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._llama.llama_free(self._context)
        self._llama.llama_model_free(self._model)

    def encode(self, text: str) -> list[int]:
        """See `Runtime`."""
        content = text.encode("utf-8")
        room = len(content) + 8
        found = (self._llama.llama_token * room)()
        count = self._llama.llama_tokenize(self._words, content, len(content), found, room, False, False)
        return [int(token) for token in found[: max(count, 0)]]

    def logits(self, tokens: Sequence[int]) -> Array:
        """See `Runtime`."""
        self._forget()
        return self._decode(tokens)

    def write(self, tokens: Sequence[int], count: int) -> list[int]:
        """See `Runtime`."""
        self._forget()
        return greedy(lambda ahead: self._decode(ahead)[-1], tokens, count, self.stop_ids)

    def _forget(self) -> None:
        self._llama.llama_memory_clear(self._llama.llama_get_memory(self._context), True)
        self._position = 0

    def _decode(self, tokens: Sequence[int]) -> Array:
        """Append tokens; the logits after each, (T, vocab_size)."""
        parts = [self._decode_part(tokens[at : at + _MAX_BATCH]) for at in range(0, len(tokens), _MAX_BATCH)]
        return np.concatenate(parts)

    def _decode_part(self, tokens: Sequence[int]) -> Array:
        batch = self._llama.llama_batch_init(len(tokens), 0, 1)
        for place, token in enumerate(tokens):
            batch.token[place], batch.pos[place] = token, self._position + place
            batch.n_seq_id[place], batch.seq_id[place][0] = 1, 0
            batch.logits[place] = 1
        batch.n_tokens = len(tokens)
        if self._llama.llama_decode(self._context, batch) != 0:
            raise ParityError("llama.cpp does not decode")
        self._position += len(tokens)
        found = np.ctypeslib.as_array(
            self._llama.llama_get_logits(self._context), shape=(len(tokens), self._entries)
        ).copy()
        self._llama.llama_batch_free(batch)
        return found
