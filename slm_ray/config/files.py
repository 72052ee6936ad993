"""Configs out of presets, YAML files and checkpoints.

In: a preset's name, a YAML file, or a dictionary out of a checkpoint. Out: a config dataclass, its names and types
checked; or one clear line on what is wrong with it.
"""

import dataclasses
import typing
from collections.abc import Mapping
from importlib import resources
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import TypeAdapter, ValidationError

from slm_ray.config.fields import takes_truth
from slm_ray.config.schema import TrainConfig
from slm_ray.errors import UserError

DEFAULT_PRESET = "story-5m"

Config = TypeVar("Config")


class _OneValueEach(yaml.SafeLoader):
    """YAML in which a field that is given twice is an error, not silently the second value."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """As a SafeLoader does it. Raises: ConstructorError on a field that is there twice."""
        names: set[str] = set()
        for key, _ in node.value:
            if (name := str(key.value)) in names:
                raise yaml.constructor.ConstructorError(None, None, f"{name} is there twice", key.start_mark)
            names.add(name)
        return super().construct_mapping(node, deep)


def from_dict(kind: type[Config], values: Mapping[str, Any], origin: str) -> Config:
    """Build a config dataclass from nested plain values, checking names and types.

    Raises:
        UserError: an unknown field, a wrong type or a refused value; the message names `origin` and the field.
    """
    _refuse_truth(kind, values, origin)
    try:
        return TypeAdapter(kind).validate_python(dict(values))
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(str(part) for part in first["loc"])
        reason = "unknown field" if first["type"] == "unexpected_keyword_argument" else first["msg"]
        raise UserError(f"{origin}: {field + ': ' if field else ''}{reason}") from error


def _refuse_truth(kind: type, values: Mapping[str, Any], origin: str) -> None:
    """Python takes true for 1; and YAML takes a bare `on` for true."""
    for name, its_kind in typing.get_type_hints(kind).items():
        value = values.get(name)
        several = value if isinstance(value, list) else [value]
        if isinstance(value, Mapping) and dataclasses.is_dataclass(its_kind):
            _refuse_truth(typing.cast(type, its_kind), value, f"{origin}: {name}")
        elif any(isinstance(one, bool) for one in several) and not takes_truth(its_kind):
            said = "is true or false (YAML's on and off are, without quotes), and something else is expected"
            raise UserError(f"{origin}: {name} {said}")


def presets() -> list[str]:
    """Names of the presets that come with the package, sorted."""
    folder = resources.files("slm_ray") / "presets"
    return sorted(Path(entry.name).stem for entry in folder.iterdir() if entry.name.endswith(".yaml"))


def load_config(name_or_file: str) -> TrainConfig:
    """Read a preset by its name, or a YAML file by its path.

    Raises:
        UserError: no such preset or file, or its content is refused.
    """
    return from_dict(TrainConfig, load_values(name_or_file), name_or_file)


def load_values(name_or_file: str) -> dict[str, Any]:
    """The fields that a preset or a YAML file gives, as they stand there.

    Raises:
        UserError: no such preset or file, or it holds no fields with values.
    """
    if name_or_file in presets():
        text = (resources.files("slm_ray") / "presets" / f"{name_or_file}.yaml").read_text(encoding="utf-8")
    elif Path(name_or_file).is_file():
        text = Path(name_or_file).read_text(encoding="utf-8", errors="replace")
    else:
        raise UserError(
            f"no preset and no file {name_or_file!r}: presets are {', '.join(presets())}, a file ends in .yaml"
        )
    try:
        values = _OneValueEach(text).get_single_data() or {}
    except RecursionError as error:
        raise UserError(f"{name_or_file} cannot be read as YAML: it is nested too deeply") from error
    except yaml.YAMLError as error:
        raise UserError(f"{name_or_file} cannot be read as YAML: {' '.join(str(error).split())}") from error
    if not isinstance(values, dict):
        raise UserError(f"{name_or_file}: expected fields with values, got a {type(values).__name__}")
    return values


def flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested fields by their dotted names: `{"model": {"d_ff": 512}}` -> `{"model.d_ff": 512}`."""
    flat: dict[str, Any] = {}
    for name, value in values.items():
        flat |= flatten(value, f"{prefix}{name}.") if isinstance(value, Mapping) else {f"{prefix}{name}": value}
    return flat
