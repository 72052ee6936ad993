"""The optimizer's step in the bench of learning: the product's, and what is tried beyond the config's fields.

In: a trainer and the extras of a try. Out: `Extras`, whose step does what the trainer's optimizer and weight path do,
with rates that may be tensors: in a CUDA graph, where a step is a replay, they lie on the device. Sources of the
extras: SOAP (arXiv:2409.11321) before Muon's iteration; the floor under the rows of an update is from the public record
of Keller Jordan's modded-nanogpt, third track.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from slm_ray.training.besides.further_tokens import mtp_weights
from slm_ray.training.besides.weight_path import DECAY, TAIL_FROM, TAIL_SPAN, lookahead
from slm_ray.training.muon import RMS_OF_ADAMW, ROW_BETA, Muon, made, orthogonalize, row_squares, with_even_rows
from slm_ray.training.optim import CombinedOptimizer, learning_rate
from slm_ray.training.trainer import Trainer

SOAP_BETA, SOAP_SIDE = 0.9, 320
NAMES = frozenset(
    (
        "row_floor",
        "cautious",
        "soap",
        "zero_outputs",
        "momentum_from",
        "power",
        "adamw_floor",
        "z_loss",
        "grow",
        "stories",
    )
)

Rate = float | Tensor


class BenchMuon(Muon):
    """Muon with a floor under its rows, cautious decay, and SOAP's basis, each where the extras ask for it."""

    extras: Mapping[str, Any] = {}

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Update every matrix; learning rates may be tensors."""
        assert closure is None
        for group in self.param_groups:
            for matrices in _by_shape(group["params"]):
                weights = torch.stack(matrices)  # (N, rows, columns), as all below
                updates = self._made(matrices, group).to(weights.dtype) * (
                    RMS_OF_ADAMW * math.sqrt(max(matrices[0].shape))
                )
                if floor := self.extras.get("row_floor"):
                    own, theirs = (one.norm(dim=-1, keepdim=True) for one in (updates, weights))
                    updates = updates * (floor * theirs / (own + 1e-10)).clamp(1, 10)
                decay = weights * group["weight_decay"]
                if self.extras.get("cautious"):
                    decay = decay * (updates * weights > 0)
                torch._foreach_add_(matrices, ((updates + decay) * (-group["lr"])).unbind())

    def _made(self, matrices: list[Tensor], group: dict[str, Any]) -> Tensor:
        """As Muon's; between momentum and iteration, SOAP whitens where it is asked for."""
        gradients = torch.stack([matrix.grad for matrix in matrices if matrix.grad is not None])
        momentum = self._stacked(matrices, "momentum_buffer", gradients)
        squares = self._stacked(matrices, "row_squares", gradients[..., :1]) if group["normalize_rows"] else None
        dtype = torch.bfloat16 if gradients.is_cuda else gradients.dtype
        if not self.extras.get("soap"):
            return made(gradients, momentum, squares, 0, len(matrices), group["momentum"], dtype)
        momentum.lerp_(gradients, 1 - group["momentum"])
        basis = self._soap.get(matrices[0])
        if basis is None:
            basis = self._soap[matrices[0]] = Basis(gradients)
        updates = basis.whitened(gradients, gradients.lerp(momentum, group["momentum"]))
        updates = orthogonalize(updates, dtype).to(gradients.dtype)
        if squares is not None:
            of_rows = row_squares(updates)
            updates = with_even_rows(updates, squares.lerp_(of_rows, 1 - ROW_BETA), of_rows)
        return updates

    @property
    def _soap(self) -> "dict[Tensor, Basis]":
        return self.__dict__.setdefault("bases", {})  # type: ignore[no-any-return]

    def refresh(self) -> None:
        """Turn the bases: not within a CUDA graph."""
        for basis in self._soap.values():
            basis.refresh()


class Basis:
    """Eigenvectors of the mean of G G^T and of G^T G, as far as those are small, of N matrices of one shape."""

    def __init__(self, gradients: Tensor) -> None:
        rows, columns = gradients.shape[-2:]
        self.left = self._first(gradients @ gradients.mT) if rows <= SOAP_SIDE else None
        self.right = self._first(gradients.mT @ gradients) if columns <= SOAP_SIDE else None
        self.squares = self._turned(gradients).square()

    @staticmethod
    def _first(square: Tensor) -> tuple[Tensor, Tensor]:
        return square.clone(), torch.linalg.eigh(square).eigenvectors.flip(-1).contiguous()

    def _turned(self, x: Tensor) -> Tensor:
        x = x if self.left is None else self.left[1].mT @ x
        return x if self.right is None else x @ self.right[1]

    def whitened(self, gradients: Tensor, updates: Tensor) -> Tensor:
        """Updates over the root of the gradients' mean squares, both in the basis; (N, rows, columns)."""
        if self.left is not None:
            self.left[0].lerp_(gradients @ gradients.mT, 1 - SOAP_BETA)
        if self.right is not None:
            self.right[0].lerp_(gradients.mT @ gradients, 1 - SOAP_BETA)
        self.squares.lerp_(self._turned(gradients).square(), 1 - SOAP_BETA)
        x = self._turned(updates) / (self.squares.sqrt() + 1e-10)
        x = x if self.left is None else self.left[1] @ x
        return x if self.right is None else x @ self.right[1].mT

    @torch.no_grad()
    def refresh(self) -> None:
        """One step of the power iteration."""
        for side in (self.left, self.right):
            if side is not None:
                square, vectors = side
                vectors.copy_(torch.linalg.qr(square @ vectors).Q)


def _by_shape(parameters: Sequence[Tensor]) -> list[list[Tensor]]:
    shapes: dict[torch.Size, list[Tensor]] = {}
    for parameter in parameters:
        if parameter.grad is not None:
            shapes.setdefault(parameter.shape, []).append(parameter)
    return list(shapes.values())


@dataclasses.dataclass(frozen=True)
class Rates:
    """What changes from step to step, by number or as 0-dim tensors."""

    lrs: Sequence[Rate]
    """Of each parameter group."""
    momentum: Rate
    back: Rate
    """Where the weights stand beyond those of the optimizer, along the mean step."""
    ahead: Rate
    """Where they will."""
    into_tail: Rate
    """Share of the weights in the tail's mean: 0 before it, 1 at its first step."""
    blend: Rate
    """Share of the tail's mean in the weights; above 0 at the last step alone."""
    further: Sequence[Rate] = ()
    """Weights of the tokens after the next one."""

    def numbers(self) -> list[Rate]:
        """One after another."""
        return [self.momentum, self.back, self.ahead, self.into_tail, self.blend, *self.lrs, *self.further]

    @classmethod
    def of_numbers(cls, numbers: Sequence[Rate], n_further: int) -> "Rates":
        """Back from `numbers`, of which the last are weights of further tokens."""
        momentum, back, ahead, into_tail, blend, *others = numbers
        lrs, further = others[: len(others) - n_further], others[len(others) - n_further :]
        return cls(lrs, momentum, back, ahead, into_tail, blend, further)


class Extras:
    """The optimizer of a trainer, with the extras of a try."""

    def __init__(self, trainer: Trainer, extras: Mapping[str, Any]) -> None:
        assert set(extras) <= NAMES, f"unknown extras: {sorted(set(extras) - NAMES)}"
        self.trainer, self.extras = trainer, extras
        self.weights = [parameter for parameter in trainer.model.parameters() if parameter.requires_grad]
        self.max_steps = trainer.inputs.max_steps
        zeros = [torch.zeros_like(weight) for weight in self.weights]
        config = trainer.config.optim
        self.mean_step = zeros if config.lookahead else []
        self.tail = [torch.zeros_like(weight) for weight in self.weights] if config.tail_average else []
        optimizer = trainer.optimizer
        self.muon = optimizer.parts[0] if isinstance(optimizer, CombinedOptimizer) else None
        if self.muon is not None:
            self.muon.__class__ = BenchMuon
            self.muon.extras = extras  # type: ignore[attr-defined]
        if extras.get("zero_outputs"):
            zero_outputs(trainer.model)

    def rates(self, step: int) -> Rates:
        """Of step `step`, from 0."""
        config, extras, done = self.trainer.config.optim, self.extras, self.max_steps
        lr = learning_rate(step, done, config)
        if "power" in extras and step >= min(config.warmup_steps, done // 10):
            lr = config.lr * (lr / config.lr) ** extras["power"]
        slow = max(lr, config.lr * extras.get("adamw_floor", 0.0) * min(1.0, 5 * (1 - step / done)))
        momentum = config.momentum
        if "momentum_from" in extras:
            share = min(1.0, step / 300)
            momentum = extras["momentum_from"] * (1 - share) + momentum * share
        start, span = round(done * TAIL_FROM), max(1.0, done * TAIL_SPAN)
        return Rates(
            lrs=[
                group["lr_factor"] * (lr if any(group is one for one in self._matrices()) else slow)
                for group in self.trainer.optimizer.param_groups
            ],
            momentum=momentum,
            back=lookahead(step, done, config),
            ahead=lookahead(step + 1, done, config),
            into_tail=0.0 if step < start else 1.0 if step == start else 1 / span,
            blend=config.tail_average if step == done - 1 else 0.0,
            further=mtp_weights(step, done, self.trainer.config),
        )

    def _matrices(self) -> list[dict[str, Any]]:
        return self.muon.param_groups if self.muon is not None else []

    @torch.no_grad()
    def step(self, rates: Rates) -> None:
        """The optimizer's step, and what the extras make of it."""
        optimizer = self.trainer.optimizer
        for group, lr in zip(optimizer.param_groups, rates.lrs, strict=True):
            group["lr"] = lr
        if self.muon is not None and "momentum_from" in self.extras:
            self.muon.param_groups[0]["momentum"] = rates.momentum
        if not self.mean_step:
            optimizer.step()
        else:
            before = torch._foreach_sub(self.weights, _times(self.mean_step, rates.back))
            optimizer.step()
            moved = torch._foreach_sub(self.weights, before)
            torch._foreach_lerp_(self.mean_step, moved, 1 - DECAY)
            torch._foreach_add_(self.weights, _times(self.mean_step, rates.ahead))
        if self.tail:
            apart = torch._foreach_sub(self.weights, self.tail)
            torch._foreach_add_(self.tail, _times(apart, rates.into_tail))
            apart = torch._foreach_sub(self.tail, self.weights)
            torch._foreach_add_(self.weights, _times(apart, rates.blend))

    def between(self, step: int) -> None:
        """What cannot be part of a CUDA graph, after so many steps."""
        if (every := self.extras.get("soap")) and step % every == 0 and isinstance(self.muon, BenchMuon):
            self.muon.refresh()

    @property
    def interval(self) -> int:
        """Steps after which `between` wants to be called; 0 for never."""
        return int(self.extras.get("soap", 0))


def _times(tensors: Sequence[Tensor], by: Rate) -> tuple[Tensor, ...]:
    return torch._foreach_mul(list(tensors), by)


def zero_outputs(model: torch.nn.Module) -> None:
    """Let every block begin as the identity: its output projections are zero."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(("o_proj.weight", "down_proj.weight")):
                parameter.zero_()
