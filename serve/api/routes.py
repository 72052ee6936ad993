"""The HTTP application over a rollout of models: our own routes, the middlewares, the error handlers.

In: requests. Out: stories with the version of the model and what they took, or a sentence that says what is wrong.
`openai_routes.py` and `chat_routes.py` add OpenAI's routes, `middleware.py` what runs before all; `deployment.py` runs
the application in the replicas of Ray Serve; the tests call it without Ray.
"""

import asyncio
import contextlib
from collections.abc import AsyncIterator
from pathlib import Path

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, JSONResponse, PlainTextResponse, Response
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware

from serve.api.chat_routes import PATH as CHAT_PATH
from serve.api.chat_routes import add_chat_route
from serve.api.chat_schemas import ChatRequest
from serve.api.connection import HeadMiddleware, HostMiddleware, RequestIdMiddleware
from serve.api.error_responses import RETRY_AFTER_S, error_docs, error_response
from serve.api.metrics import CONTENT_TYPE, Metrics
from serve.api.middleware import (
    MAX_BODY_BYTES,
    PROXY_HEALTH,
    ApiKeyMiddleware,
    BodyLimitMiddleware,
    RateLimitMiddleware,
    RequestMetricsMiddleware,
    SecurityHeadersMiddleware,
    content_security_policy,
)
from serve.api.openai_routes import PATH, add_openai_routes
from serve.api.openai_schemas import CompletionRequest, OpenaiRequest
from serve.api.schemas import (
    GenerateAnswer,
    GenerateRequest,
    Health,
    Usage,
    field_name,
    sentence,
    written_tokens,
)
from serve.api.settings import ApiSettings
from serve.api.streaming import (
    ClientDisconnectedError,
    EventStream,
    StreamingRequest,
    event,
    submit_stories,
    submit_with_words,
    unless_disconnected,
)
from serve.api.tracing import TraceMiddleware, Tracer
from serve.models.description import ModelDescription
from serve.models.loaded_model import InstructionError
from serve.models.rollout import Rollout
from slm_ray.generation.engine import BiasError, PromptError
from slm_ray.generation.engine_thread import EngineBusyError, EngineClosedError, EngineError
from slm_ray.generation.request import Completion

PAGE = Path(__file__).parents[1] / "page" / "index.html"
ROUTES = frozenset(
    {"/", "/generate", "/health", "/ready", "/metrics", "/model", "/openapi.json", "/v1/models", PATH, CHAT_PATH}
)
BODIES: dict[str, type[OpenaiRequest]] = {PATH: CompletionRequest, CHAT_PATH: ChatRequest}
PROMPTS = {CHAT_PATH: "messages"}
"""Field of the prompt, where it has another name."""
FIELDS = {BiasError: "logit_bias", InstructionError: "words"}
"""Field that an error of its own class is about."""


def create_api(rollout: Rollout, settings: ApiSettings | None = None) -> FastAPI:
    """The application; when it shuts down, `state.close` is awaited, which closes the rollout, then `state.flush`."""
    settings = settings or ApiSettings()
    tracer = Tracer(settings.otlp_endpoint) if settings.otlp_endpoint else None

    @contextlib.asynccontextmanager
    async def lifespan(api: FastAPI) -> AsyncIterator[None]:
        yield
        await api.state.close()
        await api.state.flush()

    # Without docs_url: Swagger's page loads its code from elsewhere.
    api = FastAPI(
        title="SLM-Ray",
        description="Stories from a small language model.",
        lifespan=lifespan,
        docs_url=None,
        redoc_url=None,
    )

    async def close() -> None:
        await rollout.close()

    async def flush() -> None:
        if tracer is not None:
            await tracer.flush()

    api.state.close, api.state.flush = close, flush
    metrics = Metrics()
    _add_middlewares(api, settings, metrics, tracer)
    _add_error_answers(api)
    _add_stories(api, rollout, settings, metrics)
    _add_state(api, rollout, metrics)
    if not settings.has_proxy:
        api.add_api_route(PROXY_HEALTH, lambda: PlainTextResponse("success"), include_in_schema=False)
    add_openai_routes(api, rollout, settings, metrics)
    add_chat_route(api, rollout, settings, metrics)
    return api


def _add_middlewares(api: FastAPI, settings: ApiSettings, metrics: Metrics, tracer: Tracer | None) -> None:
    """The last one added is the first that a request meets."""
    api.add_middleware(BodyLimitMiddleware, limit_bytes=MAX_BODY_BYTES)
    if settings.requests_per_minute:
        api.add_middleware(
            RateLimitMiddleware, per_minute=settings.requests_per_minute, by_key=bool(settings.key_digests)
        )
    if tracer is not None:  # who has no key writes nothing into our traces
        api.add_middleware(TraceMiddleware, tracer=tracer, routes=ROUTES)
    if settings.key_digests:
        api.add_middleware(ApiKeyMiddleware, digests=settings.key_digests)
    if settings.cors_origins:
        api.add_middleware(
            CORSMiddleware,
            allow_origins=settings.cors_origins,
            allow_methods=["GET", "POST"],
            allow_headers=["*"],  # clients have headers of their own; what an origin may do is decided by its name
            expose_headers=["Retry-After", "X-Request-Id"],
        )
    api.add_middleware(HeadMiddleware)
    api.add_middleware(HostMiddleware, hosts=settings.allowed_hosts)
    if not settings.has_proxy:
        api.add_middleware(RequestIdMiddleware)
    api.add_middleware(SecurityHeadersMiddleware)
    api.add_middleware(RequestMetricsMiddleware, metrics=metrics, routes=ROUTES)


def _add_stories(api: FastAPI, rollout: Rollout, settings: ApiSettings, metrics: Metrics) -> None:
    responses = error_docs(400, 401, 408, 413, 422, 429, 500, 503, 504)
    responses[200] = {
        "description": "The story; with `stream`, an event for each piece, and a last one with `done`.",
        "content": {"text/event-stream": {}},
    }

    @api.post("/generate", responses=responses, response_model=GenerateAnswer, response_model_exclude_none=True)
    async def generate(body: GenerateRequest, request: Request) -> GenerateAnswer | Response:
        """Continue a prompt."""
        if body.words is None:
            (streaming,) = submit_stories(rollout, [(body.prompt, body.sampling())], metrics)
        else:
            streaming = submit_with_words(rollout, body.words, body.prompt, body.sampling(), metrics)
        if body.stream:
            return EventStream(_events(streaming, settings.request_timeout_s), streaming.cancel)
        try:
            async with asyncio.timeout(settings.request_timeout_s):
                completion = await unless_disconnected(request, streaming.completion())
        finally:
            streaming.cancel()
        return GenerateAnswer(
            story=body.prompt + completion.text,
            finish_reason=completion.finish_reason,
            model=streaming.model.version,
            usage=_usage(completion, streaming.seconds),
            tokens=None if body.logprobs is None else written_tokens(completion.logprobs),
        )


async def _events(streaming: StreamingRequest, timeout_s: float) -> AsyncIterator[bytes]:
    """Chunks of the story, and at the end what it took or why it failed."""
    try:
        async with asyncio.timeout(timeout_s):
            async for chunk in streaming.chunks():
                tokens = [token.model_dump() for token in written_tokens(chunk.logprobs)]
                yield event({"text": chunk.text} | ({"tokens": tokens} if tokens else {}))
            completion = await streaming.completion()
        yield event(
            {
                "done": True,
                "finish_reason": completion.finish_reason,
                "model": streaming.model.version.model_dump(),
                "usage": _usage(completion, streaming.seconds).model_dump(),
            }
        )
    except (TimeoutError, RuntimeError) as error:
        yield event({"error": {"detail": _failure(error, timeout_s)}})
    finally:
        streaming.cancel()


def _failure(error: Exception, timeout_s: float) -> str:
    if isinstance(error, TimeoutError):
        return f"the story took longer than {timeout_s:g} s"
    return str(error) if isinstance(error, EngineClosedError) else "the model failed"


def _add_state(api: FastAPI, rollout: Rollout, metrics: Metrics) -> None:
    page = PAGE.read_text(encoding="utf-8")
    headers = {"Content-Security-Policy": content_security_policy(page)}

    @api.get("/health")
    async def health() -> Health:
        """Whether the server is alive."""
        return Health()

    @api.get("/ready", responses=error_docs(503))
    async def ready() -> Health:
        """Whether a model is loaded and warm."""
        if not rollout.is_ready:
            raise EngineClosedError("no model is ready")
        return Health()

    @api.get("/model", responses=error_docs(401, 429))
    async def model() -> ModelDescription:
        """Which model is served, where it comes from, and what became of the last attempt to bring in another."""
        return rollout.description

    @api.get(
        "/metrics",
        response_class=Response,
        responses=error_docs(401, 429) | {200: {"description": "Metrics.", "content": {"text/plain": {}}}},
    )
    async def scrape() -> Response:
        """What a Prometheus server collects, of this replica."""
        return Response(metrics.text(rollout.current.load), headers={"Content-Type": CONTENT_TYPE})

    @api.get("/", include_in_schema=False)
    async def index() -> HTMLResponse:
        return HTMLResponse(page, headers=headers)


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
    async def invalid(request: Request, error: RequestValidationError) -> JSONResponse:
        path = request.url.path
        fields = ", ".join((BODIES.get(path) or GenerateRequest).model_fields)
        status = 400 if path.startswith("/v1/") else 422
        return error_response(path, status, sentence(error, fields), param=field_name(error).partition(".")[0])

    @api.exception_handler(PromptError)
    async def bad_prompt(request: Request, error: PromptError) -> JSONResponse:
        path = request.url.path
        status = 400 if path.startswith("/v1/") else 422
        field = next((name for kind, name in FIELDS.items() if isinstance(error, kind)), PROMPTS.get(path, "prompt"))
        return error_response(path, status, f"{field}: {error}", param=field)

    @api.exception_handler(EngineBusyError)
    async def busy(request: Request, error: EngineBusyError) -> JSONResponse:
        headers = {"Retry-After": str(RETRY_AFTER_S)}
        return error_response(request.url.path, 429, f"{error}: try again later", headers)

    @api.exception_handler(EngineClosedError)
    async def closed(request: Request, error: EngineClosedError) -> JSONResponse:
        return error_response(request.url.path, 503, str(error), {"Retry-After": str(RETRY_AFTER_S)})

    @api.exception_handler(EngineError)
    async def broken(request: Request, _: EngineError) -> JSONResponse:
        return error_response(request.url.path, 500, "the model failed in the middle of the story")

    @api.exception_handler(TimeoutError)
    async def late(request: Request, _: TimeoutError) -> JSONResponse:
        return error_response(request.url.path, 504, "the story took longer than a request may take")

    @api.exception_handler(ClientDisconnectedError)
    async def gone(request: Request, _: ClientDisconnectedError) -> JSONResponse:
        return error_response(request.url.path, 499, "the client left")  # nobody reads it; it is counted

    @api.exception_handler(HTTPException)
    async def other(request: Request, error: HTTPException) -> JSONResponse:
        path, headers = request.url.path, dict(error.headers or {})
        detail = str(error.detail)
        if error.status_code == 404:
            detail = f"no route {path[:100]!r}: there are {', '.join(sorted(ROUTES))}"
        if error.status_code == 405:
            detail = f"{path} does not take {request.method[:20]}, it takes {headers.get('Allow', 'POST')}"
        return error_response(path, error.status_code, detail, headers)
