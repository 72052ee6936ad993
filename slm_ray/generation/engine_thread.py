"""One engine shared by many callers: a thread that steps it while there is something to write.

In: prompts from any thread or event loop. Out: a future each, and chunks of text as they come. `serve/` puts HTTP
around it. Requests join the running batch at the next token; cancelling a future frees its slot within two tokens.
"""

import collections
import dataclasses
import logging
import math
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future

from slm_ray.generation.engine import Engine, prompt_ids
from slm_ray.generation.request import Chunk, Completion, Request
from slm_ray.generation.sampling import SamplingParams

LOGGER = logging.getLogger(__name__)
MAX_CHUNKS_PER_S = 200.0
"""Chunks sent per second, of all requests together: what an HTTP proxy passes on without slowing the engine."""
LEAST_CHUNK_S = 1 / 60
"""Shortest time between two chunks of a request: no screen shows more."""
OnChunk = Callable[[Chunk], None]


class EngineBusyError(RuntimeError):
    """As many requests wait as may wait: try again later."""


class EngineError(RuntimeError):
    """The request, or a step of the engine, failed while it was being written."""


class EngineClosedError(RuntimeError):
    """The engine was closed before the request was answered."""


@dataclasses.dataclass(frozen=True)
class Load:
    """How much there is to do."""

    running: int
    """Requests that have a slot."""
    waiting: int
    """Requests that wait for one."""


@dataclasses.dataclass(frozen=True)
class Order:
    """A continuation that is asked for."""

    prompt: str | Sequence[int]
    params: SamplingParams
    on_chunk: OnChunk | None = None
    may_cut: bool = False
    """Whether a text that is longer than the context is read from its newest tokens on, in place of an error."""


@dataclasses.dataclass
class _Reply:
    """Where the result of a request goes."""

    future: "Future[Completion]"
    on_chunk: OnChunk | None
    is_begun: bool = False  # whether a chunk was sent


def _refuse_too_many(taken: int, more: int, most: int) -> None:
    if taken + more > most:
        raise EngineBusyError(f"{taken} stories are being written or wait, of {most} at most")


def _requests(engine: Engine, orders: "Sequence[Order]") -> "list[tuple[Request, _Reply]]":
    """The requests; a prompt of several stories is read once."""
    ids: dict[tuple[object, bool], list[int]] = {}
    requests = []
    for one in orders:
        prompt = one.prompt if isinstance(one.prompt, str) else tuple(one.prompt)
        limit = engine.backend.config.seq_len - 1
        if (prompt, one.may_cut) not in ids:
            ids[prompt, one.may_cut] = prompt_ids(one.prompt, limit, engine.tokenizer, may_cut=one.may_cut)
        request = engine.request(ids[prompt, one.may_cut], one.params)
        requests.append((request, _Reply(Future(), one.on_chunk)))
    return requests


class EngineThread:
    """Owns an `Engine`: after this nobody else may step it.

    A chunk holds several tokens: no more than `max_chunks_per_s` are sent, of all requests together, and all at the
    same moments, at least `least_chunk_s` apart: each takes a core from the engine. The first and the last never wait.
    """

    def __init__(
        self,
        engine: Engine,
        max_waiting: int = 64,
        max_chunks_per_s: float = MAX_CHUNKS_PER_S,
        least_chunk_s: float = LEAST_CHUNK_S,
    ) -> None:
        self._engine = engine
        self._most = engine.backend.max_slots + max_waiting
        self._chunk_s, self._least_chunk_s = 1 / max_chunks_per_s, least_chunk_s
        self._sent_s = -math.inf  # when all readers' were; perf_counter may begin at 0 with the machine
        self._replies: dict[Request, _Reply] = {}
        self._arrived: collections.deque[Request] = collections.deque()
        self._changed = threading.Condition()
        self._failures = 0
        self._is_closing = self._is_closed = False
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._thread.start()

    def submit(
        self, prompt: str | Sequence[int], params: SamplingParams, on_chunk: OnChunk | None = None
    ) -> "Future[Completion]":
        """Ask for a continuation. The future may be cancelled at any time.

        `on_chunk` is called in the engine's thread, in order, with every chunk before the future is done; it must not
        wait for anything. When it raises, the request fails with its error.

        Raises:
            PromptError: the prompt is longer than the context, or nothing that the model can read.
            EngineBusyError: too many requests wait already.
            EngineClosedError: `close` was called.
        """
        (future,) = self.submit_all([Order(prompt, params, on_chunk)])
        return future

    def submit_all(self, orders: "Sequence[Order]") -> "list[Future[Completion]]":
        """Ask for several continuations; where there is not room for all, none is taken. Raises: as `submit`."""
        with self._changed:
            _refuse_too_many(len(self._replies), len(orders), self._most)  # before any prompt is read
        requests = _requests(self._engine, orders)
        with self._changed:
            if self._is_closing:
                raise EngineClosedError("the engine is closed")
            _refuse_too_many(len(self._replies), len(requests), self._most)
            self._replies.update(requests)
            self._arrived.extend(request for request, _ in requests)
            self._changed.notify_all()
        return [reply.future for _, reply in requests]

    @property
    def load(self) -> Load:
        """How many requests run and how many wait, about now."""
        with self._changed:
            running = min(self._engine.running, len(self._replies))
            return Load(running, len(self._replies) - running)

    @property
    def failures(self) -> int:
        """Stories that failed, one after another, since the last that did not."""
        return self._failures

    def close(self, drain_s: float = 0.0) -> None:
        """Take no more requests, finish those there are for `drain_s` seconds, and fail the rest.

        What is failed fails with `EngineClosedError`.
        """
        with self._changed:
            self._is_closing = True
            self._changed.wait_for(lambda: not self._replies, timeout=drain_s)
            self._is_closed = True
            self._changed.notify_all()
        self._thread.join()

    def _run(self) -> None:
        while self._take_arrived():
            try:
                finished = self._engine.step()
            except BaseException as error:  # a failed step must not end the thread: later requests may succeed
                LOGGER.exception("a step of the engine failed")
                self._failures += 1
                self._fail(self._engine.drop_running(), _engine_error(error))
                continue
            self._send_chunks()
            for request in finished:
                self._answer(request)
        self._fail(list(self._replies), EngineClosedError("the engine was closed"))

    def _take_arrived(self) -> bool:
        """Wait for something to do and hand new requests to the engine; False once closed."""
        with self._changed:
            while not (self._is_closed or self._arrived or not self._engine.is_idle):
                self._changed.wait()
            while self._arrived:
                self._engine.add(self._arrived.popleft())
            for request in [request for request, reply in self._replies.items() if reply.future.cancelled()]:
                request.is_cancelled = True
                self._forget(request)
            return not self._is_closed

    def _send_chunks(self) -> None:
        with self._changed:
            replies = [(request, reply) for request, reply in self._replies.items() if reply.on_chunk]
        streamed = [one for one in replies if one[0].is_read]  # those in line have nothing to send
        now, interval_s = time.perf_counter(), max(len(streamed) * self._chunk_s, self._least_chunk_s)
        is_due = now >= self._sent_s + interval_s
        self._sent_s = now if is_due else self._sent_s
        for request, reply in streamed:
            if reply.is_begun and not (is_due or request.is_finished):
                continue
            chunk = request.take_chunk()
            if chunk is None or reply.on_chunk is None or reply.future.cancelled():
                continue
            reply.is_begun = True
            try:
                reply.on_chunk(chunk)
            except BaseException as error:  # one reader's fault is not the others'
                request.is_cancelled = True
                self._fail([request], error)

    def _answer(self, request: Request) -> None:
        if request.fault is not None:
            LOGGER.error("a story failed", exc_info=request.fault)
            self._failures += 1
            self._fail([request], _engine_error(request.fault))
            return
        self._failures = 0
        with self._changed:
            reply = self._forget(request)
        if reply is not None and reply.future.set_running_or_notify_cancel():
            reply.future.set_result(request.completion())

    def _fail(self, requests: list[Request], error: BaseException) -> None:
        with self._changed:
            replies = [self._forget(request) for request in requests]
        for reply in replies:
            if reply is not None and reply.future.set_running_or_notify_cancel():
                reply.future.set_exception(error)

    def _forget(self, request: Request) -> _Reply | None:
        """Called with the lock held."""
        reply = self._replies.pop(request, None)
        self._changed.notify_all()
        return reply


def _engine_error(cause: BaseException) -> EngineError:
    error = EngineError(f"a step of the engine failed: {cause}")
    error.__cause__ = cause
    return error
