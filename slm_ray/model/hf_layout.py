"""Our weights in the names and files of Hugging Face, and back.

In: a `ModelConfig` and a `Decoder`'s state dict. Out: the content of `config.json` and the tensors of
`model.safetensors`. A Llama shape is written as `LlamaForCausalLM`, a GPT-2 shape as `GPT2LMHeadModel`, so that
`AutoModelForCausalLM.from_pretrained` opens it; any other shape keeps Llama's names under a model type of our own, and
`why_not_transformers` says what is in the way.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from slm_ray.config.files import from_dict
from slm_ray.config.schema import ModelConfig

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
    for kind, misfits in (("llama", _llama_misfits(config)), ("gpt2", _gpt2_misfits(config))):
        if not misfits:
            return kind
    return OWN_FIELD


def why_not_transformers(config: ModelConfig) -> str:
    """Why transformers cannot open this shape, in one sentence; empty where it can."""
    if family(config) != OWN_FIELD:
        return ""
    llama, gpt2 = ", ".join(_llama_misfits(config)), ", ".join(_gpt2_misfits(config))
    return f"transformers has no model of this shape: not Llama ({llama}), not GPT-2 ({gpt2})"


def _llama_misfits(config: ModelConfig) -> list[str]:
    """What keeps the shape from being Llama's. Dropout does not: it is a matter of training, not of the logits."""
    wrong = _departures(config, {"norm": "rms", "mlp": "swiglu", "positions": "rotary"})
    if config.d_model % config.n_heads:  # refused by LlamaConfig, although head_dim is given
        wrong.append(f"d_model {config.d_model} is no multiple of n_heads {config.n_heads}")
    return wrong


def _gpt2_misfits(config: ModelConfig) -> list[str]:
    """What keeps the shape from being GPT-2's. Missing biases do not: they are written as zeros."""
    wrong = _departures(config, {"norm": "layer", "mlp": "gelu", "positions": "learned"})
    if config.kv_heads != config.n_heads:
        wrong.append(f"n_kv_heads {config.kv_heads} is not n_heads {config.n_heads}")
    if config.n_heads * config.head_width != config.d_model:
        wrong.append(f"n_heads {config.n_heads} x d_head {config.head_width} is not d_model {config.d_model}")
    return wrong


def _departures(config: ModelConfig, expected: Mapping[str, str]) -> list[str]:
    return [
        f"{name} is {getattr(config, name)}, not {value}"
        for name, value in expected.items()
        if getattr(config, name) != value
    ]


def config_json(config: ModelConfig, eos_id: int) -> dict[str, Any]:
    """Content of `config.json`; our own config rides along, so that nothing is lost on the way back."""
    content: dict[str, Any] = {
        "bos_token_id": eos_id,
        "eos_token_id": eos_id,
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
        "attention_dropout": config.dropout,  # transformers drops there only; in eval mode nothing differs
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
    if _GPT2_TOP["embed_tokens.weight"] in tensors:
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


def _with_biases(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Zeros for the biases that GPT-2 has in every layer and norm, where the model has none."""
    zeros = {
        name.removesuffix("weight") + "bias": tensor.new_zeros(len(tensor))
        for name, tensor in state.items()
        if name.startswith(("layers.", "norm.")) and name.endswith(".weight")
    }
    return zeros | dict(state)


def _to_gpt2(state: Mapping[str, Tensor], config: ModelConfig) -> dict[str, Tensor]:
    names, state = _gpt2_names(config), _with_biases(state)
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
    return {name: tensor for name, tensor in state.items() if config.bias or not name.endswith(".bias")}
