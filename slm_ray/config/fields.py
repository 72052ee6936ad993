"""Any field of a config by its dotted name.

In: a config dataclass, dotted names, plain values. Out: the types of its fields; a value as the field takes it; the
config with other values in some of them.
"""

import dataclasses
import typing
from collections.abc import Mapping
from typing import Any, TypeVar

from pydantic import TypeAdapter, ValidationError

from slm_ray.errors import UserError

Config = TypeVar("Config")


def field_types(kind: type, prefix: str = "") -> dict[str, Any]:
    """The type of each field that holds a plain value: `{"batch_size": int, "optim.lr": float, ...}`."""
    hints = typing.get_type_hints(kind)
    found: dict[str, Any] = {}
    for field in dataclasses.fields(kind):
        hint = hints[field.name]
        if dataclasses.is_dataclass(hint):
            found |= field_types(typing.cast("type", hint), f"{prefix}{field.name}.")
        else:
            found[f"{prefix}{field.name}"] = hint
    return found


def takes_truth(hint: Any) -> bool:
    """Whether a field of that type takes true and false: `bool`, or `bool | None`."""
    return hint is bool or bool in typing.get_args(hint)


def typed_value(hint: Any, value: Any, origin: str) -> Any:
    """A value as a field of that type takes it: `1e-3`, which YAML reads as a word, becomes a number.

    Raises:
        UserError: it is of another type; the message begins with `origin`.
    """
    if isinstance(value, bool) and not takes_truth(hint):
        raise UserError(f"{origin}: {value} is true or false, and something else is expected")
    try:
        return TypeAdapter(hint).validate_python(value)
    except ValidationError as error:
        raise UserError(f"{origin}: {value!r}: {error.errors()[0]['msg']}") from error


def replaced(config: Config, values: Mapping[str, Any]) -> Config:
    """The config with other values in the fields of these dotted names. Raises: ValueError when it refuses them."""
    own = {name: value for name, value in values.items() if "." not in name}
    for group in dict.fromkeys(name.partition(".")[0] for name in values if "." in name):
        inner = {name.partition(".")[2]: value for name, value in values.items() if name.startswith(f"{group}.")}
        own[group] = replaced(getattr(config, group), inner)
    return dataclasses.replace(config, **own)  # type: ignore[type-var]
