"""Where a process and those below it listen."""

import psutil


def addresses_of(pid: int) -> set[str]:
    """The addresses, but not those of training workers: torch's rendezvous binds to all, and cannot do otherwise."""
    process = psutil.Process(pid)
    found = set()
    for one in (process, *process.children(recursive=True)):
        try:
            if "RayTrainWorker" not in " ".join(one.cmdline()):
                found |= {c.laddr.ip for c in one.net_connections() if c.status == psutil.CONN_LISTEN}
        except psutil.NoSuchProcess:
            continue
    return {ip.removeprefix("::ffff:") for ip in found}
