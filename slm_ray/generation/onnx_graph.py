"""The decoder as an ONNX graph that goes on from a cache, for ONNX Runtime's fused operators.

In: a `Decoder`. Out: a `ModelProto` whose weights are in memory. `onnx_backend.py` runs it; one graph serves prompts
(T tokens of a row) and single steps (T = 1 of B rows). Operators of the domain com.microsoft are documented in ONNX
Runtime's docs/ContribOperators.md.

    tokens     (B, T) int64        positions  (B, T) int32, with learned positions only
    ends       (B,) int32          tokens of each row after this call, less one
    longest    () int32            the largest of them, plus one
    wanted     (N, 2) int64        the places that get logits, each a row and a step
    keys_0, values_0, ...          (B, n_kv_heads, seq_len, width); given back as new_keys_0, new_values_0, ...
    logits     (N, vocab_size)

A head's width is filled up with zeros to what the attention operator takes (`padded_width`): products of zeros add
nothing, so every shape of `ModelConfig` works, 54 as 56.
"""

import dataclasses
import math
from collections.abc import Iterable
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
    graph = _Graph(weights)
    graph.decoder(model)
    proto = helper.make_model(
        helper.make_graph(graph.nodes, "decoder", graph.inputs, graph.outputs, graph.initializers),
        opset_imports=[helper.make_opsetid("", 17), helper.make_opsetid(CONTRIB, 1)],
        ir_version=9,
    )
    if proto.ByteSize() >= onnx.checker.MAXIMUM_PROTOBUF:
        raise ValueError(f"the model has {proto.ByteSize():,} bytes of weights and 2 GB fit into one ONNX graph")
    return proto


@dataclasses.dataclass(frozen=True)
class _Norm:
    """Weights of a norm, by name; no shift in RMSNorm."""

    is_rms: bool
    eps: float
    scale: str
    shift: str


class _Graph:
    """Nodes and weights, in the order in which they are added."""

    def __init__(self, weights: Weights) -> None:
        self.nodes: list[onnx.NodeProto] = []
        self.inputs: list[onnx.ValueInfoProto] = []
        self.outputs: list[onnx.ValueInfoProto] = []
        self.initializers: list[TensorProto] = []
        self._weights = weights

    def decoder(self, model: Decoder) -> None:
        """The whole model."""
        config = model.config
        self._input("tokens", TensorProto.INT64, ["B", "T"])
        self._input("ends", TensorProto.INT32, ["B"])
        self._input("longest", TensorProto.INT32, [])
        self._input("wanted", TensorProto.INT64, ["N", 2])
        embedding = self._array("embed_tokens", _numpy(model.embed_tokens.weight))
        x = self._node("Gather", [embedding, "tokens"])  # (B, T, d_model)
        if config.positions == "learned":
            self._input("positions", TensorProto.INT32, ["B", "T"])
            table = self._array("embed_positions", _numpy(model.embed_positions.weight))
            x = self._node("Add", [x, self._node("Gather", [table, "positions"])])
        else:
            self._rotary(config)
        norms = [norm for block in model.layers for norm in (block.input_layernorm, block.post_attention_layernorm)]
        names = [self._norm(norm, f"norm_{number}", config) for number, norm in enumerate([*norms, model.norm])]
        y = self._normalize(x, names[0])
        for layer, block in enumerate(model.layers):
            added = self._attention(y, block.self_attn, layer, config)
            x, y = self._add_and_normalize(x, added, names[2 * layer + 1])
            added = self._feed_forward(y, block.mlp, layer, config)
            x, y = self._add_and_normalize(x, added, names[2 * layer + 2])
        self._head(y, model, embedding if config.tie_embeddings else "")

    def _attention(self, x: str, attention: Any, layer: int, config: ModelConfig) -> str:
        width = padded_width(config)
        heads, kv_heads = config.n_heads, config.kv_heads
        linears = [(attention.q_proj, heads), (attention.k_proj, kv_heads), (attention.v_proj, kv_heads)]
        weight = np.concatenate([_by_head(_numpy(one.weight), n, config) for one, n in linears])
        qkv = self._product(x, weight, f"qkv_{layer}")  # (B, T, (H + 2 Hkv) * width)
        if config.bias:
            bias = np.concatenate([_by_head(_numpy(one.bias), n, config) for one, n in linears])
            qkv = self._node("Add", [qkv, self._array(f"qkv_bias_{layer}", bias)])
        shape = ["B", kv_heads, config.seq_len, width]
        past, new = [f"keys_{layer}", f"values_{layer}"], [f"new_keys_{layer}", f"new_values_{layer}"]
        for name in past:
            self._input(name, TensorProto.FLOAT, shape)
        for name in new:
            self.outputs.append(helper.make_tensor_value_info(name, TensorProto.FLOAT, shape))
        is_rotary = config.positions == "rotary"
        seen = f"seen_{layer}"
        self._add_node(
            "GroupQueryAttention",
            [qkv, "", "", *past, "ends", "longest", *(["rotary_cos", "rotary_sin"] if is_rotary else [])],
            [seen, *new],
            num_heads=heads,
            kv_num_heads=kv_heads,
            do_rotary=int(is_rotary),
            scale=1 / math.sqrt(config.head_width),
        )
        output = _by_head(_numpy(attention.o_proj.weight).T, heads, config).T  # (d_model, H * width)
        return self._linear(seen, np.ascontiguousarray(output), attention.o_proj.bias, f"o_{layer}")

    def _feed_forward(self, x: str, mlp: Any, layer: int, config: ModelConfig) -> str:
        if config.mlp == "gelu":
            up = self._product(x, _numpy(mlp.up_proj.weight), f"up_{layer}")
            bias = [self._array(f"up_bias_{layer}", _numpy(mlp.up_proj.bias))] if config.bias else []
            inner = self._node("FastGelu", [up, *bias], CONTRIB)
        else:
            weight = np.concatenate([_numpy(mlp.gate_proj.weight), _numpy(mlp.up_proj.weight)])
            both = self._product(x, weight, f"gate_up_{layer}")  # (B, T, 2 d_ff)
            if config.bias:
                bias_values = np.concatenate([_numpy(mlp.gate_proj.bias), _numpy(mlp.up_proj.bias)])
                both = self._node("Add", [both, self._array(f"gate_up_bias_{layer}", bias_values)])
            gate, up = f"gate_{layer}", f"up_{layer}"
            self._add_node("Split", [both, self._halves(config)], [gate, up], "", axis=-1)
            inner = self._node("Mul", [self._node("QuickGelu", [gate], CONTRIB, alpha=1.0), up])  # silu(gate) * up
        return self._linear(inner, _numpy(mlp.down_proj.weight), mlp.down_proj.bias, f"down_{layer}")

    def _head(self, x: str, model: Decoder, tied: str) -> None:
        rows = self._node("GatherND", [x, "wanted"])  # (N, d_model)
        head = model.lm_head
        if self._weights == "int8":
            self._rename(self._linear(rows, _numpy(head.weight), head.bias, "head"), "logits")
        else:
            is_tied = tied and head.weight is model.embed_tokens.weight
            weight = tied if is_tied else self._array("head", _numpy(head.weight))
            bias = [self._array("head_bias", _numpy(head.bias))] if head.bias is not None else []
            self._add_node("Gemm", [rows, weight, *bias], ["logits"], "", transB=1)
        self.outputs.append(helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["N", model.config.vocab_size]))

    def _rename(self, last: str, name: str) -> None:
        """Name the output of the node added last."""
        assert list(self.nodes[-1].output) == [last]
        self.nodes[-1].output[0] = name

    def _rotary(self, config: ModelConfig) -> None:
        """Angles of the first half of a head, 0 where it is filled up."""
        cos, sin = rotary_tables(config.seq_len, config.head_width, config.rope_theta)
        half, padded = config.head_width // 2, padded_width(config) // 2
        for name, table, rest in (("rotary_cos", cos[:, half:], 1.0), ("rotary_sin", sin[:, half:], 0.0)):
            filling = np.full((config.seq_len, padded - half), rest, dtype=np.float32)
            self._array(name, np.concatenate([_numpy(table), filling], axis=1))

    def _halves(self, config: ModelConfig) -> str:
        if not any(one.name == "halves" for one in self.initializers):
            self._array("halves", np.array([config.d_ff, config.d_ff]))
        return "halves"

    def _norm(self, norm: Any, name: str, config: ModelConfig) -> _Norm:
        is_rms = config.norm == "rms"
        shift = np.zeros(config.d_model, np.float32) if is_rms or norm.bias is None else _numpy(norm.bias)
        return _Norm(
            is_rms,
            config.norm_eps,
            self._array(name, _numpy(norm.weight)),
            "" if is_rms else self._array(f"{name}_shift", shift),
        )

    def _normalize(self, x: str, norm: _Norm) -> str:
        if norm.is_rms:
            return self._node("SimplifiedLayerNormalization", [x, norm.scale], epsilon=norm.eps, axis=-1)
        return self._node("LayerNormalization", [x, norm.scale, norm.shift], epsilon=norm.eps, axis=-1)

    def _add_and_normalize(self, x: str, added: str, norm: _Norm) -> tuple[str, str]:
        """x + added, and that behind the norm."""
        kind = "SkipSimplifiedLayerNormalization" if norm.is_rms else "SkipLayerNormalization"
        total, normal = f"sum_{norm.scale}", f"normal_{norm.scale}"
        inputs = [x, added, norm.scale, *([] if norm.is_rms else [norm.shift])]
        self._add_node(kind, inputs, [normal, "", "", total], epsilon=norm.eps)
        return total, normal

    def _linear(self, x: str, weight: Array, bias: Tensor | None, name: str) -> str:
        product = self._product(x, weight, name)
        if bias is None:
            return product
        return self._node("Add", [product, self._array(f"{name}_bias", _numpy(bias))])

    def _product(self, x: str, weight: Array, name: str) -> str:
        """x @ weight.T with a weight of (out, in)."""
        if self._weights == "fp32":
            return self._node("MatMul", [x, self._array(name, np.ascontiguousarray(weight.T))])
        levels, scales = quantize(weight)
        inputs = [x, self._array(name, levels), self._array(f"{name}_scale", scales)]
        out, into = weight.shape
        return self._node("MatMulNBits", inputs, CONTRIB, K=into, N=out, bits=8, block_size=BLOCK, accuracy_level=4)

    def _node(self, kind: str, inputs: Iterable[str], domain: str = "", **attributes: Any) -> str:
        name = f"{kind}_{len(self.nodes)}"
        self._add_node(kind, inputs, [name], domain, **attributes)
        return name

    def _add_node(
        self, kind: str, inputs: Iterable[str], outputs: list[str], domain: str = CONTRIB, **attributes: Any
    ) -> None:
        self.nodes.append(helper.make_node(kind, list(inputs), outputs, domain=domain, **attributes))

    def _array(self, name: str, values: Array) -> str:
        self.initializers.append(numpy_helper.from_array(values, name))
        return name

    def _input(self, name: str, kind: int, shape: list[Any]) -> None:
        self.inputs.append(helper.make_tensor_value_info(name, kind, shape))


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
