"""The fields of a `config.json` that anybody may have written: each is checked when it is read.

In: the JSON object of a file. Out: numbers, truths and words of the types and sizes that were asked for, or one line
that names the field, what it is and what is supported.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

from slm_ray.config.shape import ModelConfig
from slm_ray.errors import UserError, visible

MAX_SIZE = 2**24
"""Largest width, vocabulary or context that is believed; the weights' own shapes are compared afterwards."""
MAX_LAYERS = 2**12
_MAX_SHOWN = 60  # characters of a value that a message repeats


class HfFields:
    """A `config.json` by its fields. null is as good as absent, as in transformers."""

    def __init__(self, content: Mapping[str, Any], origin: str) -> None:
        """origin: what messages begin with, the file's path."""
        self.content = content
        self.origin = origin

    def get(self, name: str, default: Any = None) -> Any:
        """A value as it stands there."""
        value = self.content.get(name)
        return default if value is None else value

    def refuse(self, name: str, supported: str) -> NoReturn:
        """Raise a UserError about a field: `config.json: hidden_act is 'relu', and silu is supported`."""
        raise UserError(f"{self.origin}: {name} is {shown(self.content.get(name))}, and {supported} is supported")

    def size(self, name: str, default: int | None = None, most: int = MAX_SIZE) -> int:
        """A whole number from 1 to `most`. Raises: UserError, also where it is missing and has no default."""
        value = self.get(name, default)
        if value is None:
            raise UserError(f"{self.origin}: {name} is missing")
        if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= most:
            self.refuse(name, f"a whole number from 1 to {most:,}")
        return value

    def number(self, name: str, default: float, *, is_share: bool = False) -> float:
        """A finite number above 0; or a share, from 0 to below 1. Raises: UserError."""
        value = self.get(name, default)
        if isinstance(value, bool) or not isinstance(value, int | float) or not _is_finite(value):
            self.refuse(name, "a finite number")
        if is_share and not 0 <= value < 1:
            self.refuse(name, "a share from 0 to below 1")
        if not is_share and value <= 0:
            self.refuse(name, "a number above 0")
        return float(value)

    def truth(self, name: str, default: bool) -> bool:
        """True or false. Raises: UserError."""
        value = self.get(name, default)
        if not isinstance(value, bool):
            self.refuse(name, "true or false")
        return value

    def expect(self, name: str, *values: object) -> None:
        """Refuse anything but one of these; the first is what an absent field means. Raises: UserError."""
        value = self.get(name, values[0])
        if not any(value == one and isinstance(value, bool) == isinstance(one, bool) for one in values):
            self.refuse(name, " or ".join(json_word(one) for one in values))

    def refuse_other_names(self, names: Mapping[str, str]) -> None:
        """Refuse a second name of a field, which transformers prefers, that says something else: `{second: first}`.

        Raises:
            UserError: one does.
        """
        for second, first in names.items():
            if self.get(second) is not None and self.get(second) != self.get(first):
                self.refuse(second, f"that of {first} ({shown(self.get(first))})")

    def shape(self, **values: Any) -> ModelConfig:
        """The `ModelConfig` of these values. Raises: UserError where it refuses them."""
        try:
            return ModelConfig(**values)
        except ValueError as error:
            raise UserError(f"{self.origin}: {error}") from error


def layer_list(fields: HfFields, name: str, value: str) -> None:
    """Refuse a list of the blocks' kinds in which any is not `value`. Raises: UserError."""
    kinds = fields.get(name, [])
    if not isinstance(kinds, Sequence) or any(kind != value for kind in kinds):
        fields.refuse(name, f"{value} in every layer")


def json_word(value: object) -> str:
    """A value as JSON has it: `False` -> `false`, `None` -> `null`."""
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)


def shown(value: object) -> str:
    """What a message repeats of a value that a stranger wrote: short, and without characters that act."""
    try:
        text = visible(json_word(value) if value is None or isinstance(value, bool) else repr(value))
    except ValueError:  # Python writes out no number of more than 4,300 digits
        return "a very large number"
    return text if len(text) <= _MAX_SHOWN else f"{text[:_MAX_SHOWN]}..."


def _is_finite(value: float) -> bool:
    try:
        return math.isfinite(value)
    except OverflowError:  # a whole number beyond any float
        return False
