"""Which checkpoints of a run are kept."""

import math
from collections.abc import Mapping


def steps_to_keep(losses: Mapping[int, float], *, keep: int, keep_best: int) -> set[int]:
    """Which checkpoints are kept, by their steps: the newest `keep`, and the `keep_best` of lowest validation loss.

    `losses` gives each step's validation loss, infinite where it was not validated: those are among the newest only.
    `retained({4: 2.0, 8: 3.0, 12: inf}, keep=1, keep_best=1) -> {4, 12}`.
    """
    ranked = sorted((step for step, loss in losses.items() if math.isfinite(loss)), key=lambda step: losses[step])
    return {*sorted(losses)[-keep:], *ranked[:keep_best]}
