"""Causal attention as plain matrix products, block by block of queries: for CPUs, in bfloat16 or with dropout.

In: queries, keys and values. Out: what `scaled_dot_product_attention` gives, within rounding, with its gradients. The
decoder calls it where it is faster than torch's kernel, whose backward pass does not multiply in bfloat16: forward and
backward of 8 x 128 tokens took 22 ms in it on a core that does, and here 7 to 8 compiled and 10 to 14 eager.

Scores are products in fp32: rounded to bfloat16, which cost 2 ms less, large ones gave weights wrong by a tenth.

A block of queries is multiplied only with the keys up to its end, so a quarter and more of the plain form is left out.
The weights are kept for the backward pass, seq_len^2 a head: hence only short contexts. With dropout torch
has no kernel for a CPU, and keeps them too.
"""

import math

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

BLOCK = 64
"""Queries at a time."""
MAX_STEPS = 256
"""Each block is compiled for itself, and its weights are kept: longer contexts take torch's kernel."""
MAX_EAGER_STEPS = 128
"""With 256, eager and torch's kernel took the same time."""
MAX_DROPPED_STEPS = 512
"""With dropout. A layer of 1,024 was compiled for 72 s on a busy core, and for 44 s by torch's way."""


def suits(q: Tensor, k: Tensor, dropout: float = 0.0) -> bool:
    """Whether queries (B, H, T, d_head) and keys (B, H, S, d_head) should take this way."""
    if q.device.type != "cpu" or q.shape[2] != k.shape[2] or not torch.is_grad_enabled():
        return False
    if dropout:
        return q.shape[2] <= MAX_DROPPED_STEPS
    return q.dtype == torch.bfloat16 and q.shape[2] <= (MAX_STEPS if torch.compiler.is_compiling() else MAX_EAGER_STEPS)


def blockwise_attention(
    q: Tensor, k: Tensor, v: Tensor, *, scale: float | None, mask: Tensor | None = None, dropout: float = 0.0
) -> Tensor:
    """dropout(softmax(scale q k^T)) v, each query seeing the keys up to its own, as far as a mask allows.

    q: (B, H, T, d_head); k and v: (B, H or Hkv, T, d_head), each of Hkv shared by as many neighbouring heads of q.
    scale: 1 / sqrt(d_head) where it is None. mask: True where a query may look, broadcastable to (B, H, T, T). Scores
    and softmax are fp32, under autocast too. Returns (B, H, T, d_head).
    """
    shared = q.shape[1] // k.shape[1]
    if shared > 1:
        k, v = k.repeat_interleave(shared, dim=1), v.repeat_interleave(shared, dim=1)
    factor = 1 / math.sqrt(q.shape[-1]) if scale is None else scale
    positions = torch.arange(q.shape[2], device=q.device)
    parts = []
    with torch.autocast(q.device.type, enabled=False):  # it would multiply in bfloat16
        exact_q, exact_k = q.float(), k.float()
        for first in range(0, q.shape[2], BLOCK):
            rows, seen = slice(first, first + BLOCK), slice(0, first + BLOCK)
            scores = exact_q[:, :, rows] @ exact_k[:, :, seen].mT * factor  # (B, H, up to BLOCK, up to first + BLOCK)
            allowed = positions[rows, None] >= positions[seen]
            if mask is not None:
                allowed = allowed & mask[..., rows, seen]
            weights = torch.softmax(scores.masked_fill(~allowed, -math.inf), dim=-1).to(v.dtype)
            if dropout:
                weights = F.dropout(weights, dropout)
            parts.append(weights @ v[:, :, seen])
    return torch.cat(parts, dim=2)
