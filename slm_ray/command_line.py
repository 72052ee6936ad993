"""Dataclasses as command lines: every field an option, nested ones by their dotted name.

In: a config dataclass and `argv`. Out: the config. tyro makes the options, their help (from the text under each field)
and the errors; `--max-steps` and `--max_steps` are the same option.
"""

import argparse
import os
from collections.abc import Sequence
from typing import TypeVar

import tyro

Config = TypeVar("Config")


def quiet_environment() -> None:
    """Entry points send no telemetry and leave Ray's own tables and start-up warnings out; what the user set stays."""
    for name, value in {
        "RAY_USAGE_STATS_ENABLED": "0",
        "MLFLOW_DISABLE_TELEMETRY": "true",
        "RAY_AIR_NEW_OUTPUT": "0",  # Tune's tables, which verbose=0 does not turn off
        "RAY_worker_maximum_startup_concurrency": "8",  # a trial starts a dozen small actors on two cores
    }.items():
        os.environ.setdefault(name, value)


def parse(kind: type[Config], argv: Sequence[str] | None, *, prog: str, about: str, default: Config) -> Config:
    """Parse options over a default config. A mistake prints what was wrong and exits with code 2."""
    return tyro.cli(kind, args=argv, prog=prog, description=about, default=default, compact_help=False)


def take_option(name: str, default: str, argv: Sequence[str]) -> tuple[str, list[str]]:
    """Take one `--name VALUE` out of the arguments before the others are parsed. Returns its value and the rest."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument(f"--{name}", default=default)
    known, rest = parser.parse_known_args(list(argv))
    return str(getattr(known, name)), rest
