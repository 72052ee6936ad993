"""Which process of which machine wrote something, and whether it is gone for certain.

In: this process; later a word that one like it left. Out: that word; True only where the process cannot be alive.
"""

import os
import socket
from pathlib import Path

PARTS = 4


def own_process() -> str:
    """This process in one word: machine, its start and its namespace of processes, number, and when it began."""
    import psutil

    return f"{socket.gethostname()} {_process_space()} {os.getpid()} {psutil.Process().create_time():.2f}"


def is_gone(process: str) -> bool:
    """Whether the process that `own_process` named has ended; False where that cannot be seen from here."""
    import psutil

    parts = process.split(" ")
    if len(parts) != PARTS or parts[:2] != [socket.gethostname(), _process_space()]:
        return False
    try:
        found = psutil.Process(int(parts[2]))
        return bool(abs(found.create_time() - float(parts[3])) > 1 or found.status() == psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return True
    except (psutil.Error, OSError, ValueError, OverflowError):
        return False


def _process_space() -> str:
    """What tells two containers of one name apart, and a machine before and after it was started again."""
    try:
        start = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        return f"{start}/{Path('/proc/self/ns/pid').stat().st_ino}"
    except OSError:  # not Linux
        return "-"
