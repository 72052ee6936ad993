"""Parameter groups, the optimizer, and the learning rate of every step.

In: a model and an `OptimConfig`. Out: a `torch.optim.Optimizer` and plain functions of the step; the schedule has no
state of its own, so nothing of it can be forgotten on resume.
"""

import math
from typing import Any

import torch
from torch import nn

from slm_ray.config import OptimConfig


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Two groups: matrices and embeddings with weight decay; norms and biases without."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return [
        {"params": [p for p in parameters if p.dim() >= 2], "weight_decay": weight_decay},
        {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0},
    ]


def make_optimizer(model: nn.Module, config: OptimConfig) -> torch.optim.Optimizer:
    """AdamW over the model's parameter groups, fused into one kernel a group."""
    groups = parameter_groups(model, config.weight_decay)
    return torch.optim.AdamW(groups, lr=config.lr, betas=(config.beta1, config.beta2), eps=config.eps, fused=True)


def restore_optimizer(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    """Load a saved state; weight decay, betas and eps stay those that the optimizer was made with."""
    kept = [{name: group[name] for name in ("weight_decay", "betas", "eps")} for group in optimizer.param_groups]
    optimizer.load_state_dict(state)
    for group, values in zip(optimizer.param_groups, kept, strict=True):
        group.update(values)


def learning_rate(step: int, max_steps: int, config: OptimConfig) -> float:
    """Learning rate of step `step` (from 0): linear warmup, then a cosine down to `final_lr` at the last step.

    Source: Loshchilov and Hutter, "SGDR" (arXiv:1608.03983), one period. The warmup takes at most a tenth of the run.
    """
    warmup = min(config.warmup_steps, max_steps // 10)
    if step < warmup:
        return config.lr * (step + 1) / warmup
    progress = (step - warmup) / max(1, max_steps - 1 - warmup)
    cosine = 0.5 * (1 + math.cos(math.pi * min(progress, 1.0)))
    return config.final_lr + (config.lr - config.final_lr) * cosine


def set_learning_rate(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Give every group the learning rate of the coming step."""
    for group in optimizer.param_groups:
        group["lr"] = lr
