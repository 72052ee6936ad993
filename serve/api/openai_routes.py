"""OpenAI's routes: `POST /v1/completions`, whole and streamed, and `GET /v1/models`. The official clients speak them.

In: requests for one or several prompts, each with n stories. Out: choices in OpenAI's shape. `routes.py` adds them.
"""

import asyncio
import time
import uuid
from collections.abc import AsyncIterator, Sequence
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response

from serve.api.error_responses import error_docs, error_response, openai_error
from serve.api.metrics import Metrics
from serve.api.openai_schemas import (
    MAX_PROMPTS,
    Choice,
    CompletionAnswer,
    CompletionRequest,
    CompletionUsage,
    Logprobs,
    ModelCard,
    ModelList,
    chunk_content,
)
from serve.api.settings import ApiSettings
from serve.api.streaming import EventStream, StreamingRequest, event, submit_stories, unless_disconnected
from serve.api.token_offsets import Placed, TokenOffsets
from serve.models.rollout import Rollout
from slm_ray.generation.logprobs import TokenLogprob
from slm_ray.generation.request import Completion

PATH = "/v1/completions"


class _Job:
    """One request with the stories that are being written for it."""

    def __init__(self, body: CompletionRequest, rollout: Rollout, metrics: Metrics) -> None:
        self.body = body
        prompts = body.prompts()
        self._each = body.count if body.most_tokens else 1  # where nothing is written, one measures for all
        stories = [(prompt, body.sampling(number)) for prompt in prompts for number in range(self._each)]
        self.requests = submit_stories(rollout, stories, metrics)
        self.count = len(prompts) * body.count
        model = self.requests[0].model
        self.tokenizer = model.tokenizer
        self._prompts = [_text(prompt, model.tokenizer) for prompt in prompts]
        self._measured: dict[int, tuple[list[Placed], TokenOffsets]] = {}  # by prompt
        self._frame: dict[str, Any] = {
            "id": f"cmpl-{uuid.uuid4().hex}",
            "created": int(time.time()),
            "model": body.model,
            "system_fingerprint": f"{model.version.version}-{model.version.data_fingerprint}",
        }

    def cancel(self) -> None:
        """Free every slot."""
        for request in self.requests:
            request.cancel()

    def answer(self, choices: list[Choice], usage: CompletionUsage | None = None) -> CompletionAnswer:
        """An answer or a chunk of it."""
        return CompletionAnswer(**self._frame, choices=choices, usage=usage)

    def prompt(self, index: int) -> str:
        """What choice `index` begins with: its prompt where `echo` asks for it."""
        return self._prompts[index // self.body.count] if self.body.echo else ""

    def request(self, index: int) -> StreamingRequest:
        """What writes choice `index`."""
        prompt, number = divmod(index, self.body.count)
        return self.requests[prompt * self._each + min(number, self._each - 1)]

    async def choice(self, index: int) -> Choice:
        """A whole story, when it is written."""
        completion = await self.request(index).completion()
        await asyncio.sleep(0)  # one of many with a long prompt each: others have their turn between two
        text = self.prompt(index) + completion.text
        logprobs = None
        if self.body.logprobs is not None:
            echoed, offsets = await self._echoed(index)
            placed = self.kept([*echoed, *offsets.of(completion.logprobs)], len(text))
            logprobs = _logprobs([*placed, *_end(completion, len(text))])
        return Choice(text=text, index=index, logprobs=logprobs, finish_reason=completion.finish_reason)

    async def _echoed(self, index: int) -> tuple[list[Placed], TokenOffsets]:
        """Those of the prompt, which the first of its stories measures for all, and what goes on behind them."""
        if not self.body.echo:
            return [], TokenOffsets(self.tokenizer)
        number = index // self.body.count
        first = await self.request(number * self.body.count).completion()
        if number not in self._measured:
            offsets = TokenOffsets(self.tokenizer)
            self._measured[number] = offsets.of(first.prompt_logprobs), offsets
        placed, offsets = self._measured[number]
        return placed, offsets.copy()

    def kept(self, placed: list[Placed], stop: int) -> list[Placed]:
        """Without those that a stop text cut off, which begin at the end of the text or beyond it."""
        return [one for one in placed if one[1] < stop] if self.body.stops() else placed

    def usage(self, completions: Sequence[Completion]) -> CompletionUsage:
        """Tokens of each prompt once, and of all stories."""
        read = sum(completion.prompt_tokens for completion in completions[:: self._each])
        written = sum(len(completion.tokens) for completion in completions)
        return CompletionUsage(prompt_tokens=read, completion_tokens=written, total_tokens=read + written)


def add_openai_routes(api: FastAPI, rollout: Rollout, settings: ApiSettings, metrics: Metrics) -> None:
    """Add them to the application."""
    responses = error_docs(400, 401, 404, 408, 413, 429, 500, 503, 504, is_openai=True)
    responses[200] = {
        "description": "The stories; with `stream`, a chunk for each piece, and `[DONE]` at the end.",
        "content": {"text/event-stream": {}},
    }

    @api.post(PATH, responses=responses, response_model=CompletionAnswer)
    async def completions(body: CompletionRequest, request: Request) -> CompletionAnswer | Response:
        """Continue one prompt or several, in OpenAI's form."""
        rejected = _rejected(body, rollout, settings)
        if rejected is not None:
            return rejected
        job = _Job(body, rollout, metrics)
        if body.stream:
            return EventStream(_events(job, settings.request_timeout_s), job.cancel)
        try:
            async with asyncio.timeout(settings.request_timeout_s):
                work = asyncio.gather(*(one.completion() for one in job.requests))
                done: list[Completion] = await unless_disconnected(request, work)
                choices = [await job.choice(index) for index in range(job.count)]
        finally:
            job.cancel()
        return job.answer(choices, job.usage(done))

    @api.get("/v1/models", responses=error_docs(401, 429, is_openai=True))
    async def models() -> ModelList:
        """The models that can be asked: one."""
        return ModelList(data=[_card(rollout)])

    @api.get("/v1/models/{name}", responses=error_docs(401, 404, 429, is_openai=True), response_model=ModelCard)
    async def model(name: str, request: Request) -> ModelCard | JSONResponse:
        """One of them."""
        return _card(rollout) if name == _card(rollout).id else _no_model(request.url.path, name)


def _card(rollout: Rollout) -> ModelCard:
    model = rollout.current
    return ModelCard(id=model.version.name, created=model.loaded_at)


def _no_model(path: str, name: str) -> JSONResponse:
    detail = f"no model {name[:100]!r}: GET /v1/models lists what there is"
    return error_response(path, 404, detail, param="model", code="model_not_found")


def _rejected(body: CompletionRequest, rollout: Rollout, settings: ApiSettings) -> JSONResponse | None:
    """The error response to fields that are valid one by one and not together."""
    if body.model != rollout.current.version.name:
        return _no_model(PATH, body.model)
    prompts = body.prompts()
    faults = [
        (not prompts or len(prompts) > MAX_PROMPTS, "prompt", f"prompt must hold 1 to {MAX_PROMPTS} prompts"),
        (
            len(prompts) * body.count > settings.max_choices,
            "n",
            f"{len(prompts)} x {body.count} stories are more than the {settings.max_choices} of one request",
        ),
        (body.best_of not in (None, body.count), "best_of", "best_of is not supported: leave it out, or give n"),
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
            return error_response(PATH, 400, detail, param=param)
    return None


def _text(prompt: str | list[int], tokenizer: Any) -> str:
    return prompt if isinstance(prompt, str) else tokenizer.decode(prompt)


def _logprobs(placed: Sequence[Placed]) -> Logprobs:
    return Logprobs(
        tokens=[token.text for token, _ in placed],
        token_logprobs=[token.logprob for token, _ in placed],
        top_logprobs=[_top(token) for token, _ in placed],
        text_offset=[at for _, at in placed],
    )


def _top(token: TokenLogprob) -> dict[str, float]:
    """The likeliest in its place and, where it is none of them, the token itself."""
    likeliest = {text: logprob for _, text, logprob in reversed(token.top)}
    return {token.text: token.logprob} | likeliest


def _end(completion: Completion, at: int) -> list[Placed]:
    """The entry of the end-of-text token, which has no text: without it the last entry would be the story's own."""
    return [] if completion.end_logprob is None else [(completion.end_logprob, at)]


async def _events(job: _Job, timeout_s: float) -> AsyncIterator[bytes]:
    """Chunks of all choices as they come, then perhaps the usage, then the end."""
    body = job.body
    with_usage = bool(body.stream_options and body.stream_options.include_usage)
    try:
        async with asyncio.timeout(timeout_s):
            async for choice in _merged([_choices(job, index) for index in range(job.count)]):
                yield event(chunk_content(job.answer([choice]), with_usage=with_usage))
            if with_usage:
                done = [await one.completion() for one in job.requests]
                yield event(chunk_content(job.answer([], job.usage(done)), with_usage=True))
        yield b"data: [DONE]\n\n"
    except TimeoutError:
        yield event(openai_error(504, f"the stories took longer than {timeout_s:g} s").model_dump())
    except RuntimeError:
        yield event(openai_error(503, "the model stopped in the middle of the story").model_dump())
    finally:
        job.cancel()


async def _choices(job: _Job, index: int) -> AsyncIterator[Choice]:
    """The chunks of one choice; the last one has its finish_reason."""
    request, prompt, wants_logprobs = job.request(index), job.prompt(index), job.body.logprobs is not None
    at = len(prompt)
    if prompt and not wants_logprobs:  # with them, the prompt's have to come first
        yield Choice(text=prompt, index=index)
    is_begun = not (prompt and wants_logprobs)
    offsets, held = TokenOffsets(job.tokenizer), []
    async for chunk in request.chunks():
        if is_begun:
            at += len(chunk.text)
            held += offsets.of(chunk.logprobs)
            ready = job.kept(held, at)
            held = held[len(ready) :]
            yield Choice(text=chunk.text, index=index, logprobs=_logprobs(ready) if wants_logprobs else None)
    if not is_begun:
        yield await job.choice(index)
        return
    completion = await request.completion()
    end = _end(completion, at)
    yield Choice(text="", index=index, logprobs=_logprobs(end) if end else None, finish_reason=completion.finish_reason)


async def _merged(sources: Sequence[AsyncIterator[Choice]]) -> AsyncIterator[Choice]:
    """The choices of all sources, as they come. Raises: what any of them raises."""
    queue: asyncio.Queue[Choice | BaseException | None] = asyncio.Queue()

    async def drain(source: AsyncIterator[Choice]) -> None:
        try:
            async for choice in source:
                queue.put_nowait(choice)
            queue.put_nowait(None)
        except Exception as error:  # handed over to the reader
            queue.put_nowait(error)

    tasks = [asyncio.ensure_future(drain(source)) for source in sources]
    try:
        left = len(tasks)
        while left:
            choice = await queue.get()
            if isinstance(choice, BaseException):
                raise choice
            if choice is None:
                left -= 1
            else:
                yield choice
    finally:
        for task in tasks:
            task.cancel()
