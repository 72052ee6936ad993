"""Which process of which machine wrote something, and whether it is gone for certain.

In: this process; later a word that one like it left. Out: that word; True only where the process cannot be alive.
"""

import os
import socket
from pathlib import Path

PARTS = 4


def own_process() -> str:
    """This process in one word: machine, its start and its namespace of processes, number, and when it began."""
    return process_word(os.getpid())


def process_word(number: int) -> str:
    """The same of any process of this machine. Raises: psutil.NoSuchProcess when there is none of that number."""
    return f"{socket.gethostname()} {_process_space()} {number} {_began(number)}"


def is_near(process: str) -> bool:
    """Whether it is, or was, a process of this machine since its start, and of this namespace: whose locks we see."""
    parts = process.split(" ")
    return len(parts) == PARTS and parts[:2] == [socket.gethostname(), _process_space()]


def is_gone(process: str) -> bool:
    """Whether the process that `own_process` named has ended; False where that cannot be seen from here."""
    import psutil

    if not is_near(process):
        return False
    parts = process.split(" ")
    try:
        number = int(parts[2])
        found = psutil.Process(number)
        return _began(number) != parts[3] or found.status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True
    except (psutil.Error, OSError, ValueError, OverflowError):
        return False


def _began(number: int) -> str:
    """When a process began, in ticks since the machine's start, which setting its clock does not move."""
    import psutil

    try:
        fields = Path(f"/proc/{number}/stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()
        return fields[19]  # starttime, the 22nd of all
    except (OSError, IndexError):  # not Linux, or gone
        return f"{psutil.Process(number).create_time():.0f}"


def _process_space() -> str:
    """What tells two containers of one name apart, and a machine before and after it was started again."""
    try:
        start = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        return f"{start}/{Path('/proc/self/ns/pid').stat().st_ino}"
    except OSError:  # not Linux
        return "-"
