"""The HTTP routes, as a FastAPI application over a rollout of models. Ray is not known here.

In: requests. Out: stories with the version of the model and what they took, or a sentence that says what is wrong.
`app.py` runs it in the replicas of Ray Serve; the tests call it without.
"""

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

from fastapi import FastAPI, HTTPException, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from serve.rollout import Rollout
from serve.schemas import (
    ErrorAnswer,
    GenerateAnswer,
    GenerateRequest,
    Health,
    ModelDescription,
    Usage,
    sentence,
)
from slm_ray.engine import PromptError
from slm_ray.engine_thread import EngineBusyError, EngineClosedError
from slm_ray.story import Completion

MAX_BODY_BYTES = 64 * 1024
RETRY_AFTER_S = 2
PAGE = Path(__file__).with_name("page") / "index.html"
_REFUSALS: dict[int | str, dict[str, Any]] = {
    413: {"model": ErrorAnswer, "description": f"The body is larger than {MAX_BODY_BYTES} bytes."},
    422: {"model": ErrorAnswer, "description": "A field is missing, unknown, of the wrong type or out of range."},
    429: {"model": ErrorAnswer, "description": "Too many stories are being written: try again later."},
    503: {"model": ErrorAnswer, "description": "The server is stopping."},
}


def create_api(rollout: Rollout) -> FastAPI:
    """The application; the rollout is closed when it shuts down."""

    @contextlib.asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        yield
        await rollout.close()

    api = FastAPI(title="SLM-Ray", description="Stories from a small language model.", lifespan=lifespan)
    api.add_middleware(BodyLimit, limit_bytes=MAX_BODY_BYTES)
    _add_error_answers(api)
    _add_routes(api, rollout)
    return api


def _add_routes(api: FastAPI, rollout: Rollout) -> None:
    page = PAGE.read_text(encoding="utf-8")

    @api.post("/generate", responses=_REFUSALS)
    async def generate(request: GenerateRequest) -> GenerateAnswer:
        """Continue a prompt."""
        start = time.perf_counter()
        model, future = rollout.submit(request.prompt, request.sampling())
        completion = await asyncio.wrap_future(future)  # when this task is cancelled, the row is given free
        usage = _usage(completion, time.perf_counter() - start)
        return GenerateAnswer(
            story=request.prompt + completion.text,
            finish_reason=completion.finish_reason,
            model=model.version,
            usage=usage,
        )

    @api.get("/health")
    async def health() -> Health:
        """Whether the server is alive."""
        return Health()

    @api.get("/model")
    async def model() -> ModelDescription:
        """Which model is served, and where it comes from."""
        return rollout.description

    @api.get("/", include_in_schema=False)
    async def index() -> HTMLResponse:
        return HTMLResponse(page)


def _usage(completion: Completion, seconds: float) -> Usage:
    written = len(completion.tokens)
    return Usage(
        prompt_tokens=completion.prompt_tokens,
        completion_tokens=written,
        seconds=round(seconds, 4),
        tokens_per_second=round(written / seconds, 1),
    )


def _add_error_answers(api: FastAPI) -> None:
    @api.exception_handler(RequestValidationError)
    async def invalid(_: Request, error: RequestValidationError) -> JSONResponse:
        return _refusal(422, sentence(error))

    @api.exception_handler(PromptError)
    async def too_long(_: Request, error: PromptError) -> JSONResponse:
        return _refusal(422, f"prompt: {error}")

    @api.exception_handler(EngineBusyError)
    async def busy(_: Request, error: EngineBusyError) -> JSONResponse:
        return _refusal(429, f"{error}: try again later", {"Retry-After": str(RETRY_AFTER_S)})

    @api.exception_handler(EngineClosedError)
    async def closed(_: Request, error: EngineClosedError) -> JSONResponse:
        return _refusal(503, str(error))


def _refusal(status: int, detail: str, headers: dict[str, str] | None = None) -> JSONResponse:
    return JSONResponse({"detail": detail}, status, headers)


class BodyLimit:
    """ASGI middleware: reads a body whole before the application sees any of it, and answers 413 to a long one."""

    def __init__(self, app: ASGIApp, limit_bytes: int) -> None:
        self._app = app
        self._limit_bytes = limit_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one connection."""
        if scope["type"] != "http":
            return await self._app(scope, receive, send)
        try:
            messages = await self._read(receive)
        except HTTPException as error:
            return await _refusal(error.status_code, error.detail)(scope, receive, send)

        async def replay() -> Message:
            return messages.pop(0) if messages else await receive()

        return await self._app(scope, replay, send)

    async def _read(self, receive: Receive) -> list[Message]:
        """All messages of the body. Raises: HTTPException when it is too long."""
        messages: list[Message] = []
        size = 0
        while not messages or messages[-1].get("more_body", False):
            messages.append(await receive())
            size += len(messages[-1].get("body", b""))
            if size > self._limit_bytes:
                raise HTTPException(413, f"the body is larger than {self._limit_bytes} bytes")
        return messages
