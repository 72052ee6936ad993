"""Cross-entropy over the vocabulary without ever holding all logits.

In: the hidden states behind the last norm, the weights of the output layer, and targets. Out: the summed loss, equal to
that of the plain form within rounding, with the gradients of both. `model` calls it for training and validation. A row
may have several targets, each with its weight: they share its logits, and cost next to nothing.

The plain form keeps the logits (B * T, vocab_size) in fp32, their log-softmax and its gradient. Here a few rows of
logits at a time are turned into their part of the loss and, since its gradient is softmax(logits) minus one at the
target, into their part of the gradients at once; backward only scales these. The matrix multiplications are the same,
so nothing is computed twice. Source: the idea is that of Liger Kernel (Hsu et al., arXiv:2410.10989, section 3.2).

On a CPU those few rows are what its cache holds. A GPU is given as many as a bounded part of its memory holds, for it
waits longer for each kernel's start than such few rows take; and within a compiled model softmax, loss and slope are
one compiled kernel.
"""

import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

CHUNK_ELEMENTS = 2**21
"""Logits computed at a time: 8 MB in fp32, which a core's cache still holds."""
MIN_CHUNK_ROWS = 128
"""Fewer rows would spend the time on adding up the gradient of the output layer, which each chunk goes over once."""
BLOCK_ELEMENTS = 2**18
"""Of them so many at a time go from logits to slope on a CPU: 1 MB in fp32."""
CHUNK_ELEMENTS_ON_GPU = 2**28
"""The same on a GPU: 1 GiB in fp32. Compiled, as much is held in bf16 twice over."""
FP16_ROOM = 2**15
"""Half of what fp16 holds: room for rounding."""
SHARE_OF_GPU = 64
"""Nor more, in fp32, than one part in so many of its memory: a smaller card takes smaller chunks."""


def linear_cross_entropy(hidden: Tensor, weight: Tensor, targets: Tensor, ignored: int) -> Tensor:
    """Sum over the rows of -log softmax(weight @ hidden)[target], in nats.

    hidden: (N, d_model); weight: (vocab_size, d_model); targets: (N,) ids, `ignored` where a row does not count. The
    matrix multiplications run in autocast's type where it is on, all else in fp32 (fp64 where that is given). It can be
    differentiated once.
    """
    return _called(hidden, weight, targets[:, None], hidden.new_ones(1, dtype=torch.float32), ignored)[0]


def weighted_cross_entropy(hidden: Tensor, weight: Tensor, targets: Tensor, shares: Tensor, ignored: int) -> Tensor:
    """The same for K targets a row. Returns (2,): the sum over rows and targets, each times its share, which can be
    differentiated; and the plain sum over the first target of each row, which cannot.

    targets: (N, K); shares: (K,) in fp32, not negative. A target whose share is zero plays no part.
    """
    total, _, _, first = _called(hidden, weight, targets, shares, ignored)
    return torch.stack((total, first.detach()))


def _called(hidden: Tensor, weight: Tensor, targets: Tensor, shares: Tensor, ignored: int) -> tuple[Tensor, ...]:
    device = hidden.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden.dtype
    with_gradients = torch.is_grad_enabled() and (hidden.requires_grad or weight.requires_grad)
    is_fused = torch.compiler.is_compiling() and device == "cuda"
    outputs: tuple[Tensor, ...] = _loss_and_gradients(
        hidden, weight, targets, shares, ignored, dtype, with_gradients, is_fused
    )
    return outputs


def chunk_rows(n_rows: int, vocab_size: int, device: torch.device) -> int:
    """Rows of logits computed at a time, of `n_rows` in all.

    On a CPU few enough for its cache: 8 MB where the vocabulary is small. On a GPU as many as its memory allows, in
    chunks of one size where a size near that divides `n_rows`: each other size is compiled for itself.
    """
    if device.type == "cpu":
        return max(MIN_CHUNK_ROWS, CHUNK_ELEMENTS // vocab_size)
    return even_rows(n_rows, max(MIN_CHUNK_ROWS, elements_on_gpu(_memory_of(device)) // vocab_size))


def elements_on_gpu(memory_bytes: int) -> int:
    """Logits computed at a time on a GPU of so much memory: a free part may change, and with it the order of sums."""
    return min(CHUNK_ELEMENTS_ON_GPU, memory_bytes // (4 * SHARE_OF_GPU))


def even_rows(n_rows: int, most: int) -> int:
    """`n_rows` in parts of at most `most`: alike where up to twice the fewest can be, else the last one is smaller.

    `even_rows(32_768, 5_341) -> 4_096` in 8 parts where 7 would do; `even_rows(100, 128) -> 100`.
    """
    fewest = max(1, -(-n_rows // most))
    n_parts = next((number for number in range(fewest, 2 * fewest) if n_rows % number == 0), fewest)
    return max(1, -(-n_rows // n_parts))


def _memory_of(device: torch.device) -> int:
    if device.type != "cuda":  # meta, and devices that nobody here has
        return 4 * SHARE_OF_GPU * CHUNK_ELEMENTS
    return int(torch.cuda.get_device_properties(device).total_memory)


# An operator of its own, so that torch.compile takes it as one step: unrolled over its chunks, it compiles for long.
@torch.library.custom_op("slm_ray::linear_cross_entropy", mutates_args=())
def _loss_and_gradients(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    shares: Tensor,
    ignored: int,
    dtype: torch.dtype,
    with_gradients: bool,
    is_fused: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The loss, its gradients with respect to hidden and weight (empty where they are not asked for), and the loss of
    the first targets alone. Each slope is made as if the shares of its row came to one, and no value of it is beyond
    one; the products are given what they come to.
    """
    wide = torch.promote_types(dtype, torch.float32)
    loss, of_first = torch.zeros((2,), dtype=wide, device=hidden.device).unbind()
    to_hidden = torch.empty_like(hidden) if with_gradients else hidden.new_empty(0)
    to_weight = torch.zeros_like(weight) if with_gradients else weight.new_empty(0)
    chunk = _fused() if is_fused else _step_by_step
    with torch.autocast(hidden.device.type, enabled=False):
        narrow = weight.to(dtype)
        for part in _parts(len(hidden), chunk_rows(len(hidden), len(weight), hidden.device)):
            x, counts = hidden[part].to(dtype), (targets[part] != ignored) & (shares > 0)  # (rows, d_model), (rows, K)
            own = shares.to(wide) * counts  # (rows, K)
            total = own.sum(1, keepdim=True)  # (rows, 1)
            logits = x @ narrow.t()  # (rows, vocab_size)
            nats, slope = chunk(logits, targets[part].clamp_min(0), own / total.where(total > 0, 1), wide)
            loss += (nats.where(counts, 0) * own).sum()
            of_first += nats[:, 0].where(counts[:, 0], 0).sum()
            if with_gradients:
                to_hidden[part] = (slope @ narrow) * total
                _add_product(to_weight, slope.t(), x * total)
    return loss, to_hidden, to_weight, of_first.clone()


def _parts(n_rows: int, at_a_time: int) -> Iterator[slice]:
    for first in range(0, n_rows, at_a_time):
        yield slice(first, first + at_a_time)


def _step_by_step(logits: Tensor, index: Tensor, shares: Tensor, wide: torch.dtype) -> tuple[Tensor, Tensor]:
    """Loss of every target, (rows, K), and the slope of every row, which takes the logits' place.

    logits: (rows, vocab_size); index: (rows, K); shares: the same, in `wide`, together one or nothing in a row.

    On a CPU a block of them at a time is taken through all its steps: what these pass on to each other stays in the
    cache of its core, and is not new memory, which costs as much again. No value depends on the block.
    """
    rows = max(1, BLOCK_ELEMENTS // logits.shape[1]) if logits.device.type == "cpu" else len(logits)
    nats = torch.empty_like(index, dtype=wide)  # (rows, K)
    for part in _parts(len(logits), rows):
        nats[part], logits[part] = _chunk(logits[part], index[part], shares[part], wide)
    return nats, logits


def fused_chunk(logits: Tensor, index: Tensor, shares: Tensor, wide: torch.dtype) -> tuple[Tensor, Tensor]:
    """The same for a compiler, which reads the logits twice and writes nothing but the slope, in the logits' type."""
    below = logits.to(wide)
    below = below - below.amax(1, keepdim=True)
    total = below.exp().sum(1, keepdim=True)  # (rows, 1), at least one
    nats = total.log() - below.gather(1, index)
    slope, ids = below.exp() / total, torch.arange(logits.shape[1], device=logits.device)
    for chosen, share in zip(index.unbind(1), shares.unbind(1), strict=True):
        slope = slope - (ids == chosen[:, None]) * share[:, None]  # (rows, vocab_size)
    return nats, slope.to(logits.dtype)


@functools.cache
def _fused() -> Callable[..., tuple[Tensor, Tensor]]:
    """Compiled here, not within the model's graph, in which every chunk would be compiled anew."""
    compiled: Callable[..., tuple[Tensor, Tensor]] = torch.compile(fused_chunk)
    return compiled


def _chunk(logits: Tensor, index: Tensor, shares: Tensor, wide: torch.dtype) -> tuple[Tensor, Tensor]:
    """Loss of every target, (rows, K), and each row's slope against the logits, (rows, vocab_size).

    The softmax of the target may vanish in fp32, that of the largest logit cannot: so the loss is taken from there.
    """
    slope = torch.softmax(logits, dim=1, dtype=wide)
    largest, chosen = logits.amax(1, keepdim=True).to(wide), logits.gather(1, index).to(wide)
    nats = largest - chosen - slope.amax(1, keepdim=True).log()
    for number in range(index.shape[1]):  # one after another: two targets of a row may be the same
        at = index[:, number, None]
        slope.scatter_(1, at, slope.gather(1, at) - shares[:, number, None])
    return nats, slope


def _add_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    """Add left @ right, multiplied in left's type. left: (vocab_size, rows), no value of it beyond one; right: (rows,
    d_model), in a type that holds it."""
    if total.dtype == left.dtype:
        total.addmm_(left, right.to(left.dtype))
    elif left.dtype == torch.float16:
        down = _below_overflow(right)
        total += (left @ (right * down).to(left.dtype)).float() / down
    else:
        total += left @ right.to(left.dtype)


def _below_overflow(x: Tensor) -> Tensor:
    """The largest power of two, at most one, by which x can be multiplied so that no sum over its rows of values that
    are no larger than these leaves fp16. The loss is a sum over many rows, and no loss scaling reaches into it.
    """
    largest = x.abs().amax().float() * len(x)
    return torch.exp2(-torch.ceil(torch.log2(largest / FP16_ROOM)).clamp_min(0))


@_loss_and_gradients.register_fake
def _shapes(
    hidden: Tensor,
    weight: Tensor,
    _targets: Tensor,
    _shares: Tensor,
    _ignored: int,
    dtype: torch.dtype,
    with_gradients: bool,
    _is_fused: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    loss, of_first = (hidden.new_empty((), dtype=torch.promote_types(dtype, torch.float32)) for _ in range(2))
    if not with_gradients:
        return loss, hidden.new_empty(0), weight.new_empty(0), of_first
    return loss, torch.empty_like(hidden), torch.empty_like(weight), of_first


def _keep_gradients(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:  # noqa: ARG001
    ctx.set_materialize_grads(False)  # else zeros as large as the weights are made for outputs that nobody uses
    ctx.save_for_backward(*output[1:3])


def _scale_gradients(ctx: Any, upstream: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
    if upstream is None:
        return (None,) * 8
    to_hidden, to_weight = ctx.saved_tensors
    return to_hidden * upstream, to_weight * upstream, None, None, None, None, None, None


_loss_and_gradients.register_autograd(_scale_gradients, setup_context=_keep_gradients)
