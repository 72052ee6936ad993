"""Rows of several texts: what each token may see, where it is its own text alone.

In: how far each token lies behind the beginning of its text. Out: a mask for attention.
"""

import torch
from torch import Tensor


def own_text(places: Tensor) -> Tensor:
    """True where a query may look: from its own place back to the beginning of its text.

    places: (B, T), 0 where a text begins, one more at each token of it. Returns (B, 1, T, T).
    [0, 1, 0] -> rows [1 0 0], [1 1 0], [0 0 1]
    """
    order = torch.arange(places.shape[1], device=places.device)  # (T,)
    behind = order[:, None] - order  # (T, T)
    return ((behind >= 0) & (behind <= places[..., None]))[:, None]  # (B, 1, T, T)
