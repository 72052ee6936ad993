"""What a run or sweep that goes on keeps of its config, and what may change.

In: the config that it had, and what is given now. Out: the config to go on with, in which what is not given is as it
was; or each option that it keeps and that was given another value, with both values. Whatever `KEPT` does not name may
change: the length, the workers, intervals, rates, what is kept, tracked and registered.
"""

import dataclasses
from collections.abc import Collection, Mapping, Sequence
from typing import Any, TypeVar

from slm_ray.config.files import flatten, from_dict, load_config, load_values, presets
from slm_ray.config.options import option_names
from slm_ray.config.schema import TrainConfig
from slm_ray.errors import UserError

KEPT = (
    *("model", "optim.name", "teacher", "teacher_weight", "teacher_temperature", "mtp_weights", "mtp_until"),
    *("batch_size", "seed", "packing", "attention", "validation"),
)
"""Of a run: its shape, its optimizer, what it learns from, what decides which samples a step sees, and how it is
measured. Its data set too, which is compared by its fingerprint, not by its place."""
FORCED = ("batch_size", "seed")
"""Those that `--force` changes all the same."""

EARLIER: Mapping[str, Any] = {
    "packing": "windows", "attention": "all", "validation": "windows", "mtp_weights": [], "mtp_until": 0.6667,
}  # fmt: skip
"""What a saved config means that lacks these fields, as JSON has it: it was written before there was a choice."""

Config = TypeVar("Config", bound=TrainConfig)


def with_earlier_defaults(fields: Mapping[str, Any]) -> dict[str, Any]:
    """The saved fields of a run or sweep, with what those of earlier versions did without saying it."""
    return {**EARLIER, **fields}


def asks_to_resume(words: Sequence[str], default: bool) -> bool:
    """Whether command-line words ask to go on with a run; the last of `--resume` and `--no-resume` counts."""
    asked = [word == "--resume" for word in words if word in ("--resume", "--no-resume")]
    return asked[-1] if asked else default


def asks_for_help(words: Sequence[str]) -> bool:
    """Whether command-line words ask what can be given."""
    return not {"-h", "--help"}.isdisjoint(words)


def refuse_ignored(config: TrainConfig, words: Sequence[str]) -> None:
    """Raises: UserError for an option of the command line that changes nothing without another one, which it names."""
    given = option_names(words)
    if config.force and not config.resume:
        raise UserError("force goes with --resume: it replaces no run")
    if "--mtp-until" in given and not any(config.mtp_weights):
        raise UserError("mtp_until goes with --mtp-weights: without a weight above 0 only the next token is learned")
    for option in ("--teacher-weight", "--teacher-temperature"):
        if option in given and not config.teacher:
            raise UserError(f"{option[2:].replace('-', '_')} goes with --teacher: there is none to learn from")


def overlaid(was: Config, origin: str, kept: Collection[str]) -> Config:
    """The config of a run, under what a preset or file gives now; of what is kept, under all that it resolves to. Of
    the shape of given weights (`init_from`), under what it gives alone, as at the run's begin; so of what a run of
    before could not say (`EARLIER`), since the same words began it; a preset says nothing of it to such a run.

    Raises:
        UserError: no such preset or file, or both together are refused.
    """
    given = flatten(load_values(origin))
    if origin in presets():  # which may say more now than at the run's begin
        given = {name: value for name, value in given.items() if name not in EARLIER or not _is_earlier(was, name)}
    resolved = flatten(dataclasses.asdict(load_config(origin)))
    free = (*EARLIER, "model") if was.init_from else tuple(EARLIER)
    compared = {name: value for name, value in resolved.items() if is_one_of(name, kept) and not is_one_of(name, free)}
    return from_dict(type(was), nested(flatten(dataclasses.asdict(was)) | given | compared), origin)


def differences(was: Mapping[str, Any], now: Mapping[str, Any], kept: Collection[str]) -> dict[str, str]:
    """By its dotted name, `seed was 0 and is now 5` for each kept option whose value is another one.

    A vocabulary of size 0 is that of the data set, whatever it is.
    """
    before, after = as_saved(was), as_saved(now)
    changed = {name for name in after if is_one_of(name, kept) and name in before and before[name] != after[name]}
    if not (before.get("model.vocab_size") and after.get("model.vocab_size")):
        changed.discard("model.vocab_size")
    return {name: f"{name} was {before[name]} and is now {after[name]}" for name in after if name in changed}


def _is_earlier(config: TrainConfig, name: str) -> bool:
    return bool(as_saved({name: getattr(config, name)}) == as_saved({name: EARLIER[name]}))


def as_saved(fields: Mapping[str, Any]) -> dict[str, Any]:
    """By dotted names, as JSON gives them back: tuples are lists there."""
    return {name: list(value) if isinstance(value, tuple) else value for name, value in flatten(fields).items()}


def is_one_of(name: str, names: Collection[str]) -> bool:
    """Whether a dotted name is one of those, or lies below one: `model.d_ff` below `model`."""
    return any(f"{name}.".startswith(f"{one}.") for one in names)


def nested(flat: Mapping[str, Any]) -> dict[str, Any]:
    """What `flatten` was given."""
    values: dict[str, Any] = {}
    for name, value in flat.items():
        *folders, last = name.split(".")
        place = values
        for folder in folders:
            place = place.setdefault(folder, {})
        place[last] = value
    return values
