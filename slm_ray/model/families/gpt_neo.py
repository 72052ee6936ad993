"""GPT-Neo: as GPT-2, but every second block sees a window only, scores are not scaled, and q, k, v have no biases.

In and out: as `family.Family` says. The family of the models of Eldan and Li, "TinyStories" (arXiv:2305.07759).
"""

import dataclasses
import re
from collections.abc import Sequence
from typing import Any

from slm_ray.config.shape import ModelConfig
from slm_ray.model.families.family import Family, Names, departures, uneven_heads
from slm_ray.model.families.fields import MAX_LAYERS, HfFields
from slm_ray.model.families.gpt2 import ACTIVATIONS, BLOCK_MODULES, EXPECTED, MODULES

_WINDOW = 256  # tokens, where config.json has none: transformers' own default
_ALTERNATING = ("global", "local")


def misfits(config: ModelConfig) -> list[str]:
    """What keeps a shape from being GPT-Neo's."""
    wrong = departures(config, EXPECTED | {"scale_attention": False}) + uneven_heads(config)
    if config.has_qkv_bias:
        wrong.append("query, key and value have biases")
    return wrong


def with_biases(config: ModelConfig) -> ModelConfig:
    """Every linear layer and norm has one, but query, key and value."""
    return dataclasses.replace(config, bias=True, qkv_bias=False, o_bias=None, mlp_bias=None)


def write(config: ModelConfig) -> dict[str, Any]:
    """GPT-Neo's fields."""
    kinds = _ALTERNATING if config.local_window else ("global",)
    layers = [kinds[layer % len(kinds)] for layer in range(config.n_layers)]
    return {
        "hidden_size": config.d_model,
        "intermediate_size": config.d_ff,
        "num_layers": config.n_layers,
        "num_heads": config.n_heads,
        "max_position_embeddings": config.seq_len,
        "attention_types": [[[kind], 1] for kind in layers],
        "attention_layers": layers,
        "window_size": config.local_window or _WINDOW,
        "activation_function": "gelu_new",
        "layer_norm_epsilon": config.norm_eps,
        "resid_dropout": config.dropout,
        "embed_dropout": config.dropout,
        "attention_dropout": config.dropout,
    }


def read(fields: HfFields) -> ModelConfig:
    """GPT-Neo's shape. Raises: UserError."""
    fields.expect("activation_function", *ACTIVATIONS)
    fields.refuse_other_names({"num_attention_heads": "num_heads", "num_hidden_layers": "num_layers"})
    d_model, n_layers = fields.size("hidden_size"), fields.size("num_layers", most=MAX_LAYERS)
    return fields.shape(
        vocab_size=fields.size("vocab_size"),
        seq_len=fields.size("max_position_embeddings"),
        n_layers=n_layers,
        d_model=d_model,
        n_heads=fields.size("num_heads"),
        d_ff=fields.size("intermediate_size", 4 * d_model),
        mlp="gelu",
        norm="layer",
        norm_eps=fields.number("layer_norm_epsilon", 1e-5),
        positions="learned",
        bias=True,
        qkv_bias=False,
        scale_attention=False,
        local_window=_local_window(fields, n_layers),
        dropout=fields.number("resid_dropout", 0.0, is_share=True),
        tie_embeddings=fields.truth("tie_word_embeddings", default=True),
        init_std=fields.number("initializer_range", 0.02),
    )


def _local_window(fields: HfFields, n_layers: int) -> int:
    """The window of every second layer, 0 where none is local."""
    window, kinds = fields.size("window_size", _WINDOW), _kinds_of_layers(fields, n_layers)
    if fields.get("attention_layers", kinds) != kinds:
        fields.refuse("attention_layers", "that of attention_types")
    if kinds == ["global"] * n_layers:
        return 0
    if kinds != [_ALTERNATING[layer % 2] for layer in range(n_layers)]:
        fields.refuse("attention_types", f"global and local in turns, or global, in {n_layers} layers")
    return window


def _kinds_of_layers(fields: HfFields, n_layers: int) -> list[str]:
    """`[[["global", "local"], 2]]` -> `["global", "local", "global", "local"]`; empty where it is no such list."""
    kinds: list[str] = []
    groups = fields.get("attention_types", [[list(_ALTERNATING), 12]])
    for group in groups if isinstance(groups, Sequence) else []:
        match group:
            case [[_, *_] as names, int(times)] if 1 <= times <= n_layers and set(map(type, names)) <= {str}:
                kinds += [str(name) for name in names] * times
            case _:
                return []
        if len(kinds) > n_layers:
            return []
    return kinds


GPT_NEO = Family(
    model_type="gpt_neo",
    title="GPT-Neo",
    architectures=("GPTNeoForCausalLM", "GPTNeoModel"),
    names=Names(
        prefix="transformer.",
        layers="h",
        modules=MODULES,
        layer_modules=BLOCK_MODULES
        | {"self_attn.o_proj": "attn.attention.out_proj"}
        | {f"self_attn.{letter}_proj": f"attn.attention.{letter}_proj" for letter in "qkv"},
        buffers=re.compile(r"h\.\d+\.attn\.attention\.(masked_)?bias"),
    ),
    misfits=misfits,
    with_biases=with_biases,
    write=write,
    read=read,
)
