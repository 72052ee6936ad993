"""Sweep learning rate, FF width or any other field of the config: `python tune/sweep.py`.

In: a prepared data set, a base configuration and what is varied. Every point is a real training run with a shortened
budget, a child of one MLflow run. Out: a table and pictures of the results, and, unless `--no-final`, the best point
trained at the full budget and registered as the champion. With `--resume` a sweep begins or, where there is one, goes
on: finished trials are kept, unfinished ones continue from their last checkpoint.
"""

if __name__ == "__main__":
    import sys
    from pathlib import Path

    sys.path[0] = str(Path(__file__).resolve().parents[1])  # the checkout, in place of this folder
    from slm_ray.cli.script import run

    run("tune.sweep")

import dataclasses
import logging
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from slm_ray import storage
from slm_ray.cli.command import command
from slm_ray.cli.script import set_default_environment
from slm_ray.cli.signals import ending_on_sigterm
from slm_ray.config.files import DEFAULT_PRESET, from_dict, load_config
from slm_ray.config.options import option_names, parse, take_option
from slm_ray.config.resuming import asks_for_help, asks_to_resume, refuse_ignored
from slm_ray.config.schema import TrainConfig
from slm_ray.errors import UserError
from slm_ray.train import describe
from tune.config import MODEL_NAME, SweepConfig, fields_set_twice, ignored_option, rates_around

FINAL_ONLY = ("workers", "register", "sample-prompt", "profile")
"""Options that trials have not."""


def parse_config(argv: Sequence[str] | None) -> SweepConfig:
    """Preset or file, then the options over it; with --resume, where there is a sweep, both over the sweep's own.

    Raises:
        UserError: no such preset or file, or it cannot be known whether there is a sweep.
    """
    origin, rest = take_option("config", "", sys.argv[1:] if argv is None else argv)
    about = f"{(__doc__ or '').splitlines()[0]} --config PRESET|FILE.yaml chooses the defaults ({DEFAULT_PRESET})."
    names = option_names(rest)
    preset = load_config(origin or DEFAULT_PRESET)
    own = {field.name: getattr(preset, field.name) for field in dataclasses.fields(TrainConfig)}
    base = SweepConfig(**(own | {"register": preset.register or MODEL_NAME, "lr": rates_around(preset.optim.lr)}))
    record = None
    if not asks_for_help(rest):
        base, record = _over_what_is_there(base, origin, rest)
    sweep = parse(SweepConfig, rest, prog="sweep.py", about=about, default=base)
    refuse_ignored(sweep, rest)
    from tune.record import space_to_sweep

    if set_twice := fields_set_twice(names, space_to_sweep(sweep, record), is_short=not sweep.space):
        raise UserError(set_twice)
    if needs := ignored_option(names, sweep):
        raise UserError(needs)
    if not sweep.final and (ignored := names & {f"--{name}" for name in FINAL_ONLY}):
        raise UserError(f"{min(ignored)} is of the final training, which --no-final leaves out")
    return sweep


def _over_what_is_there(
    base: SweepConfig, origin: str, words: Sequence[str]
) -> tuple[SweepConfig, Mapping[str, Any] | None]:
    """The defaults: those of the sweep that goes on, with its record, or of the model that a new one begins from."""
    from slm_ray.training.starting_point import begun_from
    from tune.record import config_to_resume, read_record

    record = None
    if asks_to_resume(words, base.resume):
        place = {name: take_option(name, getattr(base, name), words)[0] for name in ("output", "name")}
        from_dict(TrainConfig, place, "options")  # the others are checked over the sweep's own config
        base = config_to_resume(base, origin, **place)
        where = storage.storage_path(base.output)
        record = read_record(where / base.name) if base.name else None
    return (begun_from(base, origin, words), None) if record is None else (base, record)


@command
def main(argv: Sequence[str] | None = None) -> int:
    """Command line: parse, sweep, say what came out."""
    set_default_environment()
    logging.getLogger("ray.tune").setLevel(logging.CRITICAL)  # a trial's traceback goes to its log
    config = parse_config(argv)
    from slm_ray.evaluation.promotion import held_out_split, promote_on
    from tune.running import run_sweep

    with ending_on_sigterm():
        _, final = run_sweep(config)
    if final is not None:
        print(describe(final), flush=True)
        if final.version:
            reference = f"models:/{config.register}/{final.version}"
            print(f"model    {promote_on(reference, config.data, held_out_split(config.data), final.tracking_uri)}")
    return 0
