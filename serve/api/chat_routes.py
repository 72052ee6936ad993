"""`POST /v1/chat/completions`, whole and streamed: what the user said last is the beginning of a story.

In: a conversation, and how many answers it gets. Out: choices in OpenAI's shape. `routes.py` adds the route.
"""

import asyncio
from collections.abc import AsyncIterator, Sequence

from fastapi import FastAPI, Request
from fastapi.responses import Response

from serve.api.chat_schemas import (
    MAX_TOP_LOGPROBS,
    Answer,
    ChatAnswer,
    ChatChoice,
    ChatChunk,
    ChatDelta,
    ChatLogprob,
    ChatLogprobs,
    ChatRequest,
    TopLogprob,
)
from serve.api.error_responses import answer_docs
from serve.api.metrics import Metrics
from serve.api.openai_jobs import Fault, Job, rejected
from serve.api.openai_schemas import CompletionUsage
from serve.api.settings import ApiSettings
from serve.api.streaming import EventStream, submit_answers, unless_disconnected
from serve.api.token_offsets import Placed, TokenOffsets
from serve.models.rollout import Rollout
from slm_ray.generation.logprobs import TokenLogprob
from slm_ray.generation.request import Completion
from slm_ray.tokenization.token_bytes import token_bytes
from slm_ray.tokenization.tokenizer import Tokenizer

PATH = "/v1/chat/completions"
_NOT_OURS = "this model writes stories and calls no {}: leave {} out, or send {} as none"


class _Job(Job[ChatDelta]):
    """One conversation with the answers that are being written for it."""

    def __init__(self, body: ChatRequest, rollout: Rollout, metrics: Metrics) -> None:
        params = [body.sampling(number) for number in range(body.count)]
        requests = submit_answers(rollout, body.last_said, params, metrics)
        super().__init__(body, requests, kind="chatcmpl", each=body.count)
        self._has_logprobs = bool(body.logprobs)

    def chunk(self, choices: list[ChatDelta], usage: CompletionUsage | None = None) -> ChatChunk:
        """An event of the stream."""
        return ChatChunk(**self.frame, choices=choices, usage=usage)

    async def answer(self, done: Sequence[Completion]) -> ChatAnswer:
        """All of it."""
        choices = []
        for index, completion in enumerate(done):
            choices.append(self._choice(index, completion))
            await asyncio.sleep(0)  # others have their turn between two
        return ChatAnswer(**self.frame, choices=choices, usage=self.usage(done))

    def _choice(self, index: int, completion: Completion) -> ChatChoice:
        placed = TokenOffsets(self.tokenizer).of(completion.logprobs)
        return ChatChoice(
            index=index,
            message=Answer(content=completion.text),
            logprobs=self._logprobs(self.kept(placed, len(completion.text))),
            finish_reason=completion.finish_reason,
        )

    async def deltas(self, index: int) -> AsyncIterator[ChatDelta]:
        """The chunks of one answer: its role at once, its text as it comes, why it ended."""
        yield ChatDelta(index=index, delta={"role": "assistant", "content": ""})
        at, offsets, held = 0, TokenOffsets(self.tokenizer), list[Placed]()
        async for chunk in self.requests[index].chunks():
            at += len(chunk.text)
            held += offsets.of(chunk.logprobs)
            ready = self.kept(held, at)
            held = held[len(ready) :]
            yield ChatDelta(index=index, delta={"content": chunk.text}, logprobs=self._logprobs(ready))
        completion = await self.requests[index].completion()
        yield ChatDelta(index=index, delta={}, finish_reason=completion.finish_reason)

    def _logprobs(self, placed: Sequence[Placed]) -> ChatLogprobs | None:
        """Without the end-of-text token, which is no part of the text."""
        if not self._has_logprobs:
            return None
        return ChatLogprobs.model_construct(content=[_entry(one, self.tokenizer) for one, _ in placed])


def _entry(token: TokenLogprob, tokenizer: Tokenizer) -> ChatLogprob:
    top = [_chance(*one, tokenizer) for one in token.top]
    return {**_chance(token.token, token.text, token.logprob, tokenizer), "top_logprobs": top}


def _chance(token: int, text: str, logprob: float, tokenizer: Tokenizer) -> TopLogprob:
    return {"token": text, "bytes": list(token_bytes(tokenizer, token, text)), "logprob": logprob}


def add_chat_route(api: FastAPI, rollout: Rollout, settings: ApiSettings, metrics: Metrics) -> None:
    """Add it to the application."""
    responses = answer_docs("answers")

    @api.post(PATH, responses=responses, response_model=ChatAnswer)
    async def chat(body: ChatRequest, request: Request) -> ChatAnswer | Response:
        """Answer what the user said last: a story that begins so."""
        refusal = rejected(PATH, body, 1, rollout, settings, _faults(body))
        if refusal is not None:
            return refusal
        job = _Job(body, rollout, metrics)
        if body.stream:
            deltas = [job.deltas(index) for index in range(body.count)]
            return EventStream(job.events(deltas, settings.request_timeout_s), job.cancel)
        try:
            async with asyncio.timeout(settings.request_timeout_s):
                work = asyncio.gather(*(one.completion() for one in job.requests))
                return await job.answer(await unless_disconnected(request, work))
        finally:
            job.cancel()


def _faults(body: ChatRequest) -> list[Fault]:
    wants_tools = bool(body.tools) and body.tool_choice != "none"
    likeliest = body.count * body.most_tokens * (body.top_logprobs or 0)
    wants_functions = bool(body.functions) and body.function_call != "none"
    return [
        (
            not body.last_said,
            "messages",
            "messages holds nothing that the user says: the last message of the role user begins the story",
        ),
        (wants_tools, "tools", _NOT_OURS.format("tools", "tools", "tool_choice")),
        (wants_functions, "functions", _NOT_OURS.format("functions", "functions", "function_call")),
        (body.tool_choice not in (None, "none", "auto"), "tool_choice", "this model calls no tools: leave it out"),
        (body.function_call not in (None, "none", "auto"), "function_call", "this model calls no functions"),
        (
            (body.response_format or {}).get("type", "text") != "text",
            "response_format",
            "this model writes stories, no JSON: leave response_format out, or give the type text",
        ),
        (body.modalities not in (None, ["text"]), "modalities", "this model writes text alone"),
        (
            bool(body.top_logprobs) and not body.logprobs,
            "top_logprobs",
            "top_logprobs needs logprobs: set logprobs to true",
        ),
        (
            likeliest > MAX_TOP_LOGPROBS,
            "top_logprobs",
            f"{likeliest} likeliest tokens are more than the {MAX_TOP_LOGPROBS} of one request: ask for fewer, or for "
            "fewer or shorter answers",
        ),
    ]
