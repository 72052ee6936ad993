"""Processes that outlive the command which started them, ended later by another: those, and nobody else's.

In: a command line; later its number with the word of `process_identity`, which says when it began. Out: a process in a
session of its own, with a log; later its end, with all that it started. A number that another process has by now is
left alone. What lost its parent is found by a mark in its environment.
"""

import contextlib
import dataclasses
import subprocess
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import psutil

from slm_ray.locks.process_identity import is_gone, is_near, process_word

MARK, PART = "SLM_LOCAL_CLUSTER", "SLM_LOCAL_CLUSTER_PART"
"""Variables that all processes of one cluster have, with the cluster's id and the name of the part."""
GRACE_S = 20.0
_POLL_S = 0.1


@dataclasses.dataclass(frozen=True)
class Part:
    """One process that was started."""

    name: str
    pid: int
    process: str
    """What `process_identity` says of it."""
    at: str
    """Where it answers, in words."""


def start(name: str, at: str, command: Sequence[str], environment: Mapping[str, str], cwd: Path, log: Path) -> Part:
    """Start a command whose output goes to a log. Raises: psutil.NoSuchProcess when it ended at once."""
    with log.open("wb") as output:
        process = subprocess.Popen(
            command, cwd=cwd, env=environment, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT,
            start_new_session=True,
        )  # fmt: skip
    process.returncode = 0  # it is to outlive this one, which does not wait for it
    return Part(name, process.pid, process_word(process.pid), at)


def find(part: Part) -> psutil.Process | None:
    """Its process, where that is the one which was started and still runs."""
    if not is_near(part.process) or is_gone(part.process):
        return None
    with contextlib.suppress(psutil.NoSuchProcess):
        return psutil.Process(part.pid)
    return None


def marked(mark: str, part: str | None = None) -> set[psutil.Process]:
    """Processes of this user's with the mark, of one part or of all; those that wrote their title over their
    environment are not seen."""
    found = set()
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error, OSError):
            own = process.environ()
            if own.get(MARK) == mark and part in (None, own.get(PART)):
                found.add(process)
    return found


def stop(parts: Iterable[Part], mark: str, grace_s: float = GRACE_S) -> list[int]:
    """End the parts and all below them; what does not within the grace is killed. Returns numbers of what is left."""
    heads = {process for part in parts if (process := find(part))}
    below = set().union(*map(_below, heads))
    orphans = marked(mark) - below
    family = heads | below | orphans
    _each(heads | orphans, "terminate")
    left = _wait(family, grace_s)
    _each(left, "kill")
    late = marked(mark) | left  # born meanwhile
    _each(late, "kill")
    return sorted(process.pid for process in _wait(late, grace_s))


def lose(part: Part, mark: str) -> None:
    """Kill a part with all that it started at once, as a machine that is switched off."""
    head = find(part)
    family = marked(mark, part.name) | (set() if head is None else {head, *_below(head)})
    _each(family, "suspend")  # so that none starts another in its last moment
    family |= marked(mark, part.name)
    _each(family, "kill")
    _wait(family, GRACE_S)


def _below(process: psutil.Process) -> set[psutil.Process]:
    with contextlib.suppress(psutil.Error):
        return set(process.children(recursive=True))
    return set()


def _each(processes: Iterable[psutil.Process], do: str) -> None:
    for process in processes:
        with contextlib.suppress(psutil.Error):
            getattr(process, do)()  # psutil itself looks whether the number is another's by now


def _wait(processes: set[psutil.Process], seconds: float) -> set[psutil.Process]:
    """Those that are still there after so long. One that has ended and is not waited for by its parent is none."""
    deadline = time.monotonic() + seconds
    while (left := {process for process in processes if _runs(process)}) and time.monotonic() < deadline:
        time.sleep(_POLL_S)
    return left


def _runs(process: psutil.Process) -> bool:
    try:
        return bool(process.is_running() and process.status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False
