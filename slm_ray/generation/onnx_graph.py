"""The decoder as an ONNX graph that goes on from a cache, for ONNX Runtime's fused operators.

In: a `Decoder`. Out: a `ModelProto` whose weights are in memory. `onnx_backend.py` runs it; one graph serves prompts
(T tokens of a slot) and single steps (T = 1 of B slots). Operators of the domain com.microsoft are documented in ONNX
Runtime's docs/ContribOperators.md.

    tokens     (B, T) int64        positions  (B, T) int32, with learned positions only
    ends       (B,) int32          tokens of each slot after this call, less one
    longest    () int32            the largest of them, plus one
    wanted     (N, 2) int64        the positions that get logits, each a slot and a step
    keys_0, values_0, ...          (B, n_kv_heads, seq_len, width); returned as new_keys_0, new_values_0, ...; int8
                                   where the graph has scales for them
    logits     (N, vocab_size)

A head's width is filled up with zeros, which add nothing, to what the attention operator takes (`padded_width`): so
every shape of `ModelConfig` works, 54 as 56.
"""

import dataclasses
import math
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto

from slm_ray.config.schema import ModelConfig
from slm_ray.generation.graph.builder import CONTRIB, GraphBuilder, Weights, numpy_values
from slm_ray.generation.graph.products import linear
from slm_ray.model.decoder import Decoder
from slm_ray.model.rotary import rotary_tables

Array = NDArray[Any]
_QUERY_INPUTS = 12
"""Of attention, before the scales of its cache."""


def padded_width(config: ModelConfig) -> int:
    """Width of a head in the graph and its cache: a multiple of 16 with rotary positions, else of 8."""
    unit = 16 if config.positions == "rotary" else 8
    return -(-config.head_width // unit) * unit


def decode_graph(
    model: Decoder, weights: Weights = "fp32", *, cache_scales: Array | None = None, has_signed_weights: bool = True
) -> onnx.ModelProto:
    """Build the graph of a model. int8 rounds every matrix but the embedding, and what is multiplied with it; norms
    and biases stay fp32.

    cache_scales: (n_layers, 2, n_kv_heads, d_head) of a cache in int8; without them it is fp32. has_signed_weights:
    whether int8 weights are signed, which is faster; processors that cut sums of their products need them unsigned.

    Raises:
        ValueError: the weights are more than a ModelProto can hold, 2 GB.
    """
    builder = GraphBuilder(weights, cache_scales, has_signed_weights)
    build_decoder(builder, model)
    proto = builder.model("decoder")
    if proto.ByteSize() >= onnx.checker.MAXIMUM_PROTOBUF:
        raise ValueError(f"the model has {proto.ByteSize():,} bytes of weights and 2 GB fit into one ONNX graph")
    return proto


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
        builder.constant(name, np.concatenate([numpy_values(table), filling], axis=1))


def _attention(builder: GraphBuilder, x: str, attention: Any, layer: int, config: ModelConfig) -> str:
    heads, kv_heads, width = config.n_heads, config.kv_heads, padded_width(config)
    linears = [(attention.q_proj, heads), (attention.k_proj, kv_heads), (attention.v_proj, kv_heads)]
    weight = np.concatenate([_by_head(numpy_values(one.weight), n, config) for one, n in linears])
    biases = [_by_head(numpy_values(one.bias), n, config) for one, n in linears] if config.has_qkv_bias else []
    bias = np.concatenate(biases) if biases else None
    qkv = [linear(builder, x, weight, bias, f"qkv_{layer}"), "", ""]  # (B, T, (H + 2 Hkv) * width)
    if config.qk_norm:
        qkv = _with_qk_norm(builder, qkv[0], attention, layer, config)
    past, new = [f"keys_{layer}", f"values_{layer}"], [f"new_keys_{layer}", f"new_values_{layer}"]
    shape: list[int | str] = ["B", kv_heads, config.seq_len, width]
    kind = TensorProto.FLOAT if builder.cache_scales is None else TensorProto.INT8
    for name in past:
        builder.input(name, kind, shape)
    for name in new:
        builder.output(name, shape, kind)
    is_rotary, seen, span = config.positions == "rotary", f"seen_{layer}", config.attention_span(layer)
    inputs = [*qkv, *past, "ends", "longest", *(["rotary_cos", "rotary_sin"] if is_rotary else [])]
    scales, rounding = _cache_rounding(builder, layer, config)
    builder.nodes(
        "GroupQueryAttention",
        [*inputs, *[""] * (_QUERY_INPUTS - len(inputs)), *scales] if scales else inputs,
        [seen, *new],
        CONTRIB,
        num_heads=heads,
        kv_num_heads=kv_heads,
        do_rotary=int(is_rotary),
        scale=1 / math.sqrt(config.head_width) if config.scale_attention else 1.0,
        local_window_size=span if span < config.seq_len else -1,
        **rounding,
    )
    output = _by_head(numpy_values(attention.o_proj.weight).T, heads, config).T  # (d_model, H * width)
    return linear(builder, seen, np.ascontiguousarray(output), attention.o_proj.bias, f"o_{layer}")


def _cache_rounding(builder: GraphBuilder, layer: int, config: ModelConfig) -> tuple[list[str], dict[str, Any]]:
    """Inputs and attributes of attention whose cache is int8: a scale for each channel."""
    if builder.cache_scales is None:
        return [], {}
    names = []
    for name, scales in zip(("keys_scale", "values_scale"), builder.cache_scales[layer], strict=True):
        filled = _by_head(scales.reshape(-1, 1), config.kv_heads, config)[:, 0]  # (Hkv * width,)
        names.append(builder.constant(f"{name}_{layer}", np.where(filled == 0, np.float32(1), filled)))
    return names, {"k_quant_type": "PER_CHANNEL", "v_quant_type": "PER_CHANNEL", "kv_cache_bit_width": 8}


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
        weight = _by_head(numpy_values(norm.weight) * math.sqrt(share), 1, config)
        scale = builder.constant(f"{parts[number]}_norm", weight)
        split = builder.node("Reshape", [parts[number], by_head])  # (B, T, H or Hkv, width)
        normal = _normalize(builder, split, _Norm(True, config.norm_eps * share, scale, [scale]))
        parts[number] = builder.node("Reshape", [normal, flat])
    return parts


def _feed_forward(builder: GraphBuilder, x: str, mlp: Any, layer: int, config: ModelConfig) -> str:
    if config.mlp == "gelu":
        up = linear(builder, x, numpy_values(mlp.up_proj.weight), None, f"up_{layer}")
        bias = [builder.constant(f"up_bias_{layer}", mlp.up_proj.bias)] if config.has_mlp_bias else []
        inner = builder.node("FastGelu", [up, *bias], CONTRIB)
    else:
        linears = [mlp.gate_proj, mlp.up_proj]
        weight = np.concatenate([numpy_values(one.weight) for one in linears])
        biases = np.concatenate([numpy_values(one.bias) for one in linears]) if config.has_mlp_bias else None
        both = linear(builder, x, weight, biases, f"gate_up_{layer}")  # (B, T, 2 d_ff)
        gate, up = f"gate_{layer}", f"up_{layer}"
        halves = builder.constant("halves", np.array([config.d_ff, config.d_ff]))
        builder.nodes("Split", [both, halves], [gate, up], "", axis=-1)
        silu = builder.node("QuickGelu", [gate], CONTRIB, alpha=1.0)
        inner = builder.node("Mul", [silu, up])
    return linear(builder, inner, numpy_values(mlp.down_proj.weight), mlp.down_proj.bias, f"down_{layer}")


def _head(builder: GraphBuilder, x: str, model: Decoder) -> None:
    head, config = model.lm_head, model.config
    wanted = builder.node("GatherND", [x, "wanted"])  # (N, d_model)
    if builder.weights == "int8":
        linear(builder, wanted, numpy_values(head.weight), head.bias, "head", output="logits")
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


def _by_head(weight: Array, heads: int, config: ModelConfig) -> Array:
    """Fill every head's rows up to `padded_width`: behind each half with rotary positions, which turn (i, i + half).

    weight: (heads * d_head, ...) -> (heads * width, ...).
    """
    width, parts = padded_width(config), 2 if config.positions == "rotary" else 1
    split = weight.reshape(heads * parts, config.head_width // parts, -1)
    filling = [(0, 0), (0, (width - config.head_width) // parts), (0, 0)]
    return np.pad(split, filling).reshape(heads * width, *weight.shape[1:])
