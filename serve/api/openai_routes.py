"""OpenAI's routes: `POST /v1/completions`, whole and streamed, and `GET /v1/models`. The official clients speak them.

In: requests for one or several prompts, each with n stories. Out: choices in OpenAI's shape. `routes.py` adds them.
"""

import asyncio
from collections.abc import AsyncIterator, Sequence
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response

from serve.api.error_responses import answer_docs, error_docs
from serve.api.metrics import Metrics
from serve.api.openai_jobs import Fault, Job, no_model, rejected
from serve.api.openai_schemas import (
    MAX_PROMPTS,
    Choice,
    CompletionAnswer,
    CompletionRequest,
    CompletionUsage,
    Logprobs,
    ModelCard,
    ModelList,
)
from serve.api.settings import ApiSettings
from serve.api.streaming import EventStream, StreamingRequest, submit_stories, unless_disconnected
from serve.api.token_offsets import Placed, TokenOffsets
from serve.models.rollout import Rollout
from slm_ray.generation.logprobs import TokenLogprob
from slm_ray.generation.request import Completion

PATH = "/v1/completions"


class _Job(Job[Choice]):
    """One request for one or several prompts."""

    def __init__(self, body: CompletionRequest, rollout: Rollout, metrics: Metrics) -> None:
        prompts = body.prompts()
        each = body.count if body.most_tokens else 1  # where nothing is written, one measures for all
        stories = [(prompt, body.sampling(number)) for prompt in prompts for number in range(each)]
        super().__init__(body, submit_stories(rollout, stories, metrics), kind="cmpl", each=each)
        self.body = body
        self.count = len(prompts) * body.count
        self._prompts = [_text(prompt, self.tokenizer) for prompt in prompts]
        self._measured: dict[int, tuple[list[Placed], TokenOffsets]] = {}  # by prompt

    def chunk(self, choices: list[Choice], usage: CompletionUsage | None = None) -> CompletionAnswer:
        """An answer, or in a stream a piece of one."""
        return CompletionAnswer(**self.frame, choices=choices, usage=usage)

    def prompt(self, index: int) -> str:
        """What choice `index` begins with: its prompt where `echo` asks for it."""
        return self._prompts[index // self.body.count] if self.body.echo else ""

    def request(self, index: int) -> StreamingRequest:
        """What writes choice `index`."""
        prompt, number = divmod(index, self.body.count)
        each = len(self.requests) // len(self._prompts)
        return self.requests[prompt * each + min(number, each - 1)]

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


def add_openai_routes(api: FastAPI, rollout: Rollout, settings: ApiSettings, metrics: Metrics) -> None:
    """Add them to the application."""
    responses = answer_docs("stories")

    @api.post(PATH, responses=responses, response_model=CompletionAnswer)
    async def completions(body: CompletionRequest, request: Request) -> CompletionAnswer | Response:
        """Continue one prompt or several, in OpenAI's form."""
        refusal = rejected(PATH, body, len(body.prompts()), rollout, settings, _faults(body))
        if refusal is not None:
            return refusal
        job = _Job(body, rollout, metrics)
        if body.stream:
            choices = [_choices(job, index) for index in range(job.count)]
            return EventStream(job.events(choices, settings.request_timeout_s), job.cancel)
        try:
            async with asyncio.timeout(settings.request_timeout_s):
                work = asyncio.gather(*(one.completion() for one in job.requests))
                done: list[Completion] = await unless_disconnected(request, work)
                whole = [await job.choice(index) for index in range(job.count)]
        finally:
            job.cancel()
        return job.chunk(whole, job.usage(done))

    @api.get("/v1/models", responses=error_docs(401, 429, is_openai=True))
    async def models() -> ModelList:
        """The models that can be asked: one."""
        return ModelList(data=[_card(rollout)])

    @api.get("/v1/models/{name:path}", responses=error_docs(401, 404, 429, is_openai=True), response_model=ModelCard)
    async def model(name: str, request: Request) -> ModelCard | JSONResponse:
        """One of them."""
        return _card(rollout) if name == _card(rollout).id else no_model(request.url.path, name)


def _card(rollout: Rollout) -> ModelCard:
    model = rollout.current
    return ModelCard(id=model.version.name, created=model.loaded_at)


def _faults(body: CompletionRequest) -> list[Fault]:
    n_prompts = len(body.prompts())
    return [
        (not 1 <= n_prompts <= MAX_PROMPTS, "prompt", f"prompt must hold 1 to {MAX_PROMPTS} prompts"),
        (body.best_of not in (None, body.count), "best_of", "best_of is not supported: leave it out, or give n"),
    ]


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
