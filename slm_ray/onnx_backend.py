"""The fast backend of CPUs: the decode graph on ONNX Runtime, with one cache that it reads and writes in place.

In: tokens for rows. Out: logits. Fused attention takes each row's own length, so rows need no padding and no mask. The
rows of a call are a contiguous part of the cache, bound as past and as present alike, so nothing is copied; the
bindings of single steps are made once. `backends.py` makes it; the engine runs it as any `Backend`.
"""

import dataclasses
import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np
import onnxruntime
import torch
from numpy.typing import NDArray
from torch import Tensor

from slm_ray.model import Decoder
from slm_ray.onnx_graph import Weights, decode_graph, padded_width

Array = NDArray[Any]


class OnnxBackend:
    """A `Backend` on ONNX Runtime. It copies the weights: what becomes of the model afterwards does not matter."""

    def __init__(self, model: Decoder, max_rows: int = 8, *, weights: Weights = "fp32", threads: int = 0) -> None:
        """threads: of each product; 0 takes one a core.

        Raises:
            ValueError: the model is too large for one graph, or max_rows is below 1.
        """
        if max_rows < 1:
            raise ValueError(f"max_rows ({max_rows}) must be at least 1")
        self.config = config = model.config
        self.max_rows = max_rows
        self._session = _session(decode_graph(model, weights).SerializeToString(), threads)
        self._names = {one.name for one in self._session.get_inputs()}
        shape = (config.n_layers, 2, max_rows, config.kv_heads, config.seq_len, padded_width(config))
        self._cache = np.zeros(shape, dtype=np.float32)  # of each layer its keys, then its values
        self._lengths = np.zeros(max_rows, dtype=np.int64)
        self._inputs = _Inputs.of(max_rows, 1)
        self._logits = np.zeros((max_rows, config.vocab_size), dtype=np.float32)
        self._steps = [self._step(rows) for rows in range(1, max_rows + 1)]

    def read(self, row: int, tokens: Sequence[int], *, wants_logits: bool = True) -> Tensor | None:
        """See `Backend`."""
        count = len(tokens)
        self._lengths[row] = 0
        if not count:
            return None
        inputs = _Inputs.of(1, count)
        inputs.fill([tokens], self._lengths[row : row + 1])
        if not wants_logits:
            inputs.wanted = inputs.wanted[:0]
        logits = np.empty((len(inputs.wanted), self.config.vocab_size), dtype=np.float32)
        self._session.run_with_iobinding(self._binding(inputs, slice(row, row + 1), logits))
        self._lengths[row] = count
        return torch.from_numpy(logits) if wants_logits else None

    def decode(self, tokens: Sequence[int]) -> Tensor:
        """See `Backend`."""
        step = self._steps[len(tokens) - 1]
        lengths = self._lengths[: len(tokens)]
        step.inputs.fill(np.array(tokens)[:, None], lengths)
        self._session.run_with_iobinding(step.binding)
        lengths += 1
        return step.logits

    def length(self, row: int) -> int:
        """See `Backend`."""
        return int(self._lengths[row])

    def move(self, source: int, target: int) -> None:
        """See `Backend`."""
        count = self._lengths[source]
        self._cache[:, :, target, :, :count] = self._cache[:, :, source, :, :count]
        self._lengths[target] = count

    def _step(self, rows: int) -> "_Step":
        inputs, logits = self._inputs.first(rows), self._logits[:rows]
        return _Step(inputs, torch.from_numpy(logits), self._binding(inputs, slice(rows), logits))

    def _binding(self, inputs: "_Inputs", rows: slice, logits: Array) -> Any:
        """Where a run reads and writes. The memory must stay: the binding knows its addresses alone."""
        binding = self._session.io_binding()
        for name, values in vars(inputs).items():
            if name in self._names:
                binding.bind_input(name, *_place(values))
        for layer, (kind, half) in itertools.product(range(self.config.n_layers), (("keys", 0), ("values", 1))):
            part = self._cache[layer, half, rows]  # (B, n_kv_heads, seq_len, width)
            binding.bind_input(f"{kind}_{layer}", *_place(part))
            binding.bind_output(f"new_{kind}_{layer}", *_place(part))
        binding.bind_output("logits", *_place(logits))
        return binding


@dataclasses.dataclass
class _Inputs:
    """The small inputs of a call of B rows with T tokens each, under the graph's names; see `onnx_graph`."""

    tokens: Array  # (B, T)
    positions: Array  # (B, T)
    ends: Array  # (B,)
    longest: Array  # ()
    wanted: Array  # (B * T, 2), or none of them

    @classmethod
    def of(cls, rows: int, steps: int) -> "_Inputs":
        """Zeros, and logits wanted everywhere."""
        places = np.indices((rows, steps)).reshape(2, -1).T  # (B * T, 2)
        return cls(
            tokens=np.zeros((rows, steps), dtype=np.int64),
            positions=np.zeros((rows, steps), dtype=np.int64),
            ends=np.zeros(rows, dtype=np.int32),
            longest=np.zeros((), dtype=np.int32),
            wanted=np.ascontiguousarray(places, dtype=np.int64),
        )

    def first(self, rows: int) -> "_Inputs":
        """The memory of the first rows, of one token each."""
        return _Inputs(self.tokens[:rows], self.positions[:rows], self.ends[:rows], self.longest, self.wanted[:rows])

    def fill(self, tokens: Array | Sequence[Sequence[int]], lengths: Array) -> None:
        """Take B x T tokens that go on from rows of these lengths, (B,)."""
        steps = self.tokens.shape[1]
        self.tokens[...] = tokens
        np.add(lengths[:, None], np.arange(steps), out=self.positions)
        np.add(lengths, steps - 1, out=self.ends, casting="unsafe")
        self.longest[...] = lengths.max() + steps


@dataclasses.dataclass(frozen=True)
class _Step:
    """What a step of so many rows needs, made once."""

    inputs: _Inputs
    logits: Tensor
    binding: Any


def _place(values: Array) -> tuple[str, int, Any, tuple[int, ...], int]:
    """Arguments that bind an array's memory."""
    assert values.flags.c_contiguous
    return "cpu", 0, values.dtype.type, values.shape, values.ctypes.data


def _session(model: bytes, threads: int) -> Any:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3
    return onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
