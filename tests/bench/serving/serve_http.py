"""The server of `serve.py`: stories over HTTP, streamed, with when their tokens arrived, in turn with the bare engine.

In: the folder of a checkpoint, numbers of streams. Out: one line of JSON. The clients are plain sockets in this one
process, on the same cores as the server; every story begins at the same moment as the others of its round. Before each
round over HTTP the engine writes the same stories in a process of its own (`serve_ours.py --ask`), so that `of_engine`
compares what ran within a second or two.

    python tests/bench/serving/serve_http.py --model FOLDER --streams 1,16 [--tokens 128]
"""

import contextlib
import json
import os
import re
import selectors
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeAlias

import httpx
from serve_options import options, prompts

from slm_ray.runs.checkpoint import load_model

ROOT = Path(__file__).resolve().parents[3]
START_S = 120
END_S = 60
Engine: TypeAlias = "subprocess.Popen[str]"
Bare: TypeAlias = tuple[float, int]
"""Seconds and tokens of a round of the bare engine: the server's round has the same tokens, since both are greedy."""


@dataclass
class Answer:
    """When the parts of one story came, in seconds since all were asked for."""

    arrived_s: list[float] = field(default_factory=list)
    seconds: float = 0.0
    text: list[bytes] = field(default_factory=list)


def main() -> None:
    """Start the server and the engine, ask both in turn, and print what was seen."""
    given = options()
    vocab_size = load_model(given.model)[1].vocab_size
    counts = [int(count) for count in given.streams.split(",")]
    result: dict[str, dict[int, float]] = {}
    with server(given.model, max(counts), given.ingress, given.replicas) as port, engine(sys.argv[1:]) as bare:
        name = httpx.get(f"http://127.0.0.1:{port}/v1/models").json()["data"][0]["id"]
        for count in counts:
            requests = [
                request(name, prompt, given.tokens) for prompt in prompts(count, vocab_size, given.prompt_tokens)
            ]
            ask_engine(bare, count), ask_all(port, requests)  # the first time is not measured
            rounds = [(ask_engine(bare, count), ask_all(port, requests)) for _ in range(given.repeats)]
            for figure, value in figures(rounds).items():
                result.setdefault(figure, {})[count] = value
            print(f"{count} streams: {result['of_engine'][count]:.2f} of the engine", file=sys.stderr, flush=True)
    print(json.dumps(result))


@contextlib.contextmanager
def server(model: Path, rows: int, ingress: str, replicas: int) -> Iterator[int]:
    """The command a user would give, on a free port, until the block is left."""
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = int(probe.getsockname()[1])
    words = [sys.executable, str(ROOT / "serve" / "app.py"), "--model", str(model), "--rows", str(rows)]
    words += ["--port", str(port), "--drain-s", "0", "--max-waiting", str(rows), "--ingress", ingress]
    words += ["--replicas", str(replicas)]
    environment = dict(os.environ) | {"RAY_ADDRESS": "local"}
    process = subprocess.Popen(words, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    try:
        wait_until_ready(process, port)
        yield port
    finally:
        process.terminate()
        try:
            process.communicate(timeout=END_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.communicate()


def wait_until_ready(process: "subprocess.Popen[str]", port: int) -> None:
    """Raises: SystemExit, with what the server logged, when it does not answer in time."""
    deadline = time.monotonic() + START_S
    while time.monotonic() < deadline and process.poll() is None:
        with contextlib.suppress(httpx.TransportError):
            if httpx.get(f"http://127.0.0.1:{port}/ready", timeout=5).status_code == 200:
                return
        time.sleep(0.2)
    process.kill()
    raise SystemExit(f"the server did not start:\n{process.communicate()[1][-3000:]}")


@contextlib.contextmanager
def engine(arguments: list[str]) -> Iterator[Engine]:
    """The bare engine, which waits to be asked."""
    words = [sys.executable, str(Path(__file__).with_name("serve_ours.py")), "--ask", *arguments]
    with subprocess.Popen(words, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        try:
            yield process
        finally:
            process.terminate()


def ask_engine(process: Engine, count: int) -> Bare:
    """Seconds for so many stories at once, and their tokens: with a real model some end before they are full."""
    assert process.stdin is not None and process.stdout is not None
    process.stdin.write(f"{count}\n")
    process.stdin.flush()
    seconds, tokens = process.stdout.readline().split()
    return float(seconds), int(tokens)


def request(name: str, prompt: list[int], tokens: int) -> bytes:
    """A greedy story of so many tokens, streamed, by OpenAI's route."""
    body = json.dumps({"model": name, "prompt": prompt, "max_tokens": tokens, "temperature": 0, "stream": True})
    head = f"POST /v1/completions HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: {len(body)}\r\nConnection: close\r\n"
    return f"{head}Content-Type: application/json\r\n\r\n{body}".encode()


def ask_all(port: int, requests: list[bytes]) -> list[Answer]:
    """All stories at once, each over a connection of its own; bare sockets, since the cores are the server's too."""
    answers = [Answer() for _ in requests]
    with contextlib.ExitStack() as stack:
        selector = stack.enter_context(selectors.DefaultSelector())
        began = time.perf_counter()
        for content, answer in zip(requests, answers, strict=True):
            connection = stack.enter_context(socket.create_connection(("127.0.0.1", port)))
            connection.sendall(content)
            connection.setblocking(False)
            selector.register(connection, selectors.EVENT_READ, answer)
        while selector.get_map():
            for key, _ in selector.select():
                read(key.fileobj, key.data, began, selector)
    for answer in answers:
        text = b"".join(answer.text)
        if not re.search(rb'"finish_reason":"(length|stop)"', text) or b"[DONE]" not in text:
            raise SystemExit(f"no whole story:\n{text[-1000:].decode(errors='replace')}")
    return answers


def read(connection: object, answer: Answer, began: float, selector: selectors.BaseSelector) -> None:
    """What has come of one answer."""
    assert isinstance(connection, socket.socket)
    part = connection.recv(1 << 16)
    answer.seconds = time.perf_counter() - began
    answer.text.append(part)
    if b'"text"' in part:
        answer.arrived_s.append(answer.seconds)
    if not part:
        selector.unregister(connection)


def figures(rounds: list[tuple[Bare, list[Answer]]]) -> dict[str, float]:
    """Tokens per second of a round (median), and milliseconds over all rounds' stories."""
    answers = [answer for _, one in rounds for answer in one]
    first = [1000 * answer.arrived_s[0] for answer in answers if answer.arrived_s]
    gaps = [1000 * (b - a) for answer in answers for a, b in zip(answer.arrived_s, answer.arrived_s[1:], strict=False)]
    seconds = [max(answer.seconds for answer in one) for _, one in rounds]
    return {
        "tokens_per_s": statistics.median(count / own for ((_, count), _), own in zip(rounds, seconds, strict=True)),
        "engine_tokens_per_s": statistics.median(count / bare for (bare, count), _ in rounds),
        "of_engine": statistics.median(bare / own for ((bare, _), _), own in zip(rounds, seconds, strict=True)),
        "first_p50_ms": quantile(first, 0.5),
        "first_p99_ms": quantile(first, 0.99),
        "between_p50_ms": quantile(gaps, 0.5),
        "between_p99_ms": quantile(gaps, 0.99),
        "parts": statistics.mean(len(answer.arrived_s) for answer in answers),
    }


def quantile(values: list[float], share: float) -> float:
    """The value that this share of them does not exceed."""
    return sorted(values)[min(int(share * len(values)), len(values) - 1)] if values else float("nan")


if __name__ == "__main__":
    main()
