"""Cross-entropy over the vocabulary without ever holding all logits.

In: the hidden states behind the last norm, the weights of the output layer, and targets. Out: the summed loss, equal to
that of the plain form within rounding, with the gradients of both. `model` calls it for training and validation.

The plain form keeps the logits (B * T, vocab_size) in fp32, their log-softmax and its gradient. Here a few rows of
logits at a time are turned into their part of the loss and, since its gradient is softmax(logits) minus one at the
target, into their part of the gradients at once; backward only scales these. The matrix multiplications are the same,
so nothing is computed twice. Source: the idea is that of Liger Kernel (Hsu et al., arXiv:2410.10989, section 3.2).
"""

from typing import Any

import torch
from torch import Tensor

CHUNK_ELEMENTS = 2**21
"""Logits computed at a time: 8 MB in fp32, which a core's cache still holds."""
MIN_CHUNK_ROWS = 128
"""Fewer rows would spend the time on adding up the gradient of the output layer, which each chunk goes over once."""


def linear_cross_entropy(hidden: Tensor, weight: Tensor, targets: Tensor, ignored: int) -> Tensor:
    """Sum over the rows of -log softmax(weight @ hidden)[target], in nats.

    hidden: (N, d_model); weight: (vocab_size, d_model); targets: (N,) ids, `ignored` where a row does not count. The
    matrix multiplications run in autocast's type where it is on, all else in fp32 (fp64 where that is given). It can be
    differentiated once.
    """
    device = hidden.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden.dtype
    with_gradients = torch.is_grad_enabled() and (hidden.requires_grad or weight.requires_grad)
    outputs: tuple[Tensor, ...] = _loss_and_gradients(hidden, weight, targets, ignored, dtype, with_gradients)
    return outputs[0]


def chunk_rows(vocab_size: int) -> int:
    """Rows of logits computed at a time: few enough for the cache, 8 MB where the vocabulary is small."""
    return max(MIN_CHUNK_ROWS, CHUNK_ELEMENTS // vocab_size)


# An operator of its own, so that torch.compile takes it as one step: unrolled over its chunks, it compiles for long.
@torch.library.custom_op("slm_ray::linear_cross_entropy", mutates_args=())
def _loss_and_gradients(
    hidden: Tensor, weight: Tensor, targets: Tensor, ignored: int, dtype: torch.dtype, with_gradients: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """The loss, and its gradients with respect to hidden and weight (empty where they are not asked for)."""
    wide = torch.promote_types(dtype, torch.float32)
    loss = torch.zeros((), dtype=wide, device=hidden.device)
    to_hidden = torch.empty_like(hidden) if with_gradients else hidden.new_empty(0)
    to_weight = torch.zeros_like(weight) if with_gradients else weight.new_empty(0)
    with torch.autocast(hidden.device.type, enabled=False):
        narrow = weight.to(dtype)
        rows = chunk_rows(len(weight))
        for first in range(0, len(hidden), rows):
            part = slice(first, first + rows)
            x, is_target = hidden[part].to(dtype), (targets[part] != ignored)[:, None]  # (rows, d_model), (rows, 1)
            nats, slope = _chunk(x @ narrow.t(), targets[part, None].clamp_min(0), wide)
            loss += nats.where(is_target, 0).sum()
            if with_gradients:
                slope = slope.to(dtype)  # (rows, vocab_size)
                to_hidden[part] = (slope @ narrow) * is_target
                _add_product(to_weight, slope.t(), x * is_target)
    return loss, to_hidden, to_weight


def _chunk(logits: Tensor, index: Tensor, wide: torch.dtype) -> tuple[Tensor, Tensor]:
    """Loss of every row, (rows, 1), and its slope against the logits, (rows, vocab_size).

    The softmax of the target may vanish in fp32, that of the largest logit cannot: so the loss is taken from there.
    """
    slope = torch.softmax(logits, dim=1, dtype=wide)
    largest, chosen = logits.amax(1, keepdim=True).to(wide), logits.gather(1, index).to(wide)
    nats = largest - chosen - slope.amax(1, keepdim=True).log()
    slope.scatter_(1, index, slope.gather(1, index) - 1)
    return nats, slope


def _add_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    if total.dtype == left.dtype:
        total.addmm_(left, right)
    else:
        total += left @ right


@_loss_and_gradients.register_fake
def _shapes(
    hidden: Tensor, weight: Tensor, _targets: Tensor, _ignored: int, dtype: torch.dtype, with_gradients: bool
) -> tuple[Tensor, Tensor, Tensor]:
    loss = hidden.new_empty((), dtype=torch.promote_types(dtype, torch.float32))
    if not with_gradients:
        return loss, hidden.new_empty(0), weight.new_empty(0)
    return loss, torch.empty_like(hidden), torch.empty_like(weight)


def _keep_gradients(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:  # noqa: ARG001
    ctx.set_materialize_grads(False)  # else zeros as large as the weights are made for outputs that nobody uses
    ctx.save_for_backward(*output[1:])


def _scale_gradients(ctx: Any, upstream: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
    if upstream is None:
        return (None,) * 6
    to_hidden, to_weight = ctx.saved_tensors
    return to_hidden * upstream, to_weight * upstream, None, None, None, None


_loss_and_gradients.register_autograd(_scale_gradients, setup_context=_keep_gradients)
