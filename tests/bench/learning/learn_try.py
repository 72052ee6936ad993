"""One try of the bench of learning: what it changes, of which other.

`changes` are fields of the config; `extras`, for `learn_extras`, what no field says; `data` is how its data set is
called, or ends.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

BASE = "base"


@dataclasses.dataclass(frozen=True)
class Try:
    """A change of the base, or of another try."""

    changes: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    extras: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    parent: str = BASE
    axis: str = ""
    """Of tries of one axis at most one is combined with others; an empty axis is never combined."""
    data: str = ""
    share: float = 1.0
    """Of an epoch, with the whole schedule within it."""


def parts(changes: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """The fields of the optimizer, which begin with `optim_`, and those of the model."""
    optim = {name.removeprefix("optim_"): value for name, value in changes.items() if name.startswith("optim_")}
    return {"optim": optim, "model": {name: value for name, value in changes.items() if not name.startswith("optim_")}}
