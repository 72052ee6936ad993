"""The decoder as an ONNX graph of standard operators alone, for hosts that have no others: a browser, a Rust server.

In: a `Decoder`. Out: a `ModelProto` in opset 17, with or without a cache.

    input_ids         (batch, sequence) int64
    attention_mask    (batch, past + sequence) int64, with a cache: 1 of a token, 0 of padding before the text
    past_key_values.0.key, .value, ...   (batch, n_kv_heads, past, d_head), with a cache
    logits            (batch, sequence, vocab_size)
    present.0.key, .value, ...           (batch, n_kv_heads, past + sequence, d_head), with a cache

These names are those that ONNX Runtime GenAI and optimum know. Positions are counted from the mask, so that a batch may
be padded on the left. int8 keeps every matrix in 8 bits with a scale for each row of it, and turns it back into fp32
by Cast and Mul, which a runtime folds when it loads: a quarter of the file, not of the memory.
"""

import math
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto

from slm_ray.errors import UserError
from slm_ray.exports.onnx_parts import Graph, quantized
from slm_ray.model.decoder import Decoder

FORBIDDEN = float(np.finfo(np.float32).min) / 2
"""Added to the score of a token that must not be seen; finite, so that a row of padding gives numbers."""


def standard_graph(model: Decoder, *, with_cache: bool, is_int8: bool = False) -> onnx.ModelProto:
    """Build the graph.

    Raises:
        UserError: the weights are more than one file of this format can hold, 2 GB.
    """
    proto = _DecoderGraph(model, with_cache, is_int8).build()
    if proto.ByteSize() >= onnx.checker.MAXIMUM_PROTOBUF:
        raise UserError(f"the model has {proto.ByteSize():,} bytes of weights, and one ONNX file holds 2 GB")
    return proto


class _DecoderGraph(Graph):
    """The whole model, block after block."""

    def __init__(self, model: Decoder, with_cache: bool, is_int8: bool) -> None:
        super().__init__(is_int8=is_int8)
        self.model, self.config = model, model.config
        self.with_cache = with_cache

    def build(self) -> onnx.ModelProto:
        """Add everything, and give the finished graph."""
        config, model = self.config, self.model
        self.input("input_ids", TensorProto.INT64, ["batch", "sequence"])
        self.output("logits", ["batch", "sequence", config.vocab_size])
        window = _Window(self)
        x = self._embedding(window)
        for layer, block in enumerate(model.layers):
            name = f"layers.{layer}"
            y = self.norm(x, block.input_layernorm, f"{name}.input_layernorm", config.norm_eps)
            x = self.add("Add", x, self._attention(y, block.self_attn, layer, window))
            y = self.norm(x, block.post_attention_layernorm, f"{name}.post_attention_layernorm", config.norm_eps)
            x = self.add("Add", x, self._feed_forward(y, block.mlp, f"{name}.mlp"))
        x = self.norm(x, model.norm, "norm", config.norm_eps)
        if model.lm_head.weight is model.embed_tokens.weight:
            weight = self.add("Transpose", self.matrix(model.embed_tokens.weight, "embed_tokens"), perm=[1, 0])
            self.add("MatMul", x, weight, output="logits")
        else:
            self.linear(x, model.lm_head, "lm_head", output="logits")
        return self.proto()

    def _embedding(self, window: "_Window") -> str:
        weight = self.model.embed_tokens.weight
        if self.is_int8:  # rows are turned back one by one
            levels, scales = quantized(weight)
            rows = self.add("Gather", self.constant(levels, "embed_tokens.levels"), "input_ids")
            scale = self.add("Gather", self.constant(scales, "embed_tokens.scales"), "input_ids")
            x = self.add("Mul", self.add("Cast", rows, to=TensorProto.FLOAT), scale)
        else:
            x = self.add("Gather", self.constant(weight, "embed_tokens"), "input_ids")  # (B, T, d_model)
        if self.config.positions == "learned":
            table = self.constant(self.model.embed_positions.weight, "embed_positions")
            x = self.add("Add", x, self.add("Gather", table, window.positions))
        return x

    def _attention(self, x: str, attention: Any, layer: int, window: "_Window") -> str:
        config, name = self.config, f"layers.{layer}.self_attn"
        heads, kv_heads, width = config.n_heads, config.kv_heads, config.head_width
        q = self._heads(self.linear(x, attention.q_proj, f"{name}.q_proj"), heads)
        k = self._heads(self.linear(x, attention.k_proj, f"{name}.k_proj"), kv_heads)
        v = self._heads(self.linear(x, attention.v_proj, f"{name}.v_proj"), kv_heads)
        if config.qk_norm:
            q = self.norm(q, attention.q_norm, f"{name}.q_norm", config.norm_eps)
            k = self.norm(k, attention.k_norm, f"{name}.k_norm", config.norm_eps)
        q, k = window.turned(q), window.turned(k)
        k, v = self._through_cache(k, "key", layer), self._through_cache(v, "value", layer)
        is_grouped = heads != kv_heads
        if is_grouped:  # a dimension of the queries that share a key, over which MatMul repeats the key
            q = self.add("Reshape", q, self.constant([0, kv_heads, heads // kv_heads, -1, width]))
            k, v = (self.add("Unsqueeze", one, self.constant([2])) for one in (k, v))
        last = [0, 1, 2, 4, 3] if is_grouped else [0, 1, 3, 2]
        scores = self.add("MatMul", q, self.add("Transpose", k, perm=last))  # (B, H, T, S), or in groups
        if config.scale_attention:
            scores = self.add("Mul", scores, self.constant(1 / math.sqrt(width)))
        scores = self.add("Add", scores, window.bias(config.attention_span(layer), is_grouped))
        seen = self.add("MatMul", self.add("Softmax", scores, axis=-1), v)
        if is_grouped:
            seen = self.add("Reshape", seen, self.constant([0, heads, -1, width]))
        seen = self.add("Reshape", self.add("Transpose", seen, perm=[0, 2, 1, 3]), self.constant([0, 0, heads * width]))
        return self.linear(seen, attention.o_proj, f"{name}.o_proj")

    def _heads(self, x: str, heads: int) -> str:
        """(B, T, heads * d_head) -> (B, heads, T, d_head)."""
        apart = self.add("Reshape", x, self.constant([0, 0, heads, self.config.head_width]))
        return self.add("Transpose", apart, perm=[0, 2, 1, 3])

    def _through_cache(self, x: str, kind: str, layer: int) -> str:
        if not self.with_cache:
            return x
        past, present = f"past_key_values.{layer}.{kind}", f"present.{layer}.{kind}"
        heads, width = self.config.kv_heads, self.config.head_width
        self.input(past, TensorProto.FLOAT, ["batch", heads, "past", width])
        self.output(present, ["batch", heads, "total", width])
        return self.add("Concat", past, x, output=present, axis=2)

    def _feed_forward(self, x: str, mlp: Any, name: str) -> str:
        up = self.linear(x, mlp.up_proj, f"{name}.up_proj")
        if self.config.mlp == "gelu":
            return self.linear(self._gelu(up), mlp.down_proj, f"{name}.down_proj")
        gate = self.linear(x, mlp.gate_proj, f"{name}.gate_proj")
        inner = self.add("Mul", self.add("Mul", gate, self.add("Sigmoid", gate)), up)
        return self.linear(inner, mlp.down_proj, f"{name}.down_proj")

    def _gelu(self, x: str) -> str:
        """Its tanh form: x / 2 * (1 + tanh(sqrt(2 / pi) * (x + 0.044715 x^3)))."""
        cube = self.add("Mul", self.add("Mul", x, x), x)
        inner = self.add("Add", x, self.add("Mul", cube, self.constant(0.044715)))
        tanh = self.add("Tanh", self.add("Mul", inner, self.constant(math.sqrt(2 / math.pi))))
        return self.add("Mul", self.add("Mul", x, self.constant(0.5)), self.add("Add", tanh, self.constant(1.0)))


class _Window:
    """What the layers of a graph share: where the new tokens stand, and what they may see."""

    def __init__(self, graph: _DecoderGraph) -> None:
        self._graph = graph
        self._biases: dict[tuple[int, bool], str] = {}
        length = self._size("input_ids", 1)
        zero, one = graph.number(0), graph.number(1)
        if graph.with_cache:
            graph.input("attention_mask", TensorProto.INT64, ["batch", "total"])
            total = self._size("attention_mask", 1)
            self._first = graph.add("Sub", total, length)
            counted = graph.add("Sub", graph.add("CumSum", "attention_mask", one), one)
            counted = graph.add("Max", counted, zero)  # of padding
            ends = [graph.add("Unsqueeze", end, graph.constant([0])) for end in (self._first, total)]
            self.positions = graph.add("Slice", counted, *ends, graph.constant([1]))  # (B, T)
        else:
            total, self._first = length, zero
            counted = graph.add("Range", zero, length, one)
            self.positions = graph.add("Unsqueeze", counted, graph.constant([0]))  # (1, T)
        rows = graph.add("Unsqueeze", graph.add("Range", self._first, total, one), graph.constant([1]))  # (T, 1)
        columns = graph.add("Range", zero, total, one)  # (S,)
        self._behind = graph.add("Sub", rows, columns)  # (T, S) tokens between
        if graph.config.positions == "rotary":
            self._cos = self._table("rotary_cos")
            self._sin = self._table("rotary_sin")

    def turned(self, x: str) -> str:
        """Turn every head by its position's angle, where positions are rotary. x: (B, H, T, d_head)."""
        graph = self._graph
        if graph.config.positions != "rotary":
            return x
        first, second = graph.halves(x)
        rolled = graph.add("Concat", second, first, axis=-1)
        return graph.add("Add", graph.add("Mul", x, self._cos), graph.add("Mul", rolled, self._sin))

    def bias(self, span: int, is_grouped: bool) -> str:
        """What is added to scores: 0, or a number so low that nothing is seen. (B or 1, 1, T, S), with another 1 in
        groups.

        span: tokens that a layer looks back on, its own included.
        """
        key = (span, is_grouped)
        if key not in self._biases:
            graph = self._graph
            seen = graph.add("GreaterOrEqual", self._behind, graph.number(0))  # (T, S)
            if span < graph.config.seq_len:
                seen = graph.add("And", seen, graph.add("Less", self._behind, graph.number(span)))
            if graph.with_cache:
                axes = graph.constant([1, 2, 3] if is_grouped else [1, 2])
                mask = graph.add("Unsqueeze", graph.add("Cast", "attention_mask", to=TensorProto.BOOL), axes)
                seen = graph.add("And", seen, mask)
            self._biases[key] = graph.add("Where", seen, graph.constant(0.0), graph.constant(FORBIDDEN))
        return self._biases[key]

    def _size(self, name: str, axis: int) -> str:
        graph = self._graph
        return graph.add("Gather", graph.add("Shape", name), graph.number(axis))

    def _table(self, name: str) -> str:
        """Rows of a table of angles for the positions: (B or 1, 1, T, d_head)."""
        graph = self._graph
        rows = graph.add("Gather", graph.constant(getattr(graph.model, name), name), self.positions)
        return graph.add("Unsqueeze", rows, graph.constant([1]))
