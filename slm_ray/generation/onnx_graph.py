"""The decoder as an ONNX graph that goes on from a cache, for ONNX Runtime's fused operators.

In: a `Decoder`. Out: a `ModelProto` whose weights are in memory. `onnx_backend.py` runs it; one graph serves prompts
(T tokens of a slot) and single steps (T = 1 of B slots). Operators of the domain com.microsoft are documented in ONNX
Runtime's docs/ContribOperators.md.

    tokens     (B, T) int64        positions  (B, T) int32, with learned positions only
    ends       (B,) int32          tokens of each slot after this call, less one
    longest    () int32            the largest of them, plus one
    wanted     (N, 2) int64        the positions that get logits, each a slot and a step
    keys_0, values_0, ...          (B, n_kv_heads, seq_len, width); returned as new_keys_0, new_values_0, ...
    logits     (N, vocab_size)

A head's width is filled up with zeros, which add nothing, to what the attention operator takes (`padded_width`): so
every shape of `ModelConfig` works, 54 as 56.
"""

import dataclasses
import math
from collections.abc import Iterable, Sequence
from typing import Any, Literal

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper
from torch import Tensor, nn

from slm_ray.config.schema import ModelConfig
from slm_ray.model.decoder import Decoder, rotary_tables

Array = NDArray[Any]
Weights = Literal["fp32", "int8"]
CONTRIB = "com.microsoft"
BLOCK = 32
"""Weights that share a scale in int8, along the input."""


def padded_width(config: ModelConfig) -> int:
    """Width of a head in the graph and its cache: a multiple of 16 with rotary positions, else of 8."""
    unit = 16 if config.positions == "rotary" else 8
    return -(-config.head_width // unit) * unit


def decode_graph(model: Decoder, weights: Weights = "fp32") -> onnx.ModelProto:
    """Build the graph of a model. int8 rounds every matrix but the embedding; norms and biases stay fp32.

    Raises:
        ValueError: the weights are more than a ModelProto can hold, 2 GB.
    """
    builder = GraphBuilder(weights)
    build_decoder(builder, model)
    proto = builder.model("decoder")
    if proto.ByteSize() >= onnx.checker.MAXIMUM_PROTOBUF:
        raise ValueError(f"the model has {proto.ByteSize():,} bytes of weights and 2 GB fit into one ONNX graph")
    return proto


class GraphBuilder:
    """Nodes, weights, inputs and outputs, in the order in which they are added. Values are passed on by name."""

    def __init__(self, weights: Weights = "fp32") -> None:
        self.weights = weights
        self._nodes: list[onnx.NodeProto] = []
        self._inputs: list[onnx.ValueInfoProto] = []
        self._outputs: list[onnx.ValueInfoProto] = []
        self._initializers: dict[str, TensorProto] = {}

    def model(self, name: str) -> onnx.ModelProto:
        """The finished graph."""
        graph = helper.make_graph(self._nodes, name, self._inputs, self._outputs, [*self._initializers.values()])
        opsets = [helper.make_opsetid("", 17), helper.make_opsetid(CONTRIB, 1)]
        return helper.make_model(graph, opset_imports=opsets, ir_version=9)

    def input(self, name: str, kind: int, shape: Sequence[int | str]) -> None:
        """Declare an input."""
        self._inputs.append(helper.make_tensor_value_info(name, kind, shape))

    def output(self, name: str, shape: Sequence[int | str]) -> None:
        """Declare a value as an fp32 output."""
        self._outputs.append(helper.make_tensor_value_info(name, TensorProto.FLOAT, shape))

    def constant(self, name: str, values: Array | Tensor) -> str:
        """Add a weight, once under each name."""
        if name not in self._initializers:
            array = _numpy(values) if isinstance(values, Tensor) else values
            self._initializers[name] = numpy_helper.from_array(array, name)
        return name

    def node(self, kind: str, inputs: Iterable[str], domain: str = "", output: str = "", **attributes: Any) -> str:
        """Add an operator with one output, which gets a name of its own where none is asked for."""
        output = output or f"{kind}_{len(self._nodes)}"
        self.nodes(kind, inputs, [output], domain, **attributes)
        return output

    def nodes(self, kind: str, inputs: Iterable[str], outputs: list[str], domain: str, **attributes: Any) -> None:
        """Add an operator with several outputs; those named "" are not computed."""
        self._nodes.append(helper.make_node(kind, list(inputs), outputs, domain=domain, **attributes))

    def linear(self, x: str, weight: Array, bias: Array | Tensor | None, name: str, output: str = "") -> str:
        """x @ weight.T + bias, with a weight of (out, in)."""
        if bias is None:
            return self._matmul(x, weight, name, output)
        return self.node("Add", [self._matmul(x, weight, name), self.constant(f"{name}_bias", bias)], output=output)

    def _matmul(self, x: str, weight: Array, name: str, output: str = "") -> str:
        if self.weights == "fp32":
            return self.node("MatMul", [x, self.constant(name, np.ascontiguousarray(weight.T))], output=output)
        levels, scales = quantize(weight)
        inputs = [x, self.constant(name, levels), self.constant(f"{name}_scale", scales)]
        (n, k), settings = weight.shape, {"bits": 8, "block_size": BLOCK, "accuracy_level": 4}
        return self.node("MatMulNBits", inputs, CONTRIB, output, K=k, N=n, **settings)


def build_decoder(builder: GraphBuilder, model: Decoder) -> None:
    """Add a whole model: embedding, blocks, head."""
    config = model.config
    builder.input("tokens", TensorProto.INT64, ["B", "T"])
    builder.input("ends", TensorProto.INT32, ["B"])
    builder.input("longest", TensorProto.INT32, [])
    builder.input("wanted", TensorProto.INT64, ["N", 2])
    x = builder.node("Gather", [builder.constant("embed_tokens", model.embed_tokens.weight), "tokens"])  # (B, T, D)
    if config.positions == "learned":
        builder.input("positions", TensorProto.INT32, ["B", "T"])
        table = builder.constant("embed_positions", model.embed_positions.weight)
        x = builder.node("Add", [x, builder.node("Gather", [table, "positions"])])
    else:
        _add_rotary_tables(builder, config)
    modules = [norm for block in model.layers for norm in (block.input_layernorm, block.post_attention_layernorm)]
    norms = [_norm(builder, norm, f"norm_{number}", config) for number, norm in enumerate([*modules, model.norm])]
    y = _normalize(builder, x, norms[0])
    for layer, block in enumerate(model.layers):
        added = _attention(builder, y, block.self_attn, layer, config)
        x, y = _add_and_normalize(builder, x, added, norms[2 * layer + 1])
        added = _feed_forward(builder, y, block.mlp, layer, config)
        x, y = _add_and_normalize(builder, x, added, norms[2 * layer + 2])
    _head(builder, y, model)
    builder.output("logits", ["N", config.vocab_size])


def _add_rotary_tables(builder: GraphBuilder, config: ModelConfig) -> None:
    """Angles of the first half of a head, 0 where it is filled up."""
    cos, sin = rotary_tables(config.seq_len, config.head_width, config.rope_theta)
    half, padded = config.head_width // 2, padded_width(config) // 2
    for name, table, rest in (("rotary_cos", cos[:, half:], 1.0), ("rotary_sin", sin[:, half:], 0.0)):
        filling = np.full((config.seq_len, padded - half), rest, dtype=np.float32)
        builder.constant(name, np.concatenate([_numpy(table), filling], axis=1))


def _attention(builder: GraphBuilder, x: str, attention: Any, layer: int, config: ModelConfig) -> str:
    heads, kv_heads, width = config.n_heads, config.kv_heads, padded_width(config)
    linears = [(attention.q_proj, heads), (attention.k_proj, kv_heads), (attention.v_proj, kv_heads)]
    weight = np.concatenate([_by_head(_numpy(one.weight), n, config) for one, n in linears])
    biases = [_by_head(_numpy(one.bias), n, config) for one, n in linears] if config.has_qkv_bias else []
    bias = np.concatenate(biases) if biases else None
    qkv = [builder.linear(x, weight, bias, f"qkv_{layer}"), "", ""]  # (B, T, (H + 2 Hkv) * width)
    if config.qk_norm:
        qkv = _with_qk_norm(builder, qkv[0], attention, layer, config)
    past, new = [f"keys_{layer}", f"values_{layer}"], [f"new_keys_{layer}", f"new_values_{layer}"]
    shape: list[int | str] = ["B", kv_heads, config.seq_len, width]
    for name in past:
        builder.input(name, TensorProto.FLOAT, shape)
    for name in new:
        builder.output(name, shape)
    is_rotary, seen, span = config.positions == "rotary", f"seen_{layer}", config.attention_span(layer)
    builder.nodes(
        "GroupQueryAttention",
        [*qkv, *past, "ends", "longest", *(["rotary_cos", "rotary_sin"] if is_rotary else [])],
        [seen, *new],
        CONTRIB,
        num_heads=heads,
        kv_num_heads=kv_heads,
        do_rotary=int(is_rotary),
        scale=1 / math.sqrt(config.head_width) if config.scale_attention else 1.0,
        local_window_size=span if span < config.seq_len else -1,
    )
    output = _by_head(_numpy(attention.o_proj.weight).T, heads, config).T  # (d_model, H * width)
    return builder.linear(seen, np.ascontiguousarray(output), attention.o_proj.bias, f"o_{layer}")


def _with_qk_norm(builder: GraphBuilder, qkv: str, attention: Any, layer: int, config: ModelConfig) -> list[str]:
    """Query, key and value apart, the first two normalized head by head: the fused attention takes no norm.

    The zeros that fill up a head add nothing to its squares' sum and are counted in their mean: the norm's eps and
    weights make good for it.
    """
    width, heads = padded_width(config), (config.n_heads, config.kv_heads, config.kv_heads)
    parts = [f"{name}_{layer}" for name in ("query", "key", "value")]
    sizes = builder.constant("qkv_sizes", np.array(heads) * width)
    builder.nodes("Split", [qkv, sizes], parts, "", axis=-1)
    by_head, flat = (
        builder.constant("by_head", np.array([0, 0, -1, width])),
        builder.constant("flat", np.array([0, 0, -1])),
    )
    share = config.head_width / width
    for number, norm in enumerate((attention.q_norm, attention.k_norm)):
        weight = _by_head(_numpy(norm.weight) * math.sqrt(share), 1, config)
        scale = builder.constant(f"{parts[number]}_norm", weight)
        split = builder.node("Reshape", [parts[number], by_head])  # (B, T, H or Hkv, width)
        normal = _normalize(builder, split, _Norm(True, config.norm_eps * share, scale, [scale]))
        parts[number] = builder.node("Reshape", [normal, flat])
    return parts


def _feed_forward(builder: GraphBuilder, x: str, mlp: Any, layer: int, config: ModelConfig) -> str:
    if config.mlp == "gelu":
        up = builder.linear(x, _numpy(mlp.up_proj.weight), None, f"up_{layer}")
        bias = [builder.constant(f"up_bias_{layer}", mlp.up_proj.bias)] if config.has_mlp_bias else []
        inner = builder.node("FastGelu", [up, *bias], CONTRIB)
    else:
        linears = [mlp.gate_proj, mlp.up_proj]
        weight = np.concatenate([_numpy(one.weight) for one in linears])
        biases = np.concatenate([_numpy(one.bias) for one in linears]) if config.has_mlp_bias else None
        both = builder.linear(x, weight, biases, f"gate_up_{layer}")  # (B, T, 2 d_ff)
        gate, up = f"gate_{layer}", f"up_{layer}"
        halves = builder.constant("halves", np.array([config.d_ff, config.d_ff]))
        builder.nodes("Split", [both, halves], [gate, up], "", axis=-1)
        silu = builder.node("QuickGelu", [gate], CONTRIB, alpha=1.0)
        inner = builder.node("Mul", [silu, up])
    return builder.linear(inner, _numpy(mlp.down_proj.weight), mlp.down_proj.bias, f"down_{layer}")


def _head(builder: GraphBuilder, x: str, model: Decoder) -> None:
    head, config = model.lm_head, model.config
    wanted = builder.node("GatherND", [x, "wanted"])  # (N, d_model)
    if builder.weights == "int8":
        builder.linear(wanted, _numpy(head.weight), head.bias, "head", output="logits")
        return
    is_tied = config.tie_embeddings and head.weight is model.embed_tokens.weight
    weight = "embed_tokens" if is_tied else builder.constant("head", head.weight)
    bias = [builder.constant("head_bias", head.bias)] if head.bias is not None else []
    builder.node("Gemm", [wanted, weight, *bias], output="logits", transB=1)


@dataclasses.dataclass(frozen=True)
class _Norm:
    """A norm's weights, by name: a scale, and in LayerNorm a shift."""

    is_rms: bool
    eps: float
    scale: str
    weights: list[str]


def _norm(builder: GraphBuilder, norm: Any, name: str, config: ModelConfig) -> _Norm:
    scale = builder.constant(name, norm.weight)
    if config.norm == "rms":
        return _Norm(True, config.norm_eps, scale, [scale])
    shift = np.zeros(config.d_model, np.float32) if norm.bias is None else norm.bias
    return _Norm(False, config.norm_eps, scale, [scale, builder.constant(f"{name}_shift", shift)])


def _normalize(builder: GraphBuilder, x: str, norm: _Norm) -> str:
    kind = "SimplifiedLayerNormalization" if norm.is_rms else "LayerNormalization"
    return builder.node(kind, [x, *norm.weights], epsilon=norm.eps, axis=-1)


def _add_and_normalize(builder: GraphBuilder, x: str, added: str, norm: _Norm) -> tuple[str, str]:
    """x + added, and the same normalized."""
    kind = "SkipSimplifiedLayerNormalization" if norm.is_rms else "SkipLayerNormalization"
    total, normal = f"sum_{norm.scale}", f"normal_{norm.scale}"
    builder.nodes(kind, [x, added, *norm.weights], [normal, "", "", total], CONTRIB, epsilon=norm.eps)
    return total, normal


def quantize(weight: Array, block: int = BLOCK) -> tuple[Array, Array]:
    """Round a matrix to 8 bits, `block` neighbours along its input sharing a scale: the form of MatMulNBits.

    weight: (out, in). Returns levels (out, in / block, block), 128 for zero, and scales (out, in / block), where `in`
    is filled up with zeros to whole blocks.
    """
    out, into = weight.shape
    blocks = -(-into // block)
    full = np.zeros((out, blocks * block), dtype=np.float32)
    full[:, :into] = weight
    full = full.reshape(out, blocks, block)
    scales = np.abs(full).max(axis=2, keepdims=True) / 127  # (out, blocks, 1)
    levels = np.rint(full / np.where(scales == 0, 1, scales)) + 128
    return levels.astype(np.uint8), scales[:, :, 0].astype(np.float32)


def _by_head(weight: Array, heads: int, config: ModelConfig) -> Array:
    """Fill every head's rows up to `padded_width`: behind each half with rotary positions, which turn (i, i + half).

    weight: (heads * d_head, ...) -> (heads * width, ...).
    """
    width, parts = padded_width(config), 2 if config.positions == "rotary" else 1
    split = weight.reshape(heads * parts, config.head_width // parts, -1)
    filling = [(0, 0), (0, (width - config.head_width) // parts), (0, 0)]
    return np.pad(split, filling).reshape(heads * width, *weight.shape[1:])


def _numpy(tensor: Tensor | nn.Parameter) -> Array:
    values: Array = tensor.detach().float().cpu().numpy()
    return values
