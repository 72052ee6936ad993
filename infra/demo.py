"""`make demo`: from stories to a served model, offline, with the user's own four commands.

In: nothing but this checkout. Out: `data/demo-*`, `runs/demo-*`, the registered model `tinystories@champion`, and a
server on loopback that answers until Ctrl-C. What is finished is not done again. Each step is the command that a user
would type, and is shown; this script only starts them in turn, waits, and asks for a story.
"""

import argparse
import contextlib
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

from slm_ray.cli.ports import check_port
from slm_ray.corpus.grammar import SAMPLE_REVISION

ROOT = Path(__file__).resolve().parents[1]
HOST = "127.0.0.1"
PROMPT = "Once upon a time"
READY_WITHIN_S = 180
GRACE_S = 30

PREPARE = "pipelines/prepare.py --runner DirectRunner --source sample --max-stories 5000 --vocab-size 2048"
SWEEP = "tune/sweep.py --config demo --resume --lr 1e-3 4e-3 --d-ff 256 512 --trial-steps 20 --workers 2"


class DemoError(Exception):
    """A step failed; the message says which and what to do."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the steps. Returns 0, 2 when something is in the way, 130 after Ctrl-C."""
    parser = argparse.ArgumentParser(prog="demo.py", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--port", type=int, default=8000, help="port of the server on 127.0.0.1 (default: 8000)")
    parser.add_argument("--once", action="store_true", help="leave after the first story")
    options = parser.parse_args(argv)
    for name in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(name, _interrupt)
    try:
        run(options.port, is_once=options.once)
    except DemoError as error:
        sys.stderr.write(f"error: {error}\n")
        return 2
    except KeyboardInterrupt:
        sys.stderr.write("\ndemo stopped; what is finished is kept, `make demo` goes on from there\n")
        return 130
    return 0


def run(port: int, *, is_once: bool) -> None:
    """The four steps.

    Raises:
        DemoError: a step failed, or the port is taken.
    """
    started = time.monotonic()
    name = f"demo-{_settings_digest()}"
    _check_port(port)
    _say("1/4", "prepare: the sample corpus becomes a data set (Apache Beam)")
    _run(f"{PREPARE} --output data/{name}")
    _say(
        "2/4", "sweep: learning rate x FF width (Ray Tune), then the best one trained longer on two workers (Ray Train)"
    )
    _run(f"{SWEEP} --data data/{name} --name {name}")
    _say("3/4", "serve: the registered champion (Ray Serve)")
    with _server(port) as process:
        _wait_until_ready(process, port)
        _say("4/4", f"ask for a story over HTTP ({(time.monotonic() - started) / 60:.1f} minutes so far)")
        _show(_ask(port), port)
        if is_once:
            return
        print("The server runs until Ctrl-C.", flush=True)
        raise DemoError(f"the server ended by itself with exit code {process.wait()}")


def _settings_digest() -> str:
    """Names data and runs by what they are made from, so that a newer version of the demo starts afresh."""
    preset = (ROOT / "slm_ray" / "presets" / "demo.yaml").read_text(encoding="utf-8")
    content = f"{PREPARE} {SWEEP} {SAMPLE_REVISION} {preset}"
    return hashlib.sha256(content.encode()).hexdigest()[:6]


def _say(number: str, text: str) -> None:
    print(f"\n[{number}] {text}", flush=True)


def _run(line: str) -> None:
    """Run one of the project's commands to its end; Ctrl-C reaches it as it reaches this process."""
    process = _start(line)
    try:
        code = process.wait()
    except KeyboardInterrupt:
        _stop(process)
        raise
    if code == 130:
        raise KeyboardInterrupt
    if code:
        raise DemoError(f"this step ended with exit code {code}, see above: python {line}")


def _start(line: str) -> "subprocess.Popen[bytes]":
    print(f"$ python {line}", flush=True)
    # A session of its own: Ctrl-C reaches only this script, which passes it on once and waits.
    elsewhere = {"RAY_ADDRESS", "MLFLOW_TRACKING_URI"}  # the demo is of this checkout and this machine
    environment = {name: value for name, value in os.environ.items() if name not in elsewhere}
    return subprocess.Popen([sys.executable, *shlex.split(line)], cwd=ROOT, env=environment, start_new_session=True)


def _stop(process: "subprocess.Popen[bytes]") -> None:
    """End a command as Ctrl-C would; what is still there after its grace is killed."""
    with contextlib.suppress(ProcessLookupError):
        process.send_signal(signal.SIGINT)
        try:
            process.wait(GRACE_S)
        except (subprocess.TimeoutExpired, KeyboardInterrupt):
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


@contextlib.contextmanager
def _server(port: int) -> Iterator["subprocess.Popen[bytes]"]:
    process = _start(f"serve/app.py --model models:/tinystories@champion --host {HOST} --port {port}")
    try:
        yield process
    finally:
        _stop(process)


def _wait_until_ready(process: "subprocess.Popen[bytes]", port: int) -> None:
    deadline = time.monotonic() + READY_WITHIN_S
    while time.monotonic() < deadline:
        if process.poll() is not None:
            raise DemoError(f"the server ended with exit code {process.returncode}, see above")
        try:
            with urllib.request.urlopen(f"http://{HOST}:{port}/health", timeout=5):
                return
        except (urllib.error.URLError, OSError):
            time.sleep(0.5)
    raise DemoError(f"the server did not answer within {READY_WITHIN_S} s")


def _ask(port: int) -> dict[str, object]:
    body = {"prompt": PROMPT, "max_tokens": 400, "temperature": 0.7, "top_k": 50, "seed": 1}
    headers = {"Content-Type": "application/json"}
    request = urllib.request.Request(f"http://{HOST}:{port}/generate", json.dumps(body).encode(), headers)
    try:
        with urllib.request.urlopen(request, timeout=120) as answer:  # noqa: S310
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
        raise DemoError(f"port {port} on {HOST} is in use: `make demo PORT=8001`") from error


def _interrupt(*_: object) -> None:
    raise KeyboardInterrupt


if __name__ == "__main__":
    raise SystemExit(main())
