"""What OpenAI's routes share: a request with the stories that are written for it, its stream, and its faults.

In: bodies that are valid field by field. Out: events of a stream, token counts, error responses. `openai_routes.py` and
`chat_routes.py` put their own shapes around it.
"""

import abc
import asyncio
import time
import uuid
from collections.abc import AsyncIterator, Sequence
from typing import Any, Generic, TypeAlias, TypeVar

from fastapi.responses import JSONResponse

from serve.api.error_responses import error_response, openai_error
from serve.api.openai_schemas import CompletionUsage, OpenaiAnswer, OpenaiRequest
from serve.api.settings import ApiSettings
from serve.api.streaming import StreamingRequest, event
from serve.api.token_offsets import Placed
from serve.models.rollout import Rollout
from slm_ray.generation.request import Completion

Piece = TypeVar("Piece")
Fault: TypeAlias = tuple[bool, str, str]
"""Whether a body has it, the field, and what is wrong with it."""


class Job(abc.ABC, Generic[Piece]):
    """One request with the stories that are being written for it.

    requests: those of the engine, `each` for every prompt. kind: the beginning of the answer's id.
    """

    def __init__(self, body: OpenaiRequest, requests: list[StreamingRequest], *, kind: str, each: int) -> None:
        self.requests = requests
        self._body = body
        self._each = each
        model = requests[0].model
        self.tokenizer = model.tokenizer
        self.frame: dict[str, Any] = {
            "id": f"{kind}-{uuid.uuid4().hex}",
            "created": int(time.time()),
            "model": body.model,
            "system_fingerprint": f"{model.version.version}-{model.version.data_fingerprint}",
        }

    @abc.abstractmethod
    def chunk(self, choices: list[Piece], usage: CompletionUsage | None = None) -> OpenaiAnswer:
        """An event of the stream."""

    def cancel(self) -> None:
        """Free every slot."""
        for request in self.requests:
            request.cancel()

    def kept(self, placed: list[Placed], stop: int) -> list[Placed]:
        """Without those that a stop text cut off, which begin at the end of the text or beyond it."""
        return [one for one in placed if one[1] < stop] if self._body.stops() else placed

    def usage(self, completions: Sequence[Completion]) -> CompletionUsage:
        """Tokens of each prompt once, and of all stories."""
        read = sum(completion.prompt_tokens for completion in completions[:: self._each])
        written = sum(len(completion.tokens) for completion in completions)
        return CompletionUsage(prompt_tokens=read, completion_tokens=written, total_tokens=read + written)

    async def events(self, choices: Sequence[AsyncIterator[Piece]], timeout_s: float) -> AsyncIterator[bytes]:
        """Chunks of all choices as they come, then perhaps the usage, then the end."""
        try:
            async with asyncio.timeout(timeout_s):
                async for choice in _merged(choices):
                    yield self._event([choice])
                if self._body.with_usage:
                    done = [await one.completion() for one in self.requests]
                    yield self._event([], self.usage(done))
            yield b"data: [DONE]\n\n"
        except TimeoutError:
            yield event(openai_error(504, f"the stories took longer than {timeout_s:g} s").model_dump())
        except RuntimeError:
            yield event(openai_error(503, "the model stopped in the middle of the story").model_dump())
        finally:
            self.cancel()

    def _event(self, choices: list[Piece], usage: CompletionUsage | None = None) -> bytes:
        """`usage` is there, as null, only where the stream ends with one."""
        content = self.chunk(choices, usage).model_dump()
        if not self._body.with_usage:
            del content["usage"]
        return event(content)


async def _merged(sources: Sequence[AsyncIterator[Piece]]) -> AsyncIterator[Piece]:
    """The choices of all sources, as they come. Raises: what any of them raises."""
    queue: asyncio.Queue[tuple[Piece] | Exception | None] = asyncio.Queue()

    async def drain(source: AsyncIterator[Piece]) -> None:
        try:
            async for choice in source:
                queue.put_nowait((choice,))
            queue.put_nowait(None)
        except Exception as error:  # handed over to the reader
            queue.put_nowait(error)

    tasks = [asyncio.ensure_future(drain(source)) for source in sources]
    try:
        left = len(tasks)
        while left:
            found = await queue.get()
            if isinstance(found, Exception):
                raise found
            if found is None:
                left -= 1
            else:
                yield found[0]
    finally:
        for task in tasks:
            task.cancel()


def no_model(path: str, name: str) -> JSONResponse:
    """The error response to the name of a model that is not served."""
    detail = f"no model {name[:100]!r}: GET /v1/models lists what there is"
    return error_response(path, 404, detail, param="model", code="model_not_found")


def rejected(
    path: str, body: OpenaiRequest, n_prompts: int, rollout: Rollout, settings: ApiSettings, own: Sequence[Fault]
) -> JSONResponse | None:
    """The error response to fields that are valid one by one and not together: the `own` faults of a route first."""
    if body.model != rollout.current.version.name:
        return no_model(path, body.model)
    faults: list[Fault] = [
        *own,
        (
            n_prompts * body.count > settings.max_choices,
            "n",
            f"{n_prompts} x {body.count} stories are more than the {settings.max_choices} of one request",
        ),
        (
            None not in (body.max_tokens, body.max_completion_tokens) and body.max_tokens != body.max_completion_tokens,
            "max_completion_tokens",
            "max_tokens and max_completion_tokens are two names of one thing, and they differ: give one",
        ),
        (len(body.stops()) > 4, "stop", "stop may hold at most 4 texts"),
        (
            body.stream_options is not None and not body.stream,
            "stream_options",
            "stream_options is for streams: set stream to true",
        ),
    ]
    for is_fault, param, detail in faults:
        if is_fault:
            return error_response(path, 400, detail, param=param)
    return None
