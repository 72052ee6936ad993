"""`make demo`: from stories to a served model, offline, with the user's own four commands.

In: nothing but this checkout. Out: `data/demo-*`, `runs/demo-*`, the registered model `tinystories@champion`, and a
server on loopback that answers until Ctrl-C. What is finished is not done again. Each step is the command that a user
would type, and is shown; this script only starts them in turn, waits, and asks for a story.
"""

import argparse
import contextlib
import errno
import hashlib
import http.client
import json
import os
import shlex
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import FrameType

from slm_ray.cli.command import write_what_is_possible
from slm_ray.cli.ports import check_port
from slm_ray.cli.signals import EXIT_INTERRUPTED, StoppedError
from slm_ray.corpus.grammar import SAMPLE_REVISION

ROOT = Path(__file__).resolve().parents[1]
HOST = "127.0.0.1"
PROMPT = "Once upon a time"
READY_WITHIN_S = 180
GRACE_S = 30
_OPENER = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # a proxy's 127.0.0.1 is another machine

PREPARE = "pipelines/prepare.py --runner DirectRunner --source sample --max-stories 3400 --vocab-size 2048"
MADE_BY = ("slm_ray/presets/demo.yaml", "slm_ray/config/schema.py", "pipelines/config.py", "tune/config.py")
"""Files of settings: what other ones made is not reused."""
SWEEP = "tune/sweep.py --config demo --resume --lr 2e-3 6e-3 --d-ff 256 512 --trial-steps 40 --workers 2"


class DemoError(Exception):
    """A step failed; the message says which and what to do."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the steps. Returns 0, 2 when something is in the way, 130 after Ctrl-C, 143 after SIGTERM."""
    parser = argparse.ArgumentParser(prog="demo.py", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--port", type=int, default=8000, help="port of the server on 127.0.0.1 (default: 8000)")
    parser.add_argument("--once", action="store_true", help="leave after the first story")
    options = parser.parse_args(argv)
    write_what_is_possible()
    for name in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):  # SIGINT is ignored behind a shell's `&` otherwise
        signal.signal(name, _interrupt)
    try:
        run(options.port, is_once=options.once)
    except DemoError as error:
        sys.stderr.write(f"error: {error}\n")
        return 2
    except KeyboardInterrupt as stop:
        with contextlib.suppress(OSError):  # after SIGHUP there is no terminal
            sys.stderr.write("\ndemo stopped; what is finished is kept, `make demo` goes on from there\n")
        return stop.exit_code if isinstance(stop, StoppedError) else EXIT_INTERRUPTED
    return 0


def run(port: int, *, is_once: bool) -> None:
    """The four steps.

    Raises:
        DemoError: a step failed, the port is taken, or a folder of somebody else's has the name of one of the demo's.
    """
    started = time.monotonic()
    name = f"demo-{_settings_digest()}"
    _check_port(port)
    _check_run_folder(ROOT / "runs" / name)
    _say("1/4", "prepare: the sample corpus becomes a data set (Apache Beam)")
    _run(f"{PREPARE} --output data/{name}")
    _say(
        "2/4", "sweep: learning rate x FF width (Ray Tune), then the best one trained longer on two workers (Ray Train)"
    )
    _run(f"{SWEEP} --data data/{name} --name {name}")
    _say("3/4", "serve: the registered champion (Ray Serve)")
    server = f"serve/app.py --model models:/tinystories@champion --host {HOST} --port {port}"
    with _command(server, signal.SIGTERM) as process:  # which it takes as its normal end
        _wait_until_ready(process, port)
        _say("4/4", f"ask for a story over HTTP ({(time.monotonic() - started) / 60:.1f} minutes so far)")
        _show(_ask(port), port)
        if is_once:
            return
        print("The server runs until Ctrl-C.", flush=True)
        raise DemoError(f"the server ended by itself with exit code {process.wait()}")


def _settings_digest() -> str:
    """Names data and runs by what they are made from, so that a newer version of the demo starts afresh."""
    settings = [(ROOT / path).read_text(encoding="utf-8") for path in MADE_BY]
    content = " ".join([PREPARE, SWEEP, SAMPLE_REVISION, *settings])
    return hashlib.sha256(content.encode()).hexdigest()[:6]


def _say(number: str, text: str) -> None:
    print(f"\n[{number}] {text}", flush=True)


def _run(line: str) -> None:
    """Run one of the project's commands to its end.

    Raises:
        DemoError: it failed.
        KeyboardInterrupt: it was interrupted.
    """
    with _command(line, signal.SIGINT) as process:
        code = process.wait()
    if code == EXIT_INTERRUPTED:
        raise KeyboardInterrupt
    if code:
        raise DemoError(f"this step ended with exit code {code}, see above: python {line}")


@contextlib.contextmanager
def _command(line: str, end: signal.Signals) -> Iterator["subprocess.Popen[bytes]"]:
    """One of the project's commands, started; what still runs at the end of the block is ended by that signal."""
    print(f"$ python {line}", flush=True)
    elsewhere = {"RAY_ADDRESS", "MLFLOW_TRACKING_URI"}  # the demo is of this checkout and this machine
    environment = {name: value for name, value in os.environ.items() if name not in elsewhere}
    words = [sys.executable, *shlex.split(line)]
    process = None
    try:
        with _signals_wait():
            # A session of its own: Ctrl-C reaches only this script, which passes it on once and waits.
            process = subprocess.Popen(words, cwd=ROOT, env=environment, start_new_session=True)
        yield process
    finally:
        if process is not None:
            _stop(process, end)


@contextlib.contextmanager
def _signals_wait() -> Iterator[None]:
    """Within the block a signal waits for its end: a process that has only half begun would be left behind."""
    came: list[int] = []
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    for number in before:
        signal.signal(number, lambda number, _: came.append(number))
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    if came:
        _interrupt(came[0])


def _stop(process: "subprocess.Popen[bytes]", end: signal.Signals) -> None:
    """End a command by a signal; what is still there after its grace, or when the user asks again, is killed."""
    process.send_signal(end)
    try:
        process.wait(GRACE_S)
    except (subprocess.TimeoutExpired, KeyboardInterrupt):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def _wait_until_ready(process: "subprocess.Popen[bytes]", port: int) -> None:
    deadline = time.monotonic() + READY_WITHIN_S
    while time.monotonic() < deadline:
        if process.poll() is not None:
            raise DemoError(f"the server ended with exit code {process.returncode}, see above")
        try:
            with _OPENER.open(f"http://{HOST}:{port}/health", timeout=5):
                return
        except (urllib.error.URLError, OSError):
            time.sleep(0.5)
    raise DemoError(f"the server did not answer within {READY_WITHIN_S} s")


def _ask(port: int) -> dict[str, object]:
    body = {"prompt": PROMPT, "max_tokens": 400, "temperature": 0.7, "top_k": 50, "seed": 1}
    headers = {"Content-Type": "application/json"}
    request = urllib.request.Request(f"http://{HOST}:{port}/generate", json.dumps(body).encode(), headers)
    try:
        with _OPENER.open(request, timeout=120) as answer:
            content: dict[str, object] = json.load(answer)
    except (OSError, http.client.HTTPException) as error:
        raise DemoError(f"the server gave no story: {error}") from error
    return content


def _show(answer: dict[str, object], port: int) -> None:
    model = answer["model"]
    assert isinstance(model, dict)
    print(f"\n{answer['story']}\n")
    print(f"written by  {model['name']} version {model['version']}, run {model['run_id']}")
    print(f"trained on  data set {str(model['data_fingerprint'])[:16]}")
    print(f"web page    http://{HOST}:{port}/")
    print("all runs    .venv/bin/mlflow ui --backend-store-uri sqlite:///mlflow.db", flush=True)


def _check_port(port: int) -> None:
    try:
        check_port(HOST, port)
    except OSError as error:
        is_taken = error.errno == errno.EADDRINUSE
        reason = "is in use" if is_taken else f"cannot be listened on ({error.strerror or error})"
        raise DemoError(f"port {port} on {HOST} {reason}: `make demo PORT=8001`") from error


def _check_run_folder(folder: Path) -> None:
    """The sweep refuses a folder that is not its own too, but minutes later. Of the data set's, prepare.py is first."""
    if folder.exists() and not (folder / "sweep.json").exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise DemoError(f"{folder} is in the way and no folder of a sweep: move it elsewhere")


def _interrupt(number: int, _frame: FrameType | None = None) -> None:
    raise StoppedError("", number)


if __name__ == "__main__":
    raise SystemExit(main())
