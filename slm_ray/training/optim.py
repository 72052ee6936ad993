"""Parameter groups, the optimizer, and the learning rate of every step.

In: a model and an `OptimConfig`. Out: an optimizer and plain functions of the step; the schedule has no state of its
own, so nothing of it can be forgotten on resume.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from slm_ray.config.schema import OptimConfig
from slm_ray.errors import UserError
from slm_ray.training.muon import Muon, Ranks

GROUP_KEYS_FROM_CONFIG = ("weight_decay", "betas", "eps", "momentum", "normalize_rows", "lr_factor")
"""What a group takes from the config, not from a checkpoint."""


class CombinedOptimizer:
    """Several optimizers, each with its own parameters, as one."""

    def __init__(self, parts: Sequence[torch.optim.Optimizer]) -> None:
        self.parts = list(parts)

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """The groups of all parts."""
        return [group for part in self.parts for group in part.param_groups]

    def step(self) -> None:
        """One step of every part."""
        for part in self.parts:
            part.step()

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Drop the gradients."""
        for part in self.parts:
            part.zero_grad(set_to_none)

    def state_dict(self) -> dict[str, Any]:
        """The parts' states, in their order."""
        return {"parts": [part.state_dict() for part in self.parts]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take back what `state_dict` gave."""
        for part, its_state in zip(self.parts, state["parts"], strict=True):
            part.load_state_dict(its_state)


AnyOptimizer = torch.optim.Optimizer | CombinedOptimizer


def parameter_groups(model: nn.Module, config: OptimConfig) -> dict[str, dict[str, Any]]:
    """The parameters by what they are: `matrices` of the blocks, `embeddings` with the output layer, and `vectors`.

    Vectors (norms and biases) do not decay. Each group has `lr_factor`: its learning rate over that of the schedule.
    A group without parameters is left out.
    """
    groups: dict[str, dict[str, Any]] = {
        "matrices": {"params": [], "weight_decay": config.weight_decay, "lr_factor": 1.0},
        "embeddings": {"params": [], "weight_decay": config.weight_decay, "lr_factor": config.embed_lr_factor},
        "vectors": {"params": [], "weight_decay": 0.0, "lr_factor": 1.0},
    }
    for name, parameter in model.named_parameters():
        is_embedding = name.startswith(("embed_", "lm_head"))
        kind = "vectors" if parameter.dim() < 2 else "embeddings" if is_embedding else "matrices"
        groups[kind]["params"].append(parameter)
    return {kind: group for kind, group in groups.items() if group["params"]}


def make_optimizer(
    model: nn.Module,
    config: OptimConfig,
    context: Ranks | None = None,
    *,
    in_bf16: bool = False,
    is_compiled: bool = False,
) -> AnyOptimizer:
    """AdamW (one kernel a group) over everything, or Muon for the matrices of the blocks and AdamW for the rest.

    Muon shares its work among the ranks of `context`, multiplies in bfloat16 in a run that does, and is compiled in one
    that is.
    """
    groups = parameter_groups(model, config)
    matrices = [groups.pop("matrices")] if config.name == "muon" else []
    adamw = torch.optim.AdamW(
        list(groups.values()), lr=config.lr, betas=(config.beta1, config.beta2), eps=config.eps, fused=True
    )
    if not matrices:
        return adamw
    muon = Muon(
        matrices,
        lr=config.lr,
        momentum=config.momentum,
        normalize_rows=config.normalize_rows,
        in_bf16=in_bf16,
        is_compiled=is_compiled,
        context=context,
    )
    return CombinedOptimizer([muon, adamw])


def restore_optimizer(optimizer: AnyOptimizer, state: dict[str, Any]) -> None:
    """Load a saved state; weight decay, betas and the like stay those that the optimizer was made with.

    Raises:
        UserError: the state is that of another optimizer, or of another model.
    """
    kept = [{name: group[name] for name in GROUP_KEYS_FROM_CONFIG if name in group} for group in optimizer.param_groups]
    try:
        optimizer.load_state_dict(state)
    except (KeyError, ValueError) as error:
        raise UserError("the checkpoint's optimizer state is that of another optim.name or model") from error
    for group, values in zip(optimizer.param_groups, kept, strict=True):
        group.update(values)


def learning_rate(step: int, max_steps: int, config: OptimConfig) -> float:
    """Learning rate of step `step` (from 0): linear warmup, then down to `final_lr` at the last step.

    The way down is `cosine` (Loshchilov and Hutter, "SGDR", arXiv:1608.03983, one period), `linear`, or `constant`:
    the full rate, and a linear decay over the last `decay_share` of the run (Hu et al., "MiniCPM", arXiv:2404.06395,
    section 4). The warmup takes at most a tenth of the run.
    """
    warmup = min(config.warmup_steps, max_steps // 10)
    if step < warmup:
        return config.lr * (step + 1) / warmup
    progress = min((step - warmup) / max(1, max_steps - 1 - warmup), 1.0)
    return config.final_lr + (config.lr - config.final_lr) * _height(progress, config)


def _height(progress: float, config: OptimConfig) -> float:
    """How much of the way from the last rate to the full one is left: 1 at progress 0, 0 at progress 1."""
    if config.schedule == "cosine":
        return 0.5 * (1 + math.cos(math.pi * progress))
    if config.schedule == "linear":
        return 1 - progress
    return min(1.0, (1 - progress) / config.decay_share)


def set_learning_rate(optimizer: AnyOptimizer, lr: float) -> None:
    """Give every group its learning rate of the coming step."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group["lr_factor"]
