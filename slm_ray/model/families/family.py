"""What a family is: its config.json and its tensors' names, each read and written.

In: the functions and tables of one of the modules beside this one. Out: a `Family`, which `hf_layout` goes by.
"""

import dataclasses
import re
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

from slm_ray.config.shape import ModelConfig
from slm_ray.model.families.fields import HfFields

_OF_A_LAYER = re.compile(r"(?P<number>\d+)\.(?P<module>.+)\.(?P<kind>weight|bias)")


def _unchanged(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return dict(tensors)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Names:
    """Our names of tensors and the family's, one to one: `layers.0.mlp.up_proj.bias`, `transformer.h.0.mlp.c_fc.bias`.

    A base model of the family saves its tensors without the prefix; both are read.
    """

    prefix: str
    """What stands before every name but that of the output layer: `transformer.`"""
    layers: str
    """What the list of blocks is called: `h`."""
    modules: Mapping[str, str]
    """Our modules and theirs, beside the blocks: `{"embed_tokens": "wte", ...}`."""
    layer_modules: Mapping[str, str]
    """Our modules and theirs, in a block: `{"mlp.up_proj": "mlp.c_fc", ...}`."""
    buffers: re.Pattern[str]
    """Tensors without the prefix that hold no weights: old versions saved them, and they are left out."""

    def theirs(self, name: str) -> str:
        """The family's name of one of our tensors."""
        if name.startswith("lm_head."):
            return name
        return self.prefix + _renamed(name, ("layers", self.layers), self.modules, self.layer_modules)

    def ours(self, name: str) -> str | None:
        """Our name of one of their tensors; with its prefix as it is where there is none, None of a buffer."""
        bare = name.removeprefix(self.prefix)
        if name.startswith("lm_head."):
            return name
        if self.buffers.fullmatch(bare):
            return None
        modules = {theirs: ours for ours, theirs in self.modules.items()}
        layer_modules = {theirs: ours for ours, theirs in self.layer_modules.items()}
        return _renamed(bare, (self.layers, "layers"), modules, layer_modules) or self.prefix + bare


def _renamed(name: str, layers: tuple[str, str], modules: Mapping[str, str], layer_modules: Mapping[str, str]) -> str:
    """The name with its module's other name; empty where the module has none."""
    before, after = layers
    found = _OF_A_LAYER.fullmatch(name.removeprefix(f"{before}.")) if name.startswith(f"{before}.") else None
    if found is not None:
        module = layer_modules.get(found["module"])
        return f"{after}.{found['number']}.{module}.{found['kind']}" if module else ""
    module, _, kind = name.rpartition(".")
    return f"{modules[module]}.{kind}" if module in modules else ""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Family:
    """One model type of transformers."""

    model_type: str
    """As `config.json` has it: `gpt2`."""
    title: str
    """As people write it: `GPT-2`."""
    architectures: tuple[str, ...]
    """Classes whose folders are read; the first is the one that is written."""
    names: Names
    misfits: Callable[[ModelConfig], list[str]]
    """What keeps a shape from being of this family, each in a few words; missing biases do not, they become zeros."""
    with_biases: Callable[[ModelConfig], ModelConfig]
    """A shape of this family with all biases that the family then has."""
    write: Callable[[ModelConfig], dict[str, Any]]
    """The family's own fields of `config.json`."""
    read: Callable[[HfFields], ModelConfig]
    """The shape out of a `config.json`. Raises: UserError, whatever is not exactly a shape of ours."""
    packed: Callable[[Mapping[str, Tensor]], dict[str, Tensor]] = _unchanged
    """Their tensors as the family lays them out, from one matrix (out, in) a module."""
    unpacked: Callable[[Mapping[str, Tensor]], dict[str, Tensor]] = _unchanged
    """The way back."""


def departures(config: ModelConfig, expected: Mapping[str, object]) -> list[str]:
    """The fields that are not as expected: `norm is layer, not rms`."""
    return [
        f"{name} is {getattr(config, name)}, not {value}"
        for name, value in expected.items()
        if getattr(config, name) != value
    ]


def has_local_blocks(config: ModelConfig) -> bool:
    """Whether a block sees less than the context."""
    return any(config.attention_span(layer) < config.seq_len for layer in range(config.n_layers))


def uneven_heads(config: ModelConfig) -> list[str]:
    """Heads that do not make up the width, or are grouped: neither GPT knows them."""
    wrong = []
    if config.kv_heads != config.n_heads:
        wrong.append(f"n_kv_heads {config.kv_heads} is not n_heads {config.n_heads}")
    if config.n_heads * config.head_width != config.d_model:
        wrong.append(f"n_heads {config.n_heads} x d_head {config.head_width} is not d_model {config.d_model}")
    return wrong
