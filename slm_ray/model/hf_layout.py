"""Our weights in the names and files of Hugging Face, and back; and the files that others wrote.

In: a `ModelConfig` and a `Decoder`'s state dict, or a `config.json` and the tensors of `model.safetensors`. Out: each
as the other. A shape that is one of the `families` is written as theirs, so that
`AutoModelForCausalLM.from_pretrained` opens it; any other keeps Llama's names under a model type of our own, and
`why_not_transformers` says what is in the way.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from slm_ray.config.files import from_dict
from slm_ray.config.schema import ModelConfig
from slm_ray.errors import UserError
from slm_ray.model.families.family import Family
from slm_ray.model.families.fields import MAX_LAYERS, HfFields, shown
from slm_ray.model.families.gpt2 import GPT2
from slm_ray.model.families.gpt_neo import GPT_NEO
from slm_ray.model.families.llama import LLAMA, NAMES
from slm_ray.model.families.qwen3 import QWEN3

OWN_FIELD = "slm_ray"
FAMILIES: Mapping[str, Family] = {one.model_type: one for one in (LLAMA, QWEN3, GPT_NEO, GPT2)}
"""Those that we read and write, by transformers' `model_type`; where two fit, the first is written."""


def family(config: ModelConfig) -> str:
    """Which model type of transformers this shape is: a name in `FAMILIES`, or `slm_ray` for none."""
    fitting = (name for name, one in FAMILIES.items() if not one.misfits(config))
    return next(fitting, OWN_FIELD)


def why_not_transformers(config: ModelConfig) -> str:
    """Why transformers cannot open this shape, in one sentence on the two closest families; empty where it can."""
    misfits = {one.title: one.misfits(config) for one in FAMILIES.values()}
    if not all(misfits.values()):
        return ""
    closest = sorted(misfits, key=lambda title: len(misfits[title]))[:2]
    reasons = ", ".join(f"not {title} ({', '.join(misfits[title])})" for title in closest)
    return f"transformers has no model of this shape: {reasons}"


def config_json(config: ModelConfig, eos_id: int) -> dict[str, Any]:
    """Content of `config.json`; our own config rides along, so that nothing is lost on the way back."""
    kind = FAMILIES.get(family(config))
    return {
        "bos_token_id": eos_id,
        "eos_token_id": eos_id,
        "vocab_size": config.vocab_size,
        "tie_word_embeddings": config.tie_embeddings,
        "initializer_range": config.init_std,
        "dtype": "float32",
        "model_type": kind.model_type if kind else OWN_FIELD,
        "architectures": [kind.architectures[0] if kind else "Decoder"],
        OWN_FIELD: dataclasses.asdict(config),
    } | (kind.write(config) if kind else {})


def model_config(content: Mapping[str, Any], origin: str) -> ModelConfig:
    """The `ModelConfig` in a `config.json`, ours or anybody's.

    Raises:
        UserError: it is of no family that we know, says something that we have not (in one line: field, value, what is
            supported), or holds our own config and another beside it. The message begins with `origin`.
    """
    kind = FAMILIES.get(str(content.get("model_type")))
    own = content.get(OWN_FIELD)
    if own is not None:
        if not isinstance(own, Mapping):
            raise UserError(f"{origin}: {OWN_FIELD} is {shown(own)}, and an object is expected")
        config = from_dict(ModelConfig, own, origin)
        if config.n_layers > MAX_LAYERS:
            raise UserError(f"{origin}: n_layers is {config.n_layers}, and at most {MAX_LAYERS:,} are supported")
        if kind is None and content.get("model_type", OWN_FIELD) != OWN_FIELD:  # what it says of itself counts
            raise _unknown_model(content, origin)
        if kind is not None:
            _refuse_two_meanings(config, _read(kind, content, origin), kind, origin)
        return config
    if kind is None:
        raise _unknown_model(content, origin)
    return _read(kind, content, origin)


def _unknown_model(content: Mapping[str, Any], origin: str) -> UserError:
    known = ", ".join(f"{one.title} ({name})" for name, one in FAMILIES.items())
    return UserError(f"{origin}: model_type is {shown(content.get('model_type'))}, and the known are {known}")


def _read(kind: Family, content: Mapping[str, Any], origin: str) -> ModelConfig:
    """The shape that a family's own fields describe."""
    fields = HfFields(content, origin)
    named = fields.get("architectures") or [kind.architectures[0]]
    if not isinstance(named, list) or not any(name in kind.architectures for name in named):
        fields.refuse("architectures", kind.architectures[0])
    fields.expect("quantization_config", None)
    return kind.read(fields)


def _refuse_two_meanings(config: ModelConfig, found: ModelConfig, kind: Family, origin: str) -> None:
    """Our own config and the family's fields beside it must say the same: others may have changed the fields."""
    its_own = FAMILIES.get(family(config))
    if its_own is not kind:
        named = its_own.title if its_own else "no family"
        raise UserError(f"{origin}: model_type is {kind.model_type}, and {OWN_FIELD} describes {named}")
    expected = kind.read(HfFields(config_json(config, 0), f"{origin}: {OWN_FIELD}"))
    for field in dataclasses.fields(ModelConfig):
        ours, theirs = getattr(expected, field.name), getattr(found, field.name)
        if ours != theirs:
            raise UserError(
                f"{origin}: {field.name} is {ours} under {OWN_FIELD}, and {theirs} by {kind.title}'s own fields: "
                f"remove {OWN_FIELD} if these are right"
            )


def to_hf(state: Mapping[str, Tensor], config: ModelConfig) -> dict[str, Tensor]:
    """Tensors of `model.safetensors` from a `Decoder`'s state dict; a tied output layer is left out."""
    kept = {name: tensor for name, tensor in state.items() if name != "lm_head.weight" or not config.tie_embeddings}
    kind, whole = FAMILIES.get(family(config)), _with_biases(config)
    for name, tensor in state.items():
        bias = name.removesuffix("weight") + "bias"
        if name.endswith(".weight") and _has_bias(whole, bias) and not _has_bias(config, bias):
            kept[bias] = tensor.new_zeros(len(tensor))
    named = {(kind.names if kind else NAMES).theirs(name): tensor for name, tensor in kept.items()}
    packed = kind.packed(named) if kind else named
    return {name: tensor.contiguous() for name, tensor in packed.items()}


def from_hf(tensors: Mapping[str, Tensor], config: ModelConfig) -> dict[str, Tensor]:
    """A `Decoder`'s state dict from the tensors of `model.safetensors`.

    The names say whose they are: shapes of other families may lie under Llama's. A tensor that we do not know keeps its
    family's name, so that it is found missing from the model; buffers of old versions alone are left out.

    Raises:
        ValueError: a weight is there twice, or an output layer or bias is not what the config says of it.
    """
    kind = _family_of_names(tensors)
    names = kind.names if kind else NAMES
    state: dict[str, Tensor] = {}
    for name, tensor in (kind.unpacked(tensors) if kind else tensors).items():
        ours = names.ours(name)
        if ours in state:
            raise ValueError(f"{name} is there twice, with and without {names.prefix}")
        if ours is not None:
            state[ours] = tensor
    _drop_zero_biases(state, config)
    if config.tie_embeddings and "embed_tokens.weight" in state:
        embedding = state["embed_tokens.weight"]
        if not _is_equal(state.get("lm_head.weight", embedding), embedding):
            raise ValueError("lm_head.weight is not the embedding's, and config.json says that they are tied")
        state["lm_head.weight"] = embedding
    return state


def without_buffers(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of `model.safetensors` that `from_hf` looks at: not the buffers that old versions wrote."""
    kind = _family_of_names(tensors)
    names = kind.names if kind else NAMES
    return {name: tensor for name, tensor in tensors.items() if names.ours(name) is not None}


def _family_of_names(tensors: Mapping[str, Tensor]) -> Family | None:
    """The GPT whose names these are; None where they are Llama's."""
    if not any(name.removeprefix(GPT2.names.prefix) == "wte.weight" for name in tensors):
        return None
    return GPT_NEO if any(".attn.attention." in name for name in tensors) else GPT2


def _drop_zero_biases(state: dict[str, Tensor], config: ModelConfig) -> None:
    """Take out the zeros that `to_hf` put there for biases that the model lacks."""
    whole = _with_biases(config)
    for name in [name for name in state if _has_bias(whole, name) and not _has_bias(config, name)]:
        if not _is_equal(state[name], torch.zeros_like(state[name])):
            raise ValueError(f"{name} is not zero, and config.json says that there is none")
        del state[name]


def _with_biases(config: ModelConfig) -> ModelConfig:
    """The shape as its family writes it: biases that the model lacks are there, as zeros."""
    kind = FAMILIES.get(family(config))
    return kind.with_biases(config) if kind else config


def _has_bias(config: ModelConfig, name: str) -> bool:
    """Whether a model of this shape has a bias of that name: of a linear layer, or of a LayerNorm."""
    module, _, kind = name.rpartition(".")
    if kind != "bias":
        return False
    if module.endswith("norm"):
        return config.bias and config.norm == "layer" and not module.endswith(("q_norm", "k_norm"))
    if ".mlp." in module:
        return config.has_mlp_bias
    if ".self_attn." in module:
        return config.has_o_bias if module.endswith("o_proj") else config.has_qkv_bias
    return False


def _is_equal(first: Tensor, second: Tensor) -> bool:
    """Whether two tensors hold the same; those without memory do where their shapes agree."""
    if first.shape != second.shape or first.is_meta or second.is_meta:
        return first.shape == second.shape
    return first is second or torch.allclose(first, second, rtol=0, atol=0, equal_nan=True)
