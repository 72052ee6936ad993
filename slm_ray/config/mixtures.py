"""Several data sets with weights in the place of one: `--data A=0.7 B=0.3`.

In: the words of a command line, or the field `data` of a config. Out: one value for that field; its parts; what a
record says of them.
"""

import dataclasses
import json
import math
import shlex
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path, PurePosixPath

from slm_ray.errors import UserError, without_secrets

OPTION = "--data"
MAX_TAG = 8000
"""Letters that MLflow has room for in a tag."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataShare:
    """A data set of a mixture, as records name it."""

    name: str
    """Of `part_names`."""
    fingerprint: str
    weight: float
    """Its share of the samples, as it is kept: all of a mixture have the sum 1."""


Mixtures = Mapping[str, Sequence[DataShare]]
"""The data sets of each mixture, by the mixture's fingerprint."""


def mixtures_text(mixtures: Mixtures) -> str:
    """As a tag's value, in JSON; of more data sets than a tag has room for their number alone."""
    plain = {mark: [dataclasses.asdict(one) for one in shares] for mark, shares in mixtures.items()}
    text = json.dumps(plain, ensure_ascii=False)
    return text if len(text) <= MAX_TAG else json.dumps({mark: len(shares) for mark, shares in mixtures.items()})


def joined_data(words: Sequence[str]) -> list[str]:
    """Words in which `--data A=0.7 B=0.3`, or `--data A=0.7 --data B=0.3`, is one option with one value."""
    kept: list[str] = []
    found: list[str] = []
    place = -1
    is_behind = False
    for word in words:
        if word == OPTION or word.startswith(f"{OPTION}="):
            place = len(kept) if place < 0 else place
            found += [word.removeprefix(f"{OPTION}=")] if word != OPTION else []
            is_behind = word == OPTION or "=" in found[-1]
        elif is_behind and not word.startswith("-"):
            found.append(word)
        else:
            is_behind = False
            kept.append(word)
    if len(found) < 2 or not any("=" in word for word in found):
        return list(words)
    return [*kept[:place], OPTION, shlex.join(found), *kept[place:]]


def shares(weights: Sequence[float]) -> list[float]:
    """Weights with the sum 1, however large they are.

    [2, 1, 1] -> [0.5, 0.25, 0.25]
    """
    largest = max(weights)
    total = math.fsum(weight / largest for weight in weights)
    return [weight / largest / total for weight in weights]


def parts_of(data: str) -> list[tuple[str, float]]:
    """Data sets and weights that a field `data` names; none where it names one data set.

    Raises:
        UserError: it names several, and not each with a weight above 0, or one of them twice.
    """
    words = _words(data)
    if len(words) < 2 or not any("=" in word for word in words) or _is_there(data):
        return []
    parts = []
    for word in words:
        folder, _, text = word.rpartition("=")
        try:
            weight = float(text)
        except ValueError:
            weight = math.nan
        if not folder or not 0 < weight < math.inf:
            raise UserError(f"data: {word} must be FOLDER=WEIGHT with a weight above 0, as in --data A=0.7 B=0.3")
        parts.append((folder, weight))
    places = [Path(folder).expanduser().absolute() if "://" not in folder else folder for folder, _ in parts]
    for number, place in enumerate(places):
        if place in places[:number]:
            raise UserError(f"data: {parts[number][0]} is named twice: give each data set once, with its weight")
    return parts


def _words(data: str) -> list[str]:
    try:
        return shlex.split(data)
    except ValueError:  # an apostrophe in a path
        return [data]


def _is_there(data: str) -> bool:
    try:
        return Path(data).exists()
    except (OSError, ValueError):
        return False


def part_names(folders: Sequence[str]) -> list[str]:
    """What the parts of a mixture are called: by their last name; with a number behind it where several have that one.
    No password or query of an address is in it.

    [x/s, y/s, t] -> [s-1, s-2, t]
    """
    public = [without_secrets(folder) for folder in folders]
    names = [PurePosixPath(folder.rstrip("/")).name or folder for folder in public]
    taken, found = set(names), list[str]()
    for place, name in enumerate(names):
        number = names[:place].count(name) + 1
        while names.count(name) > 1 and f"{name}-{number}" in taken:
            number += 1
        found.append(f"{name}-{number}" if names.count(name) > 1 else name)
        taken.add(found[-1])
    return found


def named_data(data: str) -> str:
    """A field `data` with the names of its places alone, those of `part_names` in a mixture."""
    try:
        parts = parts_of(data)
    except UserError:
        parts = []
    if not parts:
        return PurePosixPath(without_secrets(data)).name
    names = part_names([folder for folder, _ in parts])
    return _joined(names, [weight for _, weight in parts])


def _joined(folders: Sequence[str], weights: Sequence[float]) -> str:
    """The field `data` of a mixture; a weight keeps every digit."""
    return shlex.join(f"{folder}={repr(weight).removesuffix('.0')}" for folder, weight in zip(folders, weights))


def each_place(data: str, change: Callable[[str], str]) -> str:
    """A field `data` with each of its places changed."""
    try:
        parts = parts_of(data)
    except UserError:  # said where it is opened
        return data
    if not parts:
        return change(data)
    return _joined([change(folder) for folder, _ in parts], [weight for _, weight in parts])
