"""Which runner a command line names, told without Beam: `prepare.py` asks before it imports Beam.

In: words. Out: whether the pipeline runs on this machine.
"""

import argparse
from collections.abc import Sequence

_DIRECT = {"direct", "directrunner"}
"""Beam adds `Runner` where it is left out, and takes capitals for small letters."""


def is_direct(name: str | None) -> bool:
    """Whether this name of a runner, or none, means this machine; a word that is merely like it does not."""
    return name is None or name.lower() in _DIRECT


def asks_for_direct(words: Sequence[str]) -> bool:
    """Whether the runner of this command line is on this machine; of several, the last counts, as in Beam."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--runner", nargs="?")
    return is_direct(parser.parse_known_args(list(words))[0].runner)
