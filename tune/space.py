"""What a sweep varies: fields of the config by their dotted names, and which values each may take.

In: a YAML file (`--space`), or the short form `--lr ... --d-ff ...`. Out: a `Space`, each value of which the config's
field takes.

    optim.lr: {log_range: [3e-4, 3e-3]}
    model.d_ff: [512, 704, 1024]
    model.n_layers: {int_range: [2, 6]}
    optim.weight_decay: {range: [0, 0.2]}
"""

import dataclasses
import itertools
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from slm_ray.config.fields import field_types, typed_value
from slm_ray.config.files import load_values
from slm_ray.config.resuming import is_one_of
from slm_ray.config.schema import TrainConfig
from slm_ray.errors import UserError

VARIABLE = ("model", "optim", "batch_size", "accumulation_steps", "precision")
"""What may differ between the trials of a sweep; all else would compare what cannot be compared, or is no option of a
model."""
FIXED = ("model.vocab_size",)
"""Of these, what the data set decides."""
KINDS = {"range": (False, False), "log_range": (True, False), "int_range": (False, True), "log_int_range": (True, True)}
"""Words of a space file: whether each is spaced by its logarithm, and whether it is of whole numbers."""
MAX_POINTS = 10_000
"""Of a grid."""
MAX_WHOLE = 2**53
"""In an int_range: the largest number to which every whole one is exact for all that draws and counts them."""

Point = Mapping[str, Any]
"""One value for each field that is varied, by its dotted name."""


@dataclasses.dataclass(frozen=True)
class Choices:
    """A field that takes one of several values."""

    values: tuple[Any, ...]

    @property
    def ends(self) -> tuple[Any, ...]:
        """Values that stand for all."""
        return self.values

    @property
    def plain(self) -> Any:
        """As a space file says it."""
        return list(self.values)


@dataclasses.dataclass(frozen=True)
class Range:
    """A field that takes any number from `low` to `high`, both included."""

    low: float
    high: float
    is_log: bool = False
    is_integer: bool = False
    step: int = 0  # of whole numbers: only its multiples

    @property
    def ends(self) -> tuple[Any, ...]:
        """Values that stand for all."""
        return (self.low, self.high)

    @property
    def plain(self) -> Any:
        """As a space file says it."""
        kind = next(name for name, flags in KINDS.items() if flags == (self.is_log, self.is_integer))
        return {kind: [self.low, self.high]} | ({"step": self.step} if self.step else {})


Space = Mapping[str, Choices | Range]


def short_name(field: str) -> str:
    """How a table calls a field: `short_name("model.d_ff")` is `"d_ff"`. No two fields of a space share one."""
    return field.rpartition(".")[2]


def load_space(path: str) -> Space:
    """Read a space file.

    Raises:
        UserError: no such file, an unknown field or one that must not vary, or values that its field does not take.
    """
    if not Path(path).is_file():
        raise UserError(f"there is no file {path}: space is a YAML file of fields and their values")
    return make_space(load_values(str(Path(path).absolute())), path)


def make_space(values: Mapping[str, Any], origin: str) -> Space:
    """Out of what a space file holds, `origin`. Raises: UserError, as `load_space` does."""
    types = field_types(TrainConfig)
    if not values:
        raise UserError(f"{origin}: the space is empty: give at least one field with its values")
    space = {}
    for field, given in values.items():
        where = f"{origin}: {field}"
        if field not in types:
            raise UserError(f"{where}: unknown field: give its dotted name, as in optim.lr")
        if field in FIXED or not is_one_of(field, VARIABLE):
            raise UserError(f"{where}: this must not vary between the trials of a sweep")
        space[field] = _domain(given, types[field], where)
    return space


def _domain(given: Any, hint: Any, where: str) -> Choices | Range:
    if isinstance(given, list):
        if not given:
            raise UserError(f"{where}: an empty list: give at least one value")
        return Choices(tuple(dict.fromkeys(typed_value(hint, value, where) for value in given)))
    if not isinstance(given, Mapping):
        raise UserError(f"{where}: expected a list of values, or one of {', '.join(KINDS)} with two numbers")
    kind = next((name for name in given if name in KINDS), None)
    if kind is None or set(given) - {kind, "step"}:
        raise UserError(f"{where}: expected one of {', '.join(KINDS)} (int_range with a step too)")
    ends = given[kind]
    if not isinstance(ends, list) or len(ends) != 2:
        raise UserError(f"{where}: {kind} takes two numbers, [LOW, HIGH]")
    is_log, is_integer = KINDS[kind]
    low, high = (typed_value(int if is_integer else float, end, where) for end in ends)
    for end in (low, high):
        typed_value(hint, end, where)
    if hint is int and not is_integer:  # most of what lies between is none of the field's
        raise UserError(f"{where}: this field takes whole numbers: give an int_range, or a list")
    if is_integer and max(abs(low), abs(high)) > MAX_WHOLE:
        raise UserError(f"{where}: {kind} goes to {MAX_WHOLE:,} at most")
    made = Range(low, high, is_log, is_integer, _step(given, kind, where))
    _check_range(made, where)
    return made


def _step(given: Mapping[str, Any], kind: str, where: str) -> int:
    if "step" not in given:
        return 0
    step: int = typed_value(int, given["step"], where)
    if kind != "int_range" or step < 1:
        raise UserError(f"{where}: step goes with int_range, and is at least 1")
    return step


def _check_range(made: Range, where: str) -> None:
    low, high = made.low, made.high
    if not (math.isfinite(low) and math.isfinite(high)):
        raise UserError(f"{where}: a range has two finite ends")
    if low > high:
        raise UserError(f"{where}: the range is reversed: {low:g} is above {high:g}")
    if low == high:
        raise UserError(f"{where}: the range is empty: both ends are {low:g}; give a list of one value")
    if made.is_log and low <= 0:
        raise UserError(f"{where}: a log range begins above 0, not at {low:g}")
    if made.step and (low % made.step or high % made.step):
        raise UserError(f"{where}: both ends must be multiples of step ({made.step})")


def grid(space: Space) -> list[Point]:
    """Every combination, in order.

    Raises:
        UserError: a range of numbers that are not whole has no end of values, or there are too many combinations.
    """
    values = {field: _all_values(domain) for field, domain in space.items()}
    if endless := [field for field, found in values.items() if found is None]:
        raise UserError(
            f"{endless[0]} is a continuous range, of which there is no grid: give a list, or --search random"
        )
    if (count := math.prod(len(found or ()) for found in values.values())) > MAX_POINTS:
        raise UserError(f"a grid of {count:,} points, and at most {MAX_POINTS:,} are possible: try --search random")
    return list(_combinations({field: found or () for field, found in values.items()}))


def n_points(space: Space) -> float:
    """How many points there are; infinite with a continuous range."""
    counts = [math.inf if (found := _all_values(domain)) is None else len(found) for domain in space.values()]
    return math.prod(counts)


def corners(space: Space) -> Iterator[Point]:
    """Combinations of choices and of the ends of ranges."""
    return _combinations({field: domain.ends for field, domain in space.items()})


def _combinations(values: Mapping[str, Any]) -> Iterator[Point]:
    for combination in itertools.product(*values.values()):
        yield dict(zip(values, combination, strict=True))


def _all_values(domain: Choices | Range) -> tuple[Any, ...] | range | None:
    if isinstance(domain, Choices):
        return domain.values
    return range(int(domain.low), int(domain.high) + 1, domain.step or 1) if domain.is_integer else None
