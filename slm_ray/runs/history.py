"""The run's own record of its metrics: `metrics.jsonl`, one line a step that was logged, and the plot drawn from it.

In: metrics from rank 0. Out: lines from which the driver shows progress, `loss.png` at the end.
"""

import contextlib
import errno
import hashlib
import json
import logging
import os
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

LOGGER = logging.getLogger(__name__)
_MISSING: Counter[Path] = Counter()
"""By record, the lines of this process that the disk did not take and that no message in it tells of."""


class Tail:
    """The lines of a growing file that were not given yet, each once; nothing is read a second time."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._inode, self._offset = 0, 0
        self._given: Counter[bytes] = Counter()
        self._here: Counter[bytes] = Counter()  # in the file as it is now

    def new_lines(self) -> list[dict[str, Any]]:
        """What was added. A file that was put in the place of the old one is read anew, but for lines that it kept."""
        try:
            with self._path.open("rb") as file:
                status = os.fstat(file.fileno())
                if status.st_ino != self._inode or status.st_size < self._offset:
                    self._inode, self._offset = status.st_ino, 0
                    self._here.clear()
                file.seek(self._offset)
                added = file.read()
        except FileNotFoundError:
            return []
        complete = added[: added.rfind(b"\n") + 1]
        self._offset += len(complete)
        found = []
        for line in complete.splitlines():
            digest = hashlib.blake2b(line, digest_size=8).digest()  # a long run has hundreds of thousands
            self._here[digest] += 1
            if self._here[digest] > self._given[digest]:
                self._given[digest] += 1
                with contextlib.suppress(ValueError):
                    found.append(json.loads(line))
        return found


@dataclass(frozen=True)
class History:
    """Lines of `{"step": ..., name: value, ...}` or `{"message": ..., "time": ...}` in a file."""

    path: Path

    def rewind(self, step: int) -> None:
        """Drop what was logged after `step`: a resumed run writes it again."""
        kept = [line for line in self.lines() if line.get("step", 0) <= step]
        partial = self.path.with_name(self.path.name + ".partial")
        partial.write_text("".join(json.dumps(line) + "\n" for line in kept), encoding="utf-8")
        partial.replace(self.path)

    def message(self, text: str) -> None:
        """Add a sentence, with the time."""
        self.append(_message(text))

    def append(self, line: Mapping[str, Any]) -> None:
        """Add one line. On a full disk the whole line is left out: a record is no reason to stop.

        It is a warning in this process's log. A driver reads the record alone, so the next line that there is room for
        has a message behind it that says how many are missing.
        """
        try:
            self._write(line)
        except OSError as error:
            _MISSING[self.path] += 1
            LOGGER.warning("%s misses a line: %s", self.path, error.strerror)
            return
        if missing := _MISSING[self.path]:
            text = f"{self.path.name} misses {missing} line(s) before this one: the disk did not take them"
            with contextlib.suppress(OSError):  # the next line has it behind it, then
                self._write(_message(text))
                del _MISSING[self.path]

    def _write(self, line: Mapping[str, Any]) -> None:
        content = (json.dumps(line) + "\n").encode()
        with self.path.open("ab", buffering=0) as file:
            before = file.tell()
            if file.write(content) != len(content):
                file.truncate(before)
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def lines(self) -> Iterator[dict[str, Any]]:
        """All complete lines, oldest first; a partial one is left out."""
        if not self.path.exists():
            return
        with self.path.open(encoding="utf-8") as file:
            for text in file:
                with contextlib.suppress(json.JSONDecodeError):
                    yield json.loads(text)

    def series(self, name: str) -> tuple[list[int], list[float]]:
        """Steps and values of one metric."""
        points = [(int(line["step"]), float(line[name])) for line in self.lines() if name in line]
        return [step for step, _ in points], [value for _, value in points]


def _message(text: str) -> dict[str, str]:
    return {"message": text, "time": datetime.now().astimezone().isoformat(timespec="seconds")}


def plot_loss(history: History, path: Path) -> None:
    """Draw training and validation loss over the steps into a PNG."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.subplots()
    for name, label, style in (("train_loss", "training", "-"), ("val_loss", "validation", "o-")):
        axes.plot(*history.series(name), style, label=label, linewidth=1.2, markersize=4)
    axes.set_xlabel("optimizer step")
    axes.set_ylabel("loss (nats per token)")
    axes.grid(visible=True, alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=120)
