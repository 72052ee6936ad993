"""Where the weights go beside the optimizer's steps: ahead of them, and at the end back towards their mean.

In: weights, an `OptimConfig`, the step. Out: weights, moved before and after the optimizer's own step; a state for the
checkpoint. All rates are functions of the step, as the learning rate is, so a resumed run goes on bit for bit.

Lookahead (EMA-Nesterov, arXiv:2605.25395): m is the running mean of the optimizer's steps, and gradients are taken at
x + b m in place of x, b being `lookahead` times the learning rate's share of its peak, in the middle of the run alone.
The mean of the last weights (`tail_average`) is blended in once, after the last step; the weights of before are kept,
and a run that is extended goes on from them, with a mean of its own last weights.
"""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from slm_ray.config.schema import OptimConfig
from slm_ray.training.optim import learning_rate

DECAY = 0.99
"""Of the mean of the steps."""
AHEAD_FROM, AHEAD_UNTIL = 0.16, 0.76
"""Shares of the run between which the weights stand ahead: at its end they have to settle."""
TAIL_FROM, TAIL_SPAN = 0.83, 0.055
"""Share of the run at which the mean of the last weights begins, and its time constant."""

NAME = "weight_path"
"""Of the state, among the optimizer's."""


class WeightPath:
    """The way of a model's weights, for a run of `max_steps`."""

    def __init__(self, weights: Iterable[Tensor], config: OptimConfig, max_steps: int) -> None:
        self._weights, self._config, self._max_steps = list(weights), config, max_steps
        self._mean_step = [torch.zeros_like(weight) for weight in self._weights] if config.lookahead else []
        self._ahead = torch.zeros(())  # mean steps by which the weights stand ahead now
        self._tail: list[Tensor] = []
        self._unblended: list[Tensor] = []  # the last weights, once the mean was blended in
        self._before: list[Tensor] = []

    @torch.no_grad()
    def before(self) -> None:
        """Keep where the optimizer's own weights are, before its step."""
        back = self._ahead.item()
        self._before = [
            torch.sub(weight, mean, alpha=back) for weight, mean in zip(self._weights, self._mean_step, strict=False)
        ]

    @torch.no_grad()
    def after(self, step: int) -> None:
        """Move the weights on, after the optimizer's step `step`."""
        ahead = lookahead(step + 1, self._max_steps, self._config)
        for weight, mean, before in zip(self._weights, self._mean_step, self._before, strict=False):
            mean.lerp_(weight - before, 1 - DECAY)
            weight.add_(mean, alpha=ahead)
        self._ahead.fill_(ahead)
        self._before = []
        if self._config.tail_average:
            self._follow(step)

    def _follow(self, step: int) -> None:
        if step < round(TAIL_FROM * self._max_steps):
            return
        if not self._tail:
            self._tail = [weight.clone() for weight in self._weights]
        if step == self._max_steps - 1:
            self._unblended = [weight.clone() for weight in self._weights]
        for mean, weight in zip(self._tail, self._weights, strict=True):
            mean.lerp_(weight, 1 / max(1.0, TAIL_SPAN * self._max_steps))
            if step == self._max_steps - 1:
                weight.lerp_(mean, self._config.tail_average)
        if self._unblended:
            self._tail = []

    def state_dict(self) -> dict[str, list[Tensor]]:
        """What the coming steps need; empty where they need nothing."""
        ahead = [self._ahead] if self._mean_step else []
        length = [torch.tensor(self._max_steps)] if self._tail else []
        state = {"mean_step": self._mean_step, "ahead": ahead, "tail": self._tail, "tail_of": length}
        state["unblended"] = self._unblended
        return {name: tensors for name, tensors in state.items() if tensors}

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, list[Tensor]], step: int) -> None:
        """Take back what `state_dict` gave after `step` steps, once the weights have their values of then.

        What the config did not ask for then begins now; what it asks for no more is taken out of the weights; in a run
        of another length the mean of the last weights begins anew.
        """
        if "mean_step" in state:
            self._take_back_lookahead(state["mean_step"], state["ahead"][0])
        if "unblended" in state and step < self._max_steps:
            for weight, saved in zip(self._weights, state["unblended"], strict=True):
                weight.copy_(saved)
        elif "unblended" in state:
            self._unblended = self._copies(state["unblended"])
        if self._config.tail_average and "tail" in state and state["tail_of"][0].item() == self._max_steps:
            self._tail = self._copies(state["tail"])

    def _take_back_lookahead(self, mean_step: list[Tensor], ahead: Tensor) -> None:
        if not self._mean_step:
            for weight, mean in zip(self._weights, self._copies(mean_step), strict=True):
                weight.sub_(mean, alpha=ahead.item())
            return
        for own, saved in zip(self._mean_step, mean_step, strict=True):
            own.copy_(saved)
        self._ahead.copy_(ahead)

    def _copies(self, saved: list[Tensor]) -> list[Tensor]:
        return [one.to(weight.device, copy=True) for one, weight in zip(saved, self._weights, strict=True)]


def lookahead(step: int, max_steps: int, config: OptimConfig) -> float:
    """Mean steps by which the weights stand ahead of the optimizer's before its step `step` (from 0)."""
    if not AHEAD_FROM * max_steps <= step < AHEAD_UNTIL * max_steps:
        return 0.0
    return config.lookahead * learning_rate(step, max_steps, config) / config.lr


def with_path(state: dict[str, Any], path: WeightPath) -> dict[str, Any]:
    """An optimizer's state, with that of the weights' path where there is one."""
    own = path.state_dict()
    return state | {NAME: own} if own else state


def parted(state: dict[str, Any]) -> tuple[dict[str, Any], dict[str, list[Tensor]]]:
    """The optimizer's state alone, and that of the path."""
    return {name: value for name, value in state.items() if name != NAME}, state.get(NAME, {})
