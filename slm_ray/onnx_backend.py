"""The fast backend of CPUs: the decode graph on ONNX Runtime, with one cache that it reads and writes in place.

In: tokens for rows. Out: logits. Fused attention takes each row's own length, so rows need no padding and no mask; the
rows of a call are a contiguous part of the cache, bound as past and as present alike, so nothing is copied.
`backends.py` makes it; the engine runs it as any `Backend`.
"""

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import onnxruntime
import torch
from numpy.typing import NDArray
from torch import Tensor

from slm_ray.model import Decoder
from slm_ray.onnx_graph import Weights, decode_graph, padded_width

Array = NDArray[Any]
_MANY = 64
"""Rows of the output layer computed at a time for a prompt whose logits nobody wants: none of them is a place."""


class OnnxBackend:
    """A `Backend` on ONNX Runtime. It copies the weights: what becomes of the model afterwards does not matter."""

    def __init__(self, model: Decoder, max_rows: int = 8, *, weights: Weights = "fp32", threads: int = 0) -> None:
        """threads: of each product; 0 takes a thread a core."""
        if max_rows < 1:
            raise ValueError(f"max_rows ({max_rows}) must be at least 1")
        self.config = config = model.config
        self.max_rows = max_rows
        self._session = _session(decode_graph(model, weights).SerializeToString(), threads)
        shape = (2 * config.n_layers, max_rows, config.kv_heads, config.seq_len, padded_width(config))
        self._cache = np.zeros(shape, dtype=np.float32)  # of each layer its keys, then its values
        self._lengths = np.zeros(max_rows, dtype=np.int64)
        self._step = _Inputs.empty(max_rows, 1)
        self._logits = np.zeros((max_rows, config.vocab_size), dtype=np.float32)
        self._bindings: dict[int, Any] = {}  # of a step, by its number of rows

    def read(self, row: int, tokens: Sequence[int]) -> Tensor | None:
        """See `Backend`."""
        count = len(tokens)
        self._lengths[row] = 0
        if not count:
            return None
        inputs = _Inputs.empty(1, count)
        inputs.fill([tokens], np.zeros(1, dtype=np.int64))
        logits = np.empty((count, self.config.vocab_size), dtype=np.float32)
        self._session.run_with_iobinding(self._binding(inputs.arrays(1, count), self._rows(row, row + 1), logits))
        self._lengths[row] = count
        return torch.from_numpy(logits)

    def decode(self, tokens: Sequence[int]) -> Tensor:
        """See `Backend`."""
        rows = len(tokens)
        logits = self._logits[:rows]
        if rows not in self._bindings:
            self._bindings[rows] = self._binding(self._step.arrays(rows, 1), self._rows(0, rows), logits)
        self._step.fill(np.array(tokens)[:, None], self._lengths[:rows])
        self._session.run_with_iobinding(self._bindings[rows])
        self._lengths[:rows] += 1
        return torch.from_numpy(logits)

    def length(self, row: int) -> int:
        """See `Backend`."""
        return int(self._lengths[row])

    def move(self, source: int, target: int) -> None:
        """See `Backend`."""
        count = self._lengths[source]
        self._cache[:, target, :, :count] = self._cache[:, source, :, :count]
        self._lengths[target] = count

    def _rows(self, start: int, stop: int) -> list[Array]:
        """Part of the cache of each layer: keys_0, values_0, keys_1, ..., each (rows, n_kv_heads, seq_len, width)."""
        return [part[start:stop] for part in self._cache]

    def _binding(self, inputs: Mapping[str, Array], cache: Sequence[Array], logits: Array) -> Any:
        """Memory of a run's inputs and outputs; the session reads and writes there without a copy."""
        binding = self._session.io_binding()
        known = {one.name for one in self._session.get_inputs()}
        for name, values in inputs.items():
            if name in known:
                binding.bind_input(name, "cpu", 0, values.dtype.type, values.shape, values.ctypes.data)
        names = itertools.product(range(self.config.n_layers), ("keys", "values"))
        for (layer, kind), values in zip(names, cache, strict=True):
            where = ("cpu", 0, np.float32, values.shape, values.ctypes.data)
            binding.bind_input(f"{kind}_{layer}", *where)
            binding.bind_output(f"new_{kind}_{layer}", *where)
        binding.bind_output("logits", "cpu", 0, np.float32, logits.shape, logits.ctypes.data)
        return binding


class _Inputs:
    """Memory of the small inputs of a call of `rows` rows and `steps` tokens each."""

    @classmethod
    def empty(cls, rows: int, steps: int):
        self = cls()
        self.tokens = np.zeros((rows, steps), dtype=np.int64)
        self.positions = np.zeros((rows, steps), dtype=np.int64)
        self.ends = np.zeros(rows, dtype=np.int32)
        self.longest = np.zeros((), dtype=np.int32)
        self.wanted = np.arange(rows * steps, dtype=np.int64)
        return self

    def fill(self, tokens, lengths) -> None:
        rows, steps = len(tokens), len(tokens[0])
        self.tokens[:rows] = tokens
        self.positions[:rows] = lengths[:, None] + np.arange(steps)
        self.ends[:rows] = lengths + (steps - 1)
        self.longest[...] = lengths.max() + steps

    def arrays(self, rows: int, steps: int) -> dict[str, Array]:
        return {
            "tokens": self.tokens[:rows],
            "positions": self.positions[:rows],
            "ends": self.ends[:rows],
            "longest": self.longest,
            "wanted": self.wanted[: rows * steps],
        }


def _session(model: bytes, threads: int) -> Any:
    import os
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3
    if os.environ.get("SPIN") == "0":
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    if os.environ.get("PROF"):
        options.enable_profiling = True
        options.profile_file_prefix = "/tmp/fastx/prof"
    if os.environ.get("MP") == "0":
        options.enable_mem_pattern = False
    return onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
