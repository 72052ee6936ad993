"""The fast backend of CPUs: the decode graph on ONNX Runtime, with one cache that it reads and writes in place.

In: tokens for slots of the cache. Out: logits. Fused attention takes each slot's own length, so there is no padding and
no mask. The slots of a call are a contiguous part of the cache, bound as past and as present alike, so nothing is
copied; the bindings of single steps are made once. `backend_choice.py` makes it; the engine runs it as any `Backend`.
"""

import contextlib
import dataclasses
import functools
import itertools
import os
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import onnxruntime
from numpy.typing import NDArray

from slm_ray.generation.backend import Logits
from slm_ray.generation.graph.builder import Weights
from slm_ray.generation.graph.cache_scales import cache_scales
from slm_ray.generation.graph.products import LARGEST_SUM, LARGEST_WIDTH, largest_product
from slm_ray.generation.onnx_graph import decode_graph, padded_width
from slm_ray.model.decoder import Decoder

Array = NDArray[Any]
IN_TILES = "ORT_GQA_DISABLE_FLASH_ATTENTION"
"""Environment variable of ONNX Runtime: with 1, attention of a session made now writes its weights out whole."""


class OnnxBackend:
    """A `Backend` on ONNX Runtime. It copies the weights: what becomes of the model afterwards does not matter."""

    def __init__(self, model: Decoder, max_slots: int = 8, *, weights: Weights = "fp32", threads: int = 0) -> None:
        """threads: of each operator; 0 takes one a core.

        Raises:
            ValueError: the model is too large for one graph, or max_slots is below 1.
        """
        if max_slots < 1:
            raise ValueError(f"max_slots ({max_slots}) must be at least 1")
        self.config = config = model.config
        self.max_slots = max_slots
        rounding = {} if weights == "fp32" else _rounding(model)
        graph = decode_graph(model, weights, **rounding)
        with contextlib.nullcontext() if weights == "fp32" else _attention_over_all_slots():
            self._session = _session(graph.SerializeToString(), threads)
        known = {one.name for one in self._session.get_inputs()}
        self._small_inputs = known & {"tokens", "positions", "ends", "longest", "wanted"}  # no positions where rotary
        shape = (config.n_layers, 2, max_slots, config.kv_heads, config.seq_len, padded_width(config))
        self._cache = np.zeros(
            shape, dtype=np.float32 if weights == "fp32" else np.int8
        )  # of each layer its keys, then its values
        self._lengths = [0] * max_slots
        self._tokens = np.zeros((max_slots, 1), dtype=np.int64)
        self._ends = np.zeros(max_slots, dtype=np.int32)
        self._longest = np.zeros((), dtype=np.int32)
        self._wanted = np.array([(slot, 0) for slot in range(max_slots)], dtype=np.int64)
        self._logits = np.zeros((max_slots, config.vocab_size), dtype=np.float32)
        self._steps = [self._step(count) for count in range(1, max_slots + 1)]
        self._prefills = [self._with_cache(slice(slot, slot + 1)) for slot in range(max_slots)]

    def prefill(self, slot: int, tokens: Sequence[int], *, start: int = 0, wants_logits: bool = True) -> Logits | None:
        """See `Backend`."""
        count = len(tokens)
        self._lengths[slot] = start
        if not count:
            return None
        wanted = [(0, step) for step in range(count) if wants_logits]
        inputs: dict[str, Array] = {
            "tokens": np.array([tokens], dtype=np.int64),
            "positions": np.arange(start, start + count, dtype=np.int32)[None],
            "ends": np.array([start + count - 1], dtype=np.int32),
            "longest": np.array(start + count, dtype=np.int32),
            "wanted": np.array(wanted, dtype=np.int64).reshape(-1, 2),
        }
        logits = np.empty((len(wanted), self.config.vocab_size), dtype=np.float32)
        self._session.run_with_iobinding(self._bound(self._prefills[slot], inputs, logits))
        self._lengths[slot] = start + count
        return logits if wants_logits else None

    def prefill_all(self, slot: int, prompts: Sequence[Sequence[int]]) -> None:
        """See `Backend`. One run reads them, short ones filled up: what that leaves behind their end is never read."""
        counts = [len(tokens) for tokens in prompts]
        longest = max(counts)
        inputs: dict[str, Array] = {
            "tokens": np.array([[*tokens, *[0] * (longest - len(tokens))] for tokens in prompts], dtype=np.int64),
            "positions": np.arange(longest, dtype=np.int32)[None].repeat(len(prompts), axis=0),
            "ends": np.array(counts, dtype=np.int32) - 1,
            "longest": np.array(longest, dtype=np.int32),
            "wanted": np.empty((0, 2), dtype=np.int64),
        }
        slots = slice(slot, slot + len(prompts))
        logits = np.empty((0, self.config.vocab_size), dtype=np.float32)
        self._session.run_with_iobinding(self._bound(self._with_cache(slots), inputs, logits))
        self._lengths[slots] = counts

    def decode(self, tokens: Sequence[int]) -> Logits:
        """See `Backend`."""
        count = len(tokens)
        step, lengths = self._steps[count - 1], self._lengths[:count]
        step.tokens[:] = tokens
        step.ends[:] = lengths
        self._longest[()] = max(lengths) + 1
        self._session.run_with_iobinding(step.binding)
        self._lengths[:count] = [length + 1 for length in lengths]
        return step.logits

    def length(self, slot: int) -> int:
        """See `Backend`."""
        return self._lengths[slot]

    def copy_slot(self, source: int, target: int) -> None:
        """See `Backend`."""
        count = self._lengths[source]
        self._cache[:, :, target, :, :count] = self._cache[:, :, source, :, :count]
        self._lengths[target] = count

    def _step(self, count: int) -> "_Step":
        tokens, ends, logits = self._tokens[:count], self._ends[:count], self._logits[:count]
        inputs: dict[str, Array] = {
            "tokens": tokens,
            "positions": ends[:, None],  # the lengths before the step are both
            "ends": ends,
            "longest": self._longest,
            "wanted": self._wanted[:count],
        }
        binding = self._bound(self._with_cache(slice(count)), inputs, logits)
        return _Step(binding=binding, tokens=tokens[:, 0], ends=ends, logits=logits)

    def _with_cache(self, slots: slice) -> Any:
        """Where a run reads and writes keys and values. A binding knows addresses alone: the memory must stay."""
        binding = self._session.io_binding()
        for layer, (kind, half) in itertools.product(range(self.config.n_layers), (("keys", 0), ("values", 1))):
            part = _buffer(self._cache[layer, half, slots])  # (B, n_kv_heads, seq_len, width)
            binding.bind_input(f"{kind}_{layer}", *part)
            binding.bind_output(f"new_{kind}_{layer}", *part)
        return binding

    def _bound(self, binding: Any, inputs: Mapping[str, Array], logits: Logits) -> Any:
        """The same binding with its other inputs and its logits."""
        for name in self._small_inputs:
            binding.bind_input(name, *_buffer(inputs[name]))
        binding.bind_output("logits", *_buffer(logits))
        return binding


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class _Step:
    """What a step of so many slots reads and writes beside the cache, bound once.

    After a run everything else has left the processor's caches: so as little as can be is done between two.
    """

    binding: Any
    tokens: Array  # (B,)
    ends: Array  # (B,)
    logits: Logits  # (B, vocab_size)


def _rounding(model: Decoder) -> dict[str, Any]:
    """How `decode_graph` is to round."""
    return {"cache_scales": cache_scales(model), "has_signed_weights": has_exact_signed_products()}


@functools.cache
def has_exact_signed_products() -> bool:
    """Whether sums of this processor's products of unsigned with signed bytes are exact.

    AVX2 and AVX-512 without VNNI add two products in 16 bits and cut the sum: there the largest numbers tell.
    """
    session = _session(largest_product().SerializeToString(), 1)
    (got,) = session.run(None, {"x": np.full((4, LARGEST_WIDTH), 255, np.uint8)})
    return bool((got == LARGEST_SUM).all())


@contextlib.contextmanager
def _attention_over_all_slots() -> Iterator[None]:
    """In the block, sessions are made whose attention over a cache in int8 shares all slots among the threads at once.

    In tiles, which is ONNX Runtime's own choice (1.32), it takes slot after slot and shares out the heads of each: a
    step of 32 takes a fifth longer with 110 tokens in each slot, one of 16 with 2,000 a third. Results are the same.
    What the user set stays.
    """
    before = os.environ.get(IN_TILES)
    os.environ.setdefault(IN_TILES, "1")
    try:
        yield
    finally:
        if before is None:
            os.environ.pop(IN_TILES, None)


def _buffer(values: Array) -> tuple[str, int, Any, tuple[int, ...], int]:
    """Arguments that bind an array's buffer."""
    assert values.flags.c_contiguous
    return "cpu", 0, values.dtype.type, values.shape, values.ctypes.data


def _session(model: bytes, threads: int) -> Any:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3
    # Idle threads wait longer and longer between looks for work. With nothing else on the cores this costs nothing;
    # beside a busy process (an HTTP proxy) a step takes half the time of plain spinning.
    options.add_session_config_entry("session.intra_op.spin_backoff_max", "8")
    return onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
