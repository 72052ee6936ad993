"""Qwen3: Llama with RMSNorm over every head's query and key; no biases in the feed-forward block.

In and out: as `family.Family` says.
"""

from typing import Any

from slm_ray.config.shape import ModelConfig
from slm_ray.model.families.family import Family, departures, has_local_blocks
from slm_ray.model.families.fields import HfFields
from slm_ray.model.families.llama import EXPECTED, NAMES, read_shape, with_biases, written_shape

_HEAD_DIM = 128  # of a config.json that has none: transformers' own default


def misfits(config: ModelConfig) -> list[str]:
    """What keeps a shape from being Qwen3's."""
    wrong = departures(config, EXPECTED | {"qk_norm": True})
    if config.has_mlp_bias:
        wrong.append("the feed-forward block has biases")
    if has_local_blocks(config):
        wrong.append(f"local_window is {config.local_window}, not 0")
    return wrong


def write(config: ModelConfig) -> dict[str, Any]:
    """Qwen3's fields."""
    return written_shape(config) | {"use_sliding_window": False, "sliding_window": None}


def read(fields: HfFields) -> ModelConfig:
    """Qwen3's shape. Raises: UserError."""
    if fields.truth("use_sliding_window", default=False):
        fields.expect("sliding_window", None)
    return fields.shape(**read_shape(fields, head_dim=_HEAD_DIM), qk_norm=True, mlp_bias=False)


QWEN3 = Family(
    model_type="qwen3",
    title="Qwen3",
    architectures=("Qwen3ForCausalLM", "Qwen3Model"),
    names=NAMES,
    misfits=misfits,
    with_biases=with_biases,
    write=write,
    read=read,
)
