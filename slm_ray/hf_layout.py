"""Our weights in the names and files of Hugging Face, and back.

In: a `ModelConfig` and a `Decoder`'s state dict. Out: the content of `config.json` and the tensors of
`model.safetensors`. A Llama shape is written as `LlamaForCausalLM`, a GPT-2 shape as `GPT2LMHeadModel`, so that
`AutoModelForCausalLM.from_pretrained` opens it; any other shape keeps Llama's names under a model type of our own.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from slm_ray.config import ModelConfig, from_dict

OWN_FIELD = "slm_ray"
_GPT2_LAYER = {
    "input_layernorm": "ln_1",
    "self_attn.o_proj": "attn.c_proj",
    "post_attention_layernorm": "ln_2",
    "mlp.up_proj": "mlp.c_fc",
    "mlp.down_proj": "mlp.c_proj",
}
_GPT2_TOP = {
    "embed_tokens.weight": "transformer.wte.weight",
    "embed_positions.weight": "transformer.wpe.weight",
    "norm.weight": "transformer.ln_f.weight",
    "norm.bias": "transformer.ln_f.bias",
    "lm_head.weight": "lm_head.weight",
}


def family(config: ModelConfig) -> str:
    """Which model type of transformers this shape is: `llama`, `gpt2`, or `slm_ray` for neither."""
    if config.norm == "rms" and config.mlp == "swiglu" and config.positions == "rotary" and not config.dropout:
        return "llama"
    is_square = config.kv_heads == config.n_heads and config.head_width * config.n_heads == config.d_model
    if (config.norm, config.mlp, config.positions, config.bias) == ("layer", "gelu", "learned", True) and is_square:
        return "gpt2"
    return OWN_FIELD


def config_json(config: ModelConfig, end_id: int) -> dict[str, Any]:
    """Content of `config.json`; our own config rides along, so that nothing is lost on the way back."""
    content: dict[str, Any] = {
        "bos_token_id": end_id,
        "eos_token_id": end_id,
        "vocab_size": config.vocab_size,
        "tie_word_embeddings": config.tie_embeddings,
        "initializer_range": config.init_std,
        "dtype": "float32",
        OWN_FIELD: dataclasses.asdict(config),
    }
    kind = family(config)
    own = {"model_type": OWN_FIELD, "architectures": ["Decoder"]}
    return content | {"llama": _llama, "gpt2": _gpt2}.get(kind, lambda _: own)(config)


def _llama(config: ModelConfig) -> dict[str, Any]:
    return {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
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
        "attention_bias": config.bias,
        "mlp_bias": config.bias,
    }


def _gpt2(config: ModelConfig) -> dict[str, Any]:
    return {
        "model_type": "gpt2",
        "architectures": ["GPT2LMHeadModel"],
        "n_embd": config.d_model,
        "n_inner": config.d_ff,
        "n_layer": config.n_layers,
        "n_head": config.n_heads,
        "n_positions": config.seq_len,
        "activation_function": "gelu_new",
        "layer_norm_epsilon": config.norm_eps,
        "resid_pdrop": config.dropout,
        "embd_pdrop": config.dropout,
        "attn_pdrop": config.dropout,
    }


def model_config(content: Mapping[str, Any], origin: str) -> ModelConfig:
    """The `ModelConfig` in a `config.json` that `config_json` made.

    Raises:
        UserError: it holds none, or one that is refused; the message names `origin`.
    """
    return from_dict(ModelConfig, content.get(OWN_FIELD) or {"d_model": "missing"}, origin)


def to_hf(state: Mapping[str, Tensor], config: ModelConfig) -> dict[str, Tensor]:
    """Tensors of `model.safetensors` from a `Decoder`'s state dict; a tied output layer is left out."""
    kept = {name: tensor for name, tensor in state.items() if name != "lm_head.weight" or not config.tie_embeddings}
    if family(config) == "gpt2":
        return _to_gpt2(kept, config)
    return {_llama_name(name): tensor.contiguous() for name, tensor in kept.items()}


def from_hf(tensors: Mapping[str, Tensor], config: ModelConfig) -> dict[str, Tensor]:
    """A `Decoder`'s state dict from the tensors of `model.safetensors`."""
    if family(config) == "gpt2":
        state = _from_gpt2(tensors, config)
    else:
        state = {name.removeprefix("model."): tensor for name, tensor in tensors.items()}
    if config.tie_embeddings and "embed_tokens.weight" in state:
        state["lm_head.weight"] = state["embed_tokens.weight"]
    return state


def _llama_name(name: str) -> str:
    return name if name.startswith("lm_head.") else f"model.{name}"


def _gpt2_names(config: ModelConfig) -> dict[str, str]:
    names = dict(_GPT2_TOP)
    for layer in range(config.n_layers):
        for ours, theirs in _GPT2_LAYER.items():
            for part in ("weight", "bias"):
                names[f"layers.{layer}.{ours}.{part}"] = f"transformer.h.{layer}.{theirs}.{part}"
    return names


def _is_conv1d(name: str) -> bool:
    """GPT-2's linear layers are stored transposed, (in, out)."""
    return name.endswith(("attn.c_proj.weight", "mlp.c_fc.weight", "mlp.c_proj.weight"))


def _to_gpt2(state: Mapping[str, Tensor], config: ModelConfig) -> dict[str, Tensor]:
    names = _gpt2_names(config)
    tensors = {names[name]: tensor for name, tensor in state.items() if name in names}
    tensors = {name: (t.t() if _is_conv1d(name) else t).contiguous() for name, t in tensors.items()}
    for layer in range(config.n_layers):
        for part in ("weight", "bias"):
            qkv = torch.cat([state[f"layers.{layer}.self_attn.{p}_proj.{part}"] for p in "qkv"])  # (3 d_model, ...)
            tensors[f"transformer.h.{layer}.attn.c_attn.{part}"] = qkv.t().contiguous()
    return tensors


def _from_gpt2(tensors: Mapping[str, Tensor], config: ModelConfig) -> dict[str, Tensor]:
    names = {theirs: ours for ours, theirs in _gpt2_names(config).items()}
    state = {names[name]: t.t() if _is_conv1d(name) else t for name, t in tensors.items() if name in names}
    for layer in range(config.n_layers):
        for part in ("weight", "bias"):
            thirds = tensors[f"transformer.h.{layer}.attn.c_attn.{part}"].t().chunk(3)
            for letter, third in zip("qkv", thirds, strict=True):
                state[f"layers.{layer}.self_attn.{letter}_proj.{part}"] = third
    return state
