"""A cluster on one machine: `infra/local_cluster.sh up`, `status`, `down`.

In: nothing but this checkout and free ports. Out: a head and worker nodes of Ray, each with an address of its own in
127.0.0.0/8 and closed with a token, an MLflow server and an object store; the user's commands go there by
`ray job submit`, with data and runs at `s3://`. All of it is known by one folder, and `down` ends just that.

The object store (moto's server) keeps everything in memory: what lies there ends with it.
"""

if __name__ == "__main__":
    import sys
    from pathlib import Path

    sys.path[0] = str(Path(__file__).resolve().parents[1])  # the checkout, in place of this folder
    from slm_ray.cli.script import run

    run("infra.local_cluster")

import argparse
import contextlib
import dataclasses
import errno
import importlib.util
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import psutil

from infra.cluster import answers, processes, state
from infra.cluster.parts import LOOPBACK, MAX_WORKERS, ROOT, Layout
from infra.cluster.state import LOGS, State
from slm_ray.cli.command import command
from slm_ray.cli.ports import check_port
from slm_ray.cli.signals import ending_on_sigterm
from slm_ray.errors import UserError, one_line, visible

FOLDER = ".cluster"
READY_WITHIN_S = 240.0
POLL_S = 0.3
EXIT_NOT_UP = 1
NEEDED = {"ray": "train", "mlflow": "train", "moto": "dev", "s3fs": "s3"}
"""Packages, and the extra that brings each."""


@command
def main(argv: Sequence[str] | None = None) -> int:
    """Do what the first word says: 0, 1 where `status` finds something that does not answer, 2 for a clear error."""
    options = parser().parse_args(argv)
    folder = Path(options.folder).absolute()
    if options.do == "up":
        with ending_on_sigterm():
            return up(folder, workers=options.workers, cpus=options.cpus, base_port=options.base_port)
    return down(folder) if options.do == "down" else status(folder)


def parser() -> argparse.ArgumentParser:
    """The command line."""
    made = argparse.ArgumentParser(prog="local_cluster.sh", description=(__doc__ or "").splitlines()[0])
    made.add_argument("do", choices=("up", "down", "status"))
    made.add_argument("--folder", default=str(ROOT / FOLDER), help=f"where its state is (default: {FOLDER}/)")
    made.add_argument(
        "--workers", type=_between(1, MAX_WORKERS), default=2, help="worker nodes beside the head (default: 2)"
    )
    made.add_argument("--cpus", type=_between(1, 1024), default=1, help="CPUs of each worker node (default: 1)")
    made.add_argument(
        "--base-port", type=_between(1024, 65500), default=26380, help="first of some thirty ports (default: 26380)"
    )
    return made


def _between(least: int, most: int) -> Callable[[str], int]:
    def number(text: str) -> int:
        if not (text.isascii() and text.isdigit() and least <= int(text) <= most):
            raise argparse.ArgumentTypeError(f"{text!r} is no number from {least} to {most}")
        return int(text)

    return number


def up(folder: Path, *, workers: int, cpus: int, base_port: int) -> int:
    """Start everything, wait until it answers, and say how to use it; what fails is ended again.

    Raises:
        UserError: there is one already, a port or a package is missing, or a part does not come up.
    """
    check_packages()
    if state.read(folder) is not None:
        raise UserError(f"there is a cluster in {folder} already: look at `status`, or end it with `down`")
    check_ports(Layout(folder=folder, ray_folder=folder, mark="", workers=workers, base_port=base_port))
    made = state.begin(folder, workers=workers, cpus=cpus, base_port=base_port)
    try:
        for names in (("store", "mlflow", "head"), made.layout.nodes[1:]):
            for name in names:
                made = _start(made, name)
            _wait(made)
    except BaseException:
        with _said_once():
            down(folder)
        raise
    print(described(made))
    return 0


@contextlib.contextmanager
def _said_once() -> Iterator[None]:
    """What goes wrong while a failed `up` is ended must not hide why it failed."""
    try:
        yield
    except (UserError, OSError) as error:
        print(f"beside that: {one_line(error)}")


def check_packages() -> None:
    """Raises: UserError where one is not installed."""
    for name, extra in NEEDED.items():
        if importlib.util.find_spec(name) is None:
            raise UserError(f"{name} is not installed: pip install -e '.[{extra}]'")


def check_ports(layout: Layout) -> None:
    """Raises: UserError at the first that is not to be had."""
    for host, port in layout.ports():
        try:
            check_port(host, port)
        except OSError as error:
            if error.errno == errno.EADDRNOTAVAIL:
                raise UserError(f"{host} is no address of this machine: all of 127.0.0.0/8 is, on Linux") from error
            reason = "is in use" if error.errno == errno.EADDRINUSE else f"is not to be had ({error.strerror})"
            raise UserError(f"port {port} at {host} {reason}: take others with --base-port") from error


def _start(made: State, name: str) -> State:
    layout = made.layout
    at = {"store": layout.store, "mlflow": layout.mlflow}.get(name) or layout.address(name)
    log = layout.folder / LOGS / f"{name}.log"
    try:
        part = processes.start(name, at, layout.command(name), layout.environment(name), ROOT, log)
    except (OSError, psutil.Error) as error:
        raise UserError(f"{name} could not be started: {one_line(error)}") from error
    made = dataclasses.replace(made, parts=(*made.parts, part))
    state.write(made)
    return made


def _wait(made: State) -> None:
    """Until all that were started answer. Raises: UserError when one ends, or the time is up."""
    deadline = time.monotonic() + READY_WITHIN_S
    waiting = {part.name: part for part in made.parts}
    while waiting:
        for name, part in waiting.items():
            if processes.find(part) is None:
                raise UserError(f"{name} ended: {_last_word(made, name)}")
        if time.monotonic() > deadline:
            raise UserError(f"{', '.join(waiting)} did not answer within {READY_WITHIN_S:g} s: see {_logs(made)}")
        time.sleep(POLL_S)
        alive = answers.alive_nodes(made.layout)
        waiting = {name: part for name, part in waiting.items() if not answers.answers(made.layout, name, alive)}


def _logs(made: State) -> Path:
    return made.layout.folder / LOGS


def _last_word(made: State, name: str) -> str:
    log = _logs(made) / f"{name}.log"
    with contextlib.suppress(OSError):
        lines = [line for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
        if lines:
            return f"{visible(lines[-1].strip())[:300]} (all of it in {log})"
    return f"see {log}"


def status(folder: Path) -> int:
    """A line for each part. Returns 0 where all of them answer. Raises: UserError when the state cannot be read."""
    made = state.read(folder)
    if made is None:
        print(f"no cluster in {folder}")
        return EXIT_NOT_UP
    alive, found = answers.alive_nodes(made.layout), []
    for name in ("store", "mlflow", *made.layout.nodes):
        part = next((part for part in made.parts if part.name == name), None)
        found.append(_state_of(made.layout, part, alive))
        print(f"{name:<9} {found[-1]:<14} {'' if part is None else f'pid {part.pid:<8} {part.at}'}".rstrip())
    return 0 if set(found) == {"answers"} else EXIT_NOT_UP


def _state_of(layout: Layout, part: processes.Part | None, alive: set[str]) -> str:
    if part is None:
        return "never started"
    if processes.find(part) is None:
        return "gone"
    return "answers" if answers.answers(layout, part.name, alive) else "does not answer"


def down(folder: Path) -> int:
    """End what `up` started, and nothing else. Raises: UserError when something does not end."""
    made = state.read(folder)
    if made is None:
        print(f"no cluster in {folder}")
        return 0
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)  # half of it would be worse than waiting
    try:
        left = processes.stop(made.parts, made.layout.mark)
        if left:
            raise UserError(f"processes {', '.join(map(str, left))} do not end: call `down` again")
        state.end(made)
    finally:
        signal.signal(signal.SIGINT, before)
    print(f"the cluster is down; what lay in its object store is gone, its logs are in {folder / LOGS}")
    return 0


def described(made: State) -> str:
    """What there is, and how to use it."""
    layout = made.layout
    nodes = ", ".join(f"{node} {layout.address(node)}" for node in layout.nodes)
    return "\n".join(
        [
            f"nodes    {nodes} ({layout.cpus} CPU(s) on each worker)",
            f"jobs     {layout.dashboard} (Ray's dashboard)",
            f"mlflow   {layout.mlflow}",
            f"store    {layout.store}, s3://stories (in memory: gone with `down`)",
            "closed   Ray asks for the token, and its ports, save the dashboard, listen on every interface;",
            "         MLflow and the store ask for nothing, and listen on loopback alone",
            "",
            "In a shell:",
            "",
            f"    source {layout.folder / state.ENVIRONMENT}",
            *(f"    {line}" for line in layout.commands()),
            "",
            f"Stories are then at http://{LOOPBACK}:8000. `infra/local_cluster.sh down` ends it all.",
        ]
    )
