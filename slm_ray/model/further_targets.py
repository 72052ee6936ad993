"""Targets beyond the next token, for training by multi-token prediction.

In: the targets of a batch. Out: for each place the next token and those after it. Source: Gloeckle et al., "Better &
Faster Large Language Models via Multi-token Prediction" (arXiv:2404.19737), there with a head for each token ahead;
here all are asked of the same logits, so the model has no weights for it and its shape stays as it is.
"""

import torch
from torch import Tensor

from slm_ray.config.schema import IGNORED_TARGET


def further_targets(targets: Tensor, further: int, places: Tensor | None = None) -> Tensor:
    """The next token of every place and the `further` ones after it: (B, T, 1 + further).

    targets: (B, T) ids. places: (B, T) as `Decoder.forward` takes them. IGNORED_TARGET stands where a row ends before
    the token, or, with places, where another text begins before it.
    [5, 6, 7], 1 -> [[5, 6], [6, 7], [7, ignored]]
    """
    columns = [targets]
    for distance in range(1, further + 1):
        ahead = torch.full_like(targets, IGNORED_TARGET)
        ahead[:, :-distance] = targets[:, distance:]
        if places is not None:
            is_own = places[:, distance:] == places[:, :-distance] + distance
            ahead[:, :-distance] = ahead[:, :-distance].where(is_own, IGNORED_TARGET)
        columns.append(ahead)
    return torch.stack(columns, dim=-1)
