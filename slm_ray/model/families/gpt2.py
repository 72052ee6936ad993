"""GPT-2: LayerNorm, learned positions, GELU, biases everywhere; query, key and value in one transposed matrix.

In and out: as `family.Family` says. `gpt_neo.py` shares its modules and its activation.
"""

import dataclasses
import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from slm_ray.config.shape import ModelConfig
from slm_ray.model.families.family import Family, Names, departures, has_local_blocks, uneven_heads
from slm_ray.model.families.fields import MAX_LAYERS, HfFields

EXPECTED = {"norm": "layer", "mlp": "gelu", "positions": "learned", "qk_norm": False}
MODULES = {"embed_tokens": "wte", "embed_positions": "wpe", "norm": "ln_f"}
BLOCK_MODULES = {
    "input_layernorm": "ln_1",
    "post_attention_layernorm": "ln_2",
    "mlp.up_proj": "mlp.c_fc",
    "mlp.down_proj": "mlp.c_proj",
}
ACTIVATIONS = ("gelu_new", "gelu_pytorch_tanh", "gelu_fast")
"""The names of GELU's tanh form, which is the only one that we have."""
_C_ATTN = "attn.c_attn."
_TRANSPOSED = re.compile(r".*h\.\d+\.(attn\.c_proj|mlp\.c_fc|mlp\.c_proj)\.weight")


def misfits(config: ModelConfig) -> list[str]:
    """What keeps a shape from being GPT-2's."""
    wrong = departures(config, EXPECTED) + uneven_heads(config)
    if has_local_blocks(config):
        wrong.append(f"local_window is {config.local_window}, not 0")
    return wrong


def with_biases(config: ModelConfig) -> ModelConfig:
    """Every linear layer and norm has one."""
    return dataclasses.replace(config, bias=True, qkv_bias=None, o_bias=None, mlp_bias=None)


def write(config: ModelConfig) -> dict[str, Any]:
    """GPT-2's fields."""
    return {
        "n_embd": config.d_model,
        "n_inner": config.d_ff,
        "n_layer": config.n_layers,
        "n_head": config.n_heads,
        "n_positions": config.seq_len,
        "activation_function": "gelu_new",
        "layer_norm_epsilon": config.norm_eps,
        "scale_attn_weights": config.scale_attention,
        "resid_pdrop": config.dropout,
        "embd_pdrop": config.dropout,
        "attn_pdrop": config.dropout,
    }


_OTHER_NAMES = {
    "hidden_size": "n_embd",
    "max_position_embeddings": "n_positions",
    "num_attention_heads": "n_head",
    "num_hidden_layers": "n_layer",
}


def read(fields: HfFields) -> ModelConfig:
    """GPT-2's shape. Raises: UserError.

    `reorder_and_upcast_attn` changes the order of rounding only, so it is taken.
    """
    fields.expect("activation_function", *ACTIVATIONS)
    fields.expect("scale_attn_by_inverse_layer_idx", False)
    fields.expect("add_cross_attention", False)
    fields.refuse_other_names(_OTHER_NAMES)
    d_model = fields.size("n_embd")
    return fields.shape(
        vocab_size=fields.size("vocab_size"),
        seq_len=fields.size("n_positions"),
        n_layers=fields.size("n_layer", most=MAX_LAYERS),
        d_model=d_model,
        n_heads=fields.size("n_head"),
        d_ff=fields.size("n_inner", 4 * d_model),
        mlp="gelu",
        norm="layer",
        norm_eps=fields.number("layer_norm_epsilon", 1e-5),
        positions="learned",
        bias=True,
        scale_attention=fields.truth("scale_attn_weights", default=True),
        dropout=fields.number("resid_pdrop", 0.1, is_share=True),
        tie_embeddings=fields.truth("tie_word_embeddings", default=True),
        init_std=fields.number("initializer_range", 0.02),
    )


def packed(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Query, key and value in one tensor, and every matrix of a block as (in, out)."""
    done: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        stem, part, kind = name.rpartition("attn.q.")
        if part:
            thirds = [tensors[f"{stem}attn.{letter}.{kind}"] for letter in "qkv"]
            done[f"{stem}{_C_ATTN}{kind}"] = torch.cat(thirds).t()  # (d_model, 3 d_model), or (3 d_model,)
        elif not re.search(r"attn\.[kv]\.", name):
            done[name] = tensor.t() if _TRANSPOSED.fullmatch(name) else tensor
    return done


def unpacked(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The way back.

    Raises:
        ValueError: a tensor that should hold query, key and value is no three of one size.
    """
    done: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        stem, part, kind = name.rpartition(_C_ATTN)
        if re.search(r"attn\.[qkv]\.", name):
            raise ValueError(f"{name} is no tensor of GPT-2")
        if tensor.dim() > 2 or (part and (not tensor.dim() or tensor.shape[-1] % 3)):
            raise ValueError(f"{name} has shape {list(tensor.shape)}, which no tensor of GPT-2 has")
        if part:
            for letter, third in zip("qkv", tensor.t().chunk(3), strict=True):
                done[f"{stem}attn.{letter}.{kind}"] = third
        else:
            done[name] = tensor.t() if _TRANSPOSED.fullmatch(name) else tensor
    return done


GPT2 = Family(
    model_type="gpt2",
    title="GPT-2",
    architectures=("GPT2LMHeadModel", "GPT2Model"),
    names=Names(
        prefix="transformer.",
        layers="h",
        modules=MODULES,
        layer_modules=BLOCK_MODULES
        | {"self_attn.o_proj": "attn.c_proj"}
        | {f"self_attn.{letter}_proj": f"attn.{letter}" for letter in "qkv"},  # as `unpacked` names them
        buffers=re.compile(r"h\.\d+\.attn\.(masked_)?bias"),
    ),
    misfits=misfits,
    with_biases=with_biases,
    write=write,
    read=read,
    packed=packed,
    unpacked=unpacked,
)
