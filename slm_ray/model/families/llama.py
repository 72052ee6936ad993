"""Llama: RMSNorm, rotary positions, SwiGLU, grouped queries; biases of attention and feed-forward apart.

In and out: as `family.Family` says. `qwen3.py` builds on this.
"""

import dataclasses
import re
from collections.abc import Mapping
from typing import Any

from slm_ray.config.shape import ModelConfig
from slm_ray.model.families.family import Family, Names, departures, has_local_blocks
from slm_ray.model.families.fields import MAX_LAYERS, HfFields, layer_list

EXPECTED = {"norm": "rms", "mlp": "swiglu", "positions": "rotary", "scale_attention": True}
_LAYER_MODULES = (
    *(f"self_attn.{letter}_proj" for letter in "qkvo"),
    *("self_attn.q_norm", "self_attn.k_norm"),
    *(f"mlp.{name}_proj" for name in ("gate", "up", "down")),
    *("input_layernorm", "post_attention_layernorm"),
)
NAMES = Names(
    prefix="model.",
    layers="layers",
    modules={name: name for name in ("embed_tokens", "embed_positions", "norm")},
    layer_modules={name: name for name in _LAYER_MODULES},
    buffers=re.compile(r"(layers\.\d+\.self_attn\.)?rotary_emb\.inv_freq"),
)
"""Our own names under a prefix, of Llama, Qwen3, and the shapes that transformers does not know."""
_THETA = 10_000.0


def misfits(config: ModelConfig) -> list[str]:
    """What keeps a shape from being Llama's. Dropout does not: it is a matter of training, not of the logits."""
    wrong = departures(config, EXPECTED | {"qk_norm": False})
    if has_local_blocks(config):
        wrong.append(f"local_window is {config.local_window}, not 0")
    if config.d_model % config.n_heads:  # refused by LlamaConfig, although head_dim is given
        wrong.append(f"d_model {config.d_model} is no multiple of n_heads {config.n_heads}")
    return wrong


def with_biases(config: ModelConfig) -> ModelConfig:
    """Attention has biases everywhere or nowhere."""
    has_any = config.has_qkv_bias or config.has_o_bias
    return dataclasses.replace(config, qkv_bias=has_any, o_bias=has_any)


def write(config: ModelConfig) -> dict[str, Any]:
    """Llama's fields."""
    return written_shape(config) | {"mlp_bias": config.has_mlp_bias}


def written_shape(config: ModelConfig) -> dict[str, Any]:
    """The fields that Llama and Qwen3 share."""
    return {
        "hidden_size": config.d_model,
        "intermediate_size": config.d_ff,
        "num_hidden_layers": config.n_layers,
        "num_attention_heads": config.n_heads,
        "num_key_value_heads": config.kv_heads,
        "head_dim": config.head_width,
        "hidden_act": "silu",
        "max_position_embeddings": config.seq_len,
        "rms_norm_eps": config.norm_eps,
        "rope_theta": config.rope_theta,  # read by transformers 4
        "rope_parameters": {"rope_type": "default", "rope_theta": config.rope_theta},  # read by transformers 5
        "attention_dropout": config.dropout,  # transformers drops there only; in eval mode nothing differs
        "attention_bias": with_biases(config).has_qkv_bias,
    }


def read(fields: HfFields) -> ModelConfig:
    """Llama's shape. Raises: UserError."""
    fields.expect("sliding_window", None)
    mlp_bias = fields.truth("mlp_bias", default=False)
    heads = fields.size("num_attention_heads")
    if fields.get("head_dim") is None and fields.size("hidden_size") % heads:
        fields.refuse("hidden_size", f"a multiple of num_attention_heads ({heads})")
    return fields.shape(**read_shape(fields, head_dim=None), mlp_bias=mlp_bias)


def read_shape(fields: HfFields, head_dim: int | None) -> dict[str, Any]:
    """What Llama and Qwen3 share. head_dim: what an absent one means; None is hidden_size / num_attention_heads."""
    fields.expect("hidden_act", "silu", "swish")
    layer_list(fields, "layer_types", "full_attention")
    d_model, heads = fields.size("hidden_size"), fields.size("num_attention_heads")
    kv_heads, width = fields.size("num_key_value_heads", heads), fields.size("head_dim", head_dim or d_model // heads)
    return {
        "vocab_size": fields.size("vocab_size"),
        "seq_len": fields.size("max_position_embeddings"),
        "n_layers": fields.size("num_hidden_layers", most=MAX_LAYERS),
        "d_model": d_model,
        "n_heads": heads,
        "n_kv_heads": 0 if kv_heads == heads else kv_heads,
        "d_head": 0 if width * heads == d_model else width,
        "d_ff": fields.size("intermediate_size"),
        "norm_eps": fields.number("rms_norm_eps", 1e-6),
        "rope_theta": _rope_theta(fields),
        "bias": fields.truth("attention_bias", default=False),
        "dropout": fields.number("attention_dropout", 0.0, is_share=True),
        "tie_embeddings": fields.truth("tie_word_embeddings", default=False),
        "init_std": fields.number("initializer_range", 0.02),
    }


def _rope_theta(fields: HfFields) -> float:
    """Base of the rotary frequencies: a field of its own in transformers 4, in rope_parameters in transformers 5."""
    for name in ("rope_scaling", "rope_parameters"):
        inner = fields.get(name, {})
        kind = inner.get("rope_type", inner.get("type")) if isinstance(inner, Mapping) else "none"
        if kind not in (None, "default"):
            fields.refuse(name, "plain rotary positions (rope_type default)")
        known = {"rope_type", "type", "rope_theta", "partial_rotary_factor"}
        if any(value is not None for key, value in inner.items() if key not in known):
            fields.refuse(name, "rope_type default with rope_theta alone")
        HfFields(inner, f"{fields.origin}: {name}").expect("partial_rotary_factor", 1.0)
    fields.expect("partial_rotary_factor", 1.0)
    if fields.get("rope_parameters") and fields.get("rope_scaling", {}) not in ({}, fields.get("rope_parameters")):
        fields.refuse("rope_scaling", "that of rope_parameters")  # which of them counts changed between versions
    inner = fields.get("rope_parameters") or fields.get("rope_scaling") or {}
    theta = fields.number("rope_theta", _THETA)
    its_theta = HfFields(inner, f"{fields.origin}: rope_parameters").number("rope_theta", theta)
    if fields.get("rope_theta") is not None and its_theta != theta:
        fields.refuse("rope_theta", f"that of rope_parameters ({its_theta})")
    return its_theta


LLAMA = Family(
    model_type="llama",
    title="Llama",
    architectures=("LlamaForCausalLM", "LlamaModel"),
    names=NAMES,
    misfits=misfits,
    with_biases=with_biases,
    write=write,
    read=read,
)
