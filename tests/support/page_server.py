"""A small real server that speaks the page's side of the HTTP contract: scripted stories at the pace of the test.

In: what the test wants to happen. Out: a server on a free loopback port, and what it was asked. The model is missing;
the page, the connection and the event stream are real.
"""

import asyncio
import dataclasses
import json
import socket
import threading
import time
from collections.abc import AsyncIterator
from typing import Any

import uvicorn
from fastapi import FastAPI, Request
from fastapi.responses import HTMLResponse, JSONResponse, Response, StreamingResponse

from serve.api.middleware import content_security_policy
from tests.support.paths import ROOT

PAGE = ROOT / "serve" / "page" / "index.html"
VERSION = {"name": "tinystories", "version": "3", "run_id": "8d1f0c2ab7e94f6f", "data_fingerprint": "fa" * 32}
MODEL = VERSION | {
    "step": 12000,
    "parameters": 4_230_000,
    "seq_len": 256,
    "vocab_size": 4096,
    "evaluation": {"bits_per_byte": 0.6321},
    "rollout": {"state": "serving", "detail": ""},
}
WORDS = " Lily . She liked to play in the big green park with her friend Tom .".replace(" .", ".").split(" ")[1:]


@dataclasses.dataclass
class Script:
    """What the server does with the next requests. The test changes it while stories run."""

    words: list[str] = dataclasses.field(default_factory=lambda: [" " + word for word in WORDS])
    allowed: int = 10**9
    """Pieces that a story may have by now."""
    dies_after: int | None = None
    """Pieces after which the connection breaks."""
    fails_after: int | None = None
    """Pieces after which an error event ends the story."""
    refusal: tuple[int, Any, dict[str, str]] | None = None
    """Status, body and headers that answer every story."""
    key: str = ""
    refuses_after_s: float = 0
    """Seconds that a story waits for its refusal."""
    has_instructions: bool = False
    """Whether the model learned instructions."""
    context_words: int = 10**9
    """Words that a prompt may have."""


class PageServer:
    """Serves the page and scripted stories from a thread of this process."""

    def __init__(self) -> None:
        self.script = Script()
        self.requests: list[dict[str, Any]] = []
        self.closed_early = 0
        """Stories whose reader left before their end."""
        self._socket = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self._socket.getsockname()[1]}/"
        self._server = uvicorn.Server(uvicorn.Config(self._api(), log_level="critical", lifespan="off"))
        self._thread = threading.Thread(target=self._server.run, kwargs={"sockets": [self._socket]})

    def start(self) -> None:
        """Serve from now on: connections wait in the socket's line until the thread is there."""
        self._thread.start()

    def stop(self) -> None:
        """Close the port and every connection."""
        self._server.should_exit = self._server.force_exit = True
        self._thread.join(10)
        assert not self._thread.is_alive()

    def reset(self) -> None:
        """Forget the last test."""
        self.script, self.requests, self.closed_early = Script(), [], 0

    def _api(self) -> FastAPI:
        api = FastAPI()
        api.add_api_route("/", self._page)
        api.add_api_route("/model", self._model)
        api.add_api_route("/generate", self._generate, methods=["POST"])
        return api

    async def _page(self) -> HTMLResponse:
        page = PAGE.read_text(encoding="utf-8")
        return HTMLResponse(page, headers={"Content-Security-Policy": content_security_policy(page)})

    async def _model(self, request: Request) -> Response:
        return self._refused(request) or JSONResponse(MODEL | {"has_instructions": self.script.has_instructions})

    async def _generate(self, request: Request) -> Response:
        body = await request.json()
        self.requests.append(body)
        if refused := self._refused(request, body):
            await asyncio.sleep(self.script.refuses_after_s)
            return refused
        return StreamingResponse(self._events(body, self.script), media_type="text/event-stream")

    def _refused(self, request: Request, body: dict[str, Any] | None = None) -> Response | None:
        script = self.script
        if script.key and request.headers.get("Authorization") != f"Bearer {script.key}":
            return JSONResponse({"detail": "an API key is needed"}, 401)
        if body is None:
            return None
        if script.refusal:
            status, content, headers = script.refusal
            return JSONResponse(content, status, headers)
        n_words = len(body["prompt"].split())
        if n_words > script.context_words:
            held = f"the context of this model holds {script.context_words}"
            return JSONResponse({"detail": f"prompt: the prompt has {n_words} tokens and {held}: shorten it"}, 422)
        return None

    async def _events(self, body: dict[str, Any], script: Script) -> AsyncIterator[str]:
        start = time.perf_counter()
        is_over = False
        try:
            for count, word in enumerate(script.words):
                while count >= script.allowed:
                    await asyncio.sleep(0.01)
                if count == script.dies_after:
                    raise ConnectionAbortedError
                if count == script.fails_after:
                    yield _event({"error": {"detail": "the model failed"}})
                    return
                yield _event({"text": word} | _tokens(word, count, body.get("logprobs")))
            is_over = True
            yield _event(_done(len(body["prompt"].split()), len(script.words), time.perf_counter() - start))
        finally:
            self.closed_early += not is_over


def _event(content: dict[str, Any]) -> str:
    return f"data: {json.dumps(content)}\n\n"


def _tokens(word: str, count: int, n_alternatives: int | None) -> dict[str, Any]:
    """Chances that fall from token to token, so that every colour is there: 0.9, 0.4, 0.1, 0.02, 0.001 and again."""
    if n_alternatives is None:
        return {}
    logprob = (-0.1, -0.9, -2.3, -3.9, -6.9)[count % 5]
    top = [{"text": " <i>cat</i>", "logprob": -0.7}, {"text": "\n", "logprob": -3.0}]
    return {"tokens": [{"text": word, "logprob": logprob, "top": top}]}


def _done(n_prompt: int, n_written: int, seconds: float) -> dict[str, Any]:
    usage = {
        "prompt_tokens": n_prompt,
        "completion_tokens": n_written,
        "seconds": seconds,
        "tokens_per_second": round(n_written / seconds, 1),
    }
    return {"done": True, "finish_reason": "length", "model": VERSION, "usage": usage}
