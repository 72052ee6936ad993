"""Runs of `slm_ray/train.py` itself, as a newcomer starts them, for the benches of learning that need whole runs.

In: a folder, options. Out: what the run wrote into `metrics.jsonl`, and the seconds that it took.
"""

import dataclasses
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from slm_ray.config.options import option_names

ROOT = Path(__file__).resolve().parents[3]
WARM_WINDOWS = 2
"""The first lines of progress, with the compiler's time in them."""


@dataclasses.dataclass(frozen=True)
class Run:
    """A run that has ended."""

    folder: Path
    lines: Sequence[dict[str, Any]]
    seconds: float
    """In all, from the command to its end."""

    @property
    def best(self) -> dict[str, Any]:
        """The validation with the lowest loss, by the fair measure: the run's `best`."""
        judged = [line for line in self.lines if "val_bits_per_byte" in line]
        return min(judged, key=lambda line: line["val_bits_per_byte"])

    @property
    def tokens_per_s(self) -> float:
        """The median over the lines of progress; of a run with a few lines, over all."""
        return statistics.median(line["tokens_per_s"] for line in self._progress[WARM_WINDOWS:] or self._progress)

    @property
    def steps(self) -> int:
        """All of them."""
        return int(self._progress[-1]["step"])

    @property
    def tokens(self) -> int:
        """Learned from."""
        return int(self._progress[-1]["tokens"])

    @property
    def _progress(self) -> list[dict[str, Any]]:
        return [line for line in self.lines if "tokens_per_s" in line]


def refuse(options: Sequence[str], *own: str) -> None:
    """Leave where options of `train.py` would change what the bench itself decides. Raises: SystemExit, 2."""
    given = option_names(options)
    for name in (*own, "--config", "--data", "--output", "--name", "--resume", "--max-steps", "--tracking-uri"):
        if name in given:
            sys.stderr.write(f"error: {name} is not for behind --: the bench decides it\n")
            raise SystemExit(2)


def train(folder: Path, *options: str) -> Run:
    """Train into a folder; progress goes to the terminal. Raises: CalledProcessError where the run fails."""
    own = ("--compile", "on", "--tracking-uri", "none", "--output", str(folder.parent), "--name", folder.name)
    began = time.time()
    subprocess.run([sys.executable, str(ROOT / "slm_ray" / "train.py"), *own, *options], check=True, cwd=ROOT)
    seconds = time.time() - began
    text = (folder / "metrics.jsonl").read_text(encoding="utf-8")
    return Run(folder, [json.loads(line) for line in text.splitlines()], seconds)
