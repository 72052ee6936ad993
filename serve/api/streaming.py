"""From the engine's thread to a client's connection: chunks of a story as they come.

In: a prompt for the rollout. Out: chunks, then the completion; server-sent events over HTTP. A client that disconnects
cancels its requests in the engine.
"""

import asyncio
import json
import time
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import Future
from typing import Any

from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from serve.api.metrics import Metrics, Operation, Story
from serve.api.tracing import story_trace
from serve.models.loaded_model import LoadedModel
from serve.models.rollout import Rollout
from slm_ray.generation.engine_thread import Order
from slm_ray.generation.request import Chunk, Completion
from slm_ray.generation.sampling import SamplingParams


class ClientDisconnectedError(Exception):
    """The client disconnected before its answer."""


class StreamingRequest:
    """A request to the engine whose chunks arrive in this event loop. `submit_stories` makes it."""

    model: LoadedModel
    _future: "Future[Completion]"

    def __init__(self, metrics: Metrics, operation: Operation = "text_completion") -> None:
        self._loop = asyncio.get_running_loop()
        self._operation: Operation = operation
        self._trace = story_trace()
        self._queue: asyncio.Queue[Chunk | None] = asyncio.Queue()
        self._metrics = metrics
        self._began = time.perf_counter()
        self._first = self._ended = 0.0  # when the first chunk came, and when there was no more
        self._is_counted = False

    def follow(self, model: LoadedModel, future: "Future[Completion]") -> None:
        """Wait for what a model was asked for."""
        self.model, self._future = model, future
        future.add_done_callback(lambda _: self._end())
        if self._trace is not None:
            future.add_done_callback(lambda _: self._in_loop(self._end_trace))

    def receive(self, chunk: Chunk) -> None:
        """Take a chunk, in the engine's thread."""
        self._first = self._first or time.perf_counter()
        self._put(chunk)

    def _end(self) -> None:
        self._ended = time.perf_counter()
        self._put(None)

    def _put(self, chunk: Chunk | None) -> None:
        self._in_loop(self._queue.put_nowait, chunk)

    def _in_loop(self, call: Callable[..., object], *arguments: object) -> None:
        if not self._loop.is_closed():
            self._loop.call_soon_threadsafe(call, *arguments)

    @property
    def _story(self) -> Story:
        version = self.model.version
        return Story(operation=self._operation, model=version.name, version=version.version)

    def _end_trace(self) -> None:
        assert self._trace is not None
        self._trace.end(self._story, self._future)

    async def chunks(self) -> AsyncIterator[Chunk]:
        """All chunks, until the request is finished. Whoever reads on after the last finds none."""
        while (chunk := await self._queue.get()) is not None:
            yield chunk
        self._queue.put_nowait(None)  # where nothing is written, several choices wait for one request

    async def completion(self) -> Completion:
        """The finished request. Raises: what the engine failed with."""
        completion = await asyncio.wrap_future(self._future)
        self.seconds = self._ended - self._began  # a client that reads slowly makes no story slow
        if not self._is_counted:
            first_s = (self._first or self._ended) - self._began
            self._metrics.count_story(self._story, completion, first_s=first_s, all_s=self.seconds)
        self._is_counted = True
        return completion

    def cancel(self) -> None:
        """Free its slot; nothing happens to a finished one."""
        self._future.cancel()


def submit_stories(
    rollout: Rollout, stories: "Sequence[tuple[str | Sequence[int], SamplingParams]]", metrics: Metrics
) -> list[StreamingRequest]:
    """Ask one version of the model for all of them, or for none.

    Raises: PromptError, EngineBusyError, EngineClosedError.
    """
    requests = [StreamingRequest(metrics) for _ in stories]
    orders = [Order(*story, request.receive) for story, request in zip(stories, requests)]
    return _following(requests, *rollout.submit_all(lambda _: orders))


def submit_with_words(
    rollout: Rollout, words: Sequence[str], beginning: str, params: SamplingParams, metrics: Metrics
) -> StreamingRequest:
    """The same for a story that uses these words. Raises: InstructionError too."""
    request = StreamingRequest(metrics)

    def orders_for(model: LoadedModel) -> list[Order]:
        return [Order(model.prompt_with_words(words, beginning), params, request.receive)]

    return _following([request], *rollout.submit_all(orders_for))[0]


def submit_answers(
    rollout: Rollout, said: str, params: Sequence[SamplingParams], metrics: Metrics
) -> list[StreamingRequest]:
    """The same for answers to what a user said: the template of the model that takes them makes a prompt of it.

    What is longer than the context is read from its newest half context on.
    """
    requests = [StreamingRequest(metrics, "chat") for _ in params]

    def orders_for(model: LoadedModel) -> list[Order]:
        prompt = model.prompt_of(said)
        return [Order(prompt, own, one.receive, may_cut=True) for own, one in zip(params, requests, strict=True)]

    return _following(requests, *rollout.submit_all(orders_for))


def _following(
    requests: list[StreamingRequest], model: LoadedModel, futures: "Sequence[Future[Completion]]"
) -> list[StreamingRequest]:
    for request, future in zip(requests, futures, strict=True):
        request.follow(model, future)
    return requests


async def unless_disconnected(request: Request, work: Any) -> Any:
    """The result of a coroutine, cancelled when the client disconnects.

    Raises: ClientDisconnectedError, or what the coroutine raises.
    """
    task, gone = asyncio.ensure_future(work), asyncio.ensure_future(_disconnected(request.receive))
    try:
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            return task.result()
        raise ClientDisconnectedError
    finally:
        for one in (task, gone):
            one.cancel()


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


def event(content: Any) -> bytes:
    """One server-sent event."""
    return f"data: {json.dumps(content, separators=(',', ':'))}\n\n".encode()


class EventStream(Response):
    """Sends events as they come; `stop` is called at the end, also when the client left before the first one."""

    media_type = "text/event-stream"

    def __init__(self, events: AsyncIterator[bytes], stop: Callable[[], None]) -> None:
        super().__init__(headers={"Cache-Control": "no-store", "X-Accel-Buffering": "no"})
        del self.headers["content-length"]
        self._events = events
        self._stop = stop  # a generator that was never begun does not run its own `finally`

    async def __call__(self, _: Scope, receive: Receive, send: Send) -> None:
        """Send until the end, or until the client disconnects."""
        task, gone = asyncio.ensure_future(self._send(send)), asyncio.ensure_future(_disconnected(receive))
        try:
            await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
            if task.done() and not task.cancelled():  # cancelled: the time was up while the client read nothing
                task.result()
        finally:
            self._stop()
            for one in (task, gone):
                one.cancel()
            await asyncio.gather(task, gone, return_exceptions=True)
            await self._events.aclose()  # type: ignore[attr-defined]  # they are generators

    async def _send(self, send: Send) -> None:
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        async for content in self._events:
            await send({"type": "http.response.body", "body": content, "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})
