"""The server of `serve.py`: stories over HTTP through Ray Serve, streamed, with when their tokens arrived.

In: the folder of a checkpoint, numbers of streams. Out: one line of JSON. The clients are plain sockets in this one
process, on the same cores as the server; every story begins at the same moment as the others of its round.

    python tests/bench/serve_http.py --model FOLDER --streams 1,16 [--tokens 128]
"""

import asyncio
import contextlib
import json
import os
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import httpx
from serve_options import options, prompts

from slm_ray.runs.checkpoint import load_model

ROOT = Path(__file__).resolve().parents[2]
START_S = 120
END_S = 60


@dataclass
class Answer:
    """When the parts of one story came, in seconds since it was asked for."""

    arrived_s: list[float]
    seconds: float


def main() -> None:
    """Start the server, ask, and print what was seen."""
    given = options()
    vocab_size = load_model(given.model)[1].vocab_size
    counts = [int(count) for count in given.streams.split(",")]
    result: dict[str, dict[int, float]] = {}
    with server(given.model, max(counts)) as port:
        name = httpx.get(f"http://127.0.0.1:{port}/v1/models").json()["data"][0]["id"]
        for count in counts:
            requests = [
                request(name, prompt, given.tokens) for prompt in prompts(count, vocab_size, given.prompt_tokens)
            ]
            asyncio.run(ask_all(port, requests, given.tokens))  # the first time is not measured
            rounds = [asyncio.run(ask_all(port, requests, given.tokens)) for _ in range(given.repeats)]
            for figure, value in figures(rounds, count * given.tokens).items():
                result.setdefault(figure, {})[count] = value
    print(json.dumps(result))


@contextlib.contextmanager
def server(model: Path, rows: int) -> Iterator[int]:
    """The command a user would give, on a free port, until the block is left."""
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = int(probe.getsockname()[1])
    words = [sys.executable, str(ROOT / "serve" / "app.py"), "--model", str(model), "--rows", str(rows)]
    words += ["--port", str(port), "--drain-s", "0"]
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


def request(name: str, prompt: list[int], tokens: int) -> bytes:
    """A greedy story of so many tokens, streamed, by OpenAI's route."""
    body = json.dumps({"model": name, "prompt": prompt, "max_tokens": tokens, "temperature": 0, "stream": True})
    head = f"POST /v1/completions HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: {len(body)}\r\nConnection: close\r\n"
    return f"{head}Content-Type: application/json\r\n\r\n{body}".encode()


async def ask_all(port: int, requests: list[bytes], tokens: int) -> list[Answer]:
    """All stories at once."""
    return await asyncio.gather(*(ask(port, content, tokens) for content in requests))


async def ask(port: int, content: bytes, tokens: int) -> Answer:
    """One story, as it comes."""
    began = time.perf_counter()
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(content)
    arrived, text = [], b""
    while part := await reader.read(1 << 16):
        if b'"text"' in part:
            arrived.append(time.perf_counter() - began)
        text += part
    seconds = time.perf_counter() - began
    writer.close()
    if b'"finish_reason":"length"' not in text or b"[DONE]" not in text:
        raise SystemExit(f"no story of {tokens} tokens:\n{text[-1000:].decode(errors='replace')}")
    return Answer(arrived, seconds)


def figures(rounds: list[list[Answer]], tokens: int) -> dict[str, float]:
    """Tokens per second of a round (median), and milliseconds over all rounds' stories."""
    answers = [answer for one in rounds for answer in one]
    first = [1000 * answer.arrived_s[0] for answer in answers]
    gaps = [1000 * (b - a) for answer in answers for a, b in zip(answer.arrived_s, answer.arrived_s[1:], strict=False)]
    return {
        "tokens_per_s": tokens / statistics.median(max(answer.seconds for answer in one) for one in rounds),
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
