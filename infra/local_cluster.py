"""A cluster on one machine: `infra/local_cluster.sh up`, `status`, `restart-head`, `down`.

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
import shlex
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import psutil

from infra.cluster import answers, processes, state
from infra.cluster.parts import LOOPBACK, MAX_WORKERS, ROOT, Layout, head_address_file
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
    if options.do == "restart-head":
        with ending_on_sigterm():
            return restart_head(folder)
    return down(folder) if options.do == "down" else status(folder)


def parser() -> argparse.ArgumentParser:
    """The command line."""
    made = argparse.ArgumentParser(prog="local_cluster.sh", description=(__doc__ or "").splitlines()[0])
    made.add_argument("do", choices=("up", "down", "status", "restart-head"))
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
    _check_no_other(folder)
    check_ports(Layout(folder=folder, ray_folder=folder, mark="", workers=workers, base_port=base_port))
    made = state.begin(folder, workers=workers, cpus=cpus, base_port=base_port)
    try:
        made = _begin(made, "head", "store", "mlflow")
        _wait(made, "head")  # the workers ask for it, and the others may take their time
        made = _begin(made, *made.layout.nodes[1:])
        _wait(made, *made.layout.names)
    except BaseException:
        with _said_once():
            down(folder)
        raise
    print(described(made))
    return 0


def _check_no_other(folder: Path) -> None:
    """Raises: UserError where the folder holds a cluster, one that has ended too: it may have left something."""
    made = state.read(folder)
    if made is None:
        return
    if any(map(processes.find, made.parts)) or processes.marked(made.layout.mark):
        raise UserError(f"there is a cluster in {folder} already: look at `status`, or end it with `down`")
    raise UserError(f"the cluster in {folder} has ended (the machine was restarted?): `down` clears it away, then `up`")


def restart_head(folder: Path) -> int:
    """Kill the head with all that runs on it, and start it again; then start what else has ended, but the store.

    Its record of nodes, jobs and actors is on its disk, so workers go on meanwhile: for a minute, as Ray waits.

    Raises:
        UserError: there is no cluster, or none that can go on, or a part does not come up.
    """
    made = state.read(folder)
    if made is None:
        raise UserError(f"no cluster in {folder}: `up` starts one")
    if not _runs(made, "store"):
        raise UserError("the object store has ended, and all that lay in it: `down`, then `up`")
    for part in made.parts:
        if part.name == "head":
            processes.lose(part, made.layout.mark)
    head_address_file(made.layout).unlink(missing_ok=True)
    made = _begin(made, "head")
    _wait(made, "head")
    made = _begin(made, *(name for name in made.layout.names if not _runs(made, name)))
    _wait(made, *made.layout.names)
    print("the head is back, and all parts answer; what ran on it is over: jobs go on with --resume")
    return 0


def _runs(made: State, name: str) -> bool:
    return any(part.name == name and processes.find(part) for part in made.parts)


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


def _begin(made: State, *names: str) -> State:
    """The cluster with these parts started, in place of those of the same name."""
    for name in names:
        made = _start(made, name)
    return made


def _start(made: State, name: str) -> State:
    layout = made.layout
    at = {"store": layout.store, "mlflow": layout.mlflow}.get(name) or layout.address(name)
    log = layout.folder / LOGS / f"{name}.log"
    try:
        part = processes.start(name, at, layout.command(name), layout.environment(name), ROOT, log)
    except (OSError, psutil.Error) as error:
        raise UserError(f"{name} could not be started: {one_line(error)}") from error
    others = (one for one in made.parts if one.name != name)
    made = dataclasses.replace(made, parts=(*others, part))
    state.write(made)
    return made


def _wait(made: State, *names: str) -> None:
    """Until these parts answer. Raises: UserError when one ends, or the time is up."""
    deadline = time.monotonic() + READY_WITHIN_S
    waiting = {part.name: part for part in made.parts if part.name in names}
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
    for name in made.layout.names:
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
    print(f"the cluster is down; what lay in its store and MLflow's records are gone, its logs are in {folder / LOGS}")
    return 0


def described(made: State) -> str:
    """What there is, and how to use it."""
    layout = made.layout
    nodes = ", ".join(f"{node} {layout.address(node)}" for node in layout.nodes)
    return "\n".join(
        [
            f"nodes    {nodes} ({layout.cpus} CPU(s) on each worker)",
            f"jobs     {layout.dashboard} (Ray's dashboard)",
            f"mlflow   {layout.mlflow} (its records are gone with `down`)",
            f"store    {layout.store}, s3://stories (in memory: gone with `down`)",
            "closed   Ray asks for the token, and its ports, save the dashboard, listen on every interface;",
            "         MLflow and the store ask for nothing, and listen on loopback alone",
            "",
            "In a shell:",
            "",
            f"    source {shlex.quote(str(layout.folder / state.ENVIRONMENT))}",
            *(f"    {line}" for line in layout.commands()),
            "",
            f"Stories are then at http://{LOOPBACK}:8000. `infra/local_cluster.sh down` ends it all.",
        ]
    )
