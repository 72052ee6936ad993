"""Early stopping: which trials go on behind a rung.

In: the validations of trials at a rung, all of a batch. Out: those that train up to the next rung. This is successive
halving (Jamieson & Talwalkar, arXiv:1502.07943) with the rungs of ASHA (Li et al., arXiv:1810.05934), decided when all
of a batch have arrived, not one by one: ASHA's decisions depend on who arrives first, and these on the values alone,
so the same seed gives the same ranking. Waiting costs little, for a trial that pauses lies on the disk and holds no
worker.
"""

import math
from collections.abc import Mapping


def rung_steps(max_steps: int, interval: int, factor: int) -> tuple[int, ...]:
    """Steps at which trials are compared, the last of them the end of a trial.

    `rung_steps(200, 23, 3)` is `(23, 69, 200)`: each is a step with a validation.
    """
    rungs = []
    step = interval
    while step < max_steps:
        rungs.append(step)
        step *= factor
    return (*rungs, max_steps)


def first_rung(max_steps: int, factor: int, eval_interval: int) -> int:
    """Steps up to the first rung: a share of 1 / factor^2 of a trial, as a multiple of its validation interval."""
    least = -(-max_steps // factor**2)
    return -(-least // eval_interval) * eval_interval if eval_interval else least


def promoted(arrived: Mapping[str, float], earlier: Mapping[str, float], factor: int) -> list[str]:
    """Those of a batch that go on: among the best 1 / factor of all that ever came to the rung, at least one.

    Values are infinite for trials that came to no value there; those never go on. Of equal ones the older is better.

    `promoted({"a": 2.0, "b": 1.0, "c": 3.0}, {}, 3)` is `["b"]`.
    """
    everyone = {**earlier, **arrived}
    n_promoted = max(1, len(everyone) // factor)
    best = sorted(everyone, key=lambda name: everyone[name])[:n_promoted]  # stable
    return [name for name in arrived if name in best and math.isfinite(everyone[name])]
