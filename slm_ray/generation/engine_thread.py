"""One engine shared by many callers: a thread that steps it while there is something to write.

In: requests from any thread or event loop. Out: a future each, and pieces of text as they come. `serve/` puts HTTP
around it. Requests join the running batch at the next token; cancelling a future frees its row within two tokens.
"""

import collections
import dataclasses
import logging
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future

from slm_ray.generation.engine import Engine
from slm_ray.generation.request import Completion, Piece, Story
from slm_ray.generation.sampling import SamplingParams

LOGGER = logging.getLogger(__name__)
MAX_PIECES_PER_S = 200.0
"""Pieces handed out per second, of all stories together: what an HTTP proxy passes on without slowing the engine."""
OnPiece = Callable[[Piece], None]


class EngineBusyError(RuntimeError):
    """As many requests wait as may wait: try again later."""


class EngineError(RuntimeError):
    """A step of the engine failed while the request was being written."""


class EngineClosedError(RuntimeError):
    """The engine was closed before the request was answered."""


@dataclasses.dataclass(frozen=True)
class Load:
    """How much there is to do."""

    running: int
    """Stories being written."""
    waiting: int
    """Stories that wait for a row."""


@dataclasses.dataclass
class _Request:
    future: "Future[Completion]"
    on_piece: OnPiece | None
    handed_s: float = 0.0  # when a piece was handed out, in perf_counter's time


class EngineThread:
    """Owns an `Engine`: after this nobody else may step it.

    With many readers, pieces of several tokens are handed out, no more than `max_pieces_per_s` of all stories
    together. The first piece of a story and its last never wait.
    """

    def __init__(self, engine: Engine, max_waiting: int = 64, max_pieces_per_s: float = MAX_PIECES_PER_S) -> None:
        self._engine = engine
        self._most = engine.backend.max_rows + max_waiting
        self._piece_s = 1 / max_pieces_per_s
        self._requests: dict[Story, _Request] = {}
        self._arrived: collections.deque[Story] = collections.deque()
        self._changed = threading.Condition()
        self._is_closing = False
        self._is_closed = False
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._thread.start()

    def submit(
        self, prompt: str | Sequence[int], params: SamplingParams, on_piece: OnPiece | None = None
    ) -> "Future[Completion]":
        """Ask for a continuation. The future may be cancelled at any time.

        `on_piece` is called in the engine's thread, in order, with every piece before the future is done; it must not
        wait for anything. When it raises, the story is given up with its error.

        Raises:
            PromptError: the prompt is longer than the context, or nothing that the model can read.
            EngineBusyError: too many requests wait already.
            EngineClosedError: `close` was called.
        """
        story = self._engine.story(prompt, params)
        future: Future[Completion] = Future()
        with self._changed:
            if self._is_closing:
                raise EngineClosedError("the engine is closed")
            if len(self._requests) >= self._most:
                raise EngineBusyError(f"{self._most} stories are being written or wait already")
            self._requests[story] = _Request(future, on_piece)
            self._arrived.append(story)
            self._changed.notify_all()
        return future

    @property
    def load(self) -> Load:
        """How many stories are being written and how many wait, about now."""
        with self._changed:
            running = min(self._engine.running, len(self._requests))
            return Load(running, len(self._requests) - running)

    def close(self, drain_s: float = 0.0) -> None:
        """Take no more requests, finish those there are for `drain_s` seconds, and fail the rest.

        What is failed fails with `EngineClosedError`.
        """
        with self._changed:
            self._is_closing = True
            self._changed.wait_for(lambda: not self._requests, timeout=drain_s)
            self._is_closed = True
            self._changed.notify_all()
        self._thread.join()

    def _run(self) -> None:
        while self._take_arrived():
            try:
                over = self._engine.step()
            except Exception as error:  # a failed step must not end the thread: later requests may succeed
                LOGGER.exception("a step of the engine failed")
                failure = EngineError(f"a step of the engine failed: {error}")
                failure.__cause__ = error
                self._fail(self._engine.drop_running(), failure)
                continue
            self._hand_out_pieces()
            for story in over:
                self._answer(story)
        self._fail(list(self._requests), EngineClosedError("the engine was closed"))

    def _take_arrived(self) -> bool:
        """Wait for something to do and hand new requests to the engine; False once closed."""
        with self._changed:
            while not (self._is_closed or self._arrived or not self._engine.is_idle):
                self._changed.wait()
            while self._arrived:
                self._engine.add(self._arrived.popleft())
            for story in [story for story, request in self._requests.items() if request.future.cancelled()]:
                story.is_cancelled = True
                self._forget(story)
            return not self._is_closed

    def _hand_out_pieces(self) -> None:
        with self._changed:
            streamed = [(story, request) for story, request in self._requests.items() if request.on_piece]
        now, interval_s = time.perf_counter(), len(streamed) * self._piece_s
        for story, request in streamed:
            if not story.is_over and now < request.handed_s + interval_s:
                continue
            piece = story.take_piece()
            if piece is None or request.on_piece is None or request.future.cancelled():
                continue
            request.handed_s = now
            try:
                request.on_piece(piece)
            except Exception as error:  # one reader's fault is not the others'
                story.is_cancelled = True
                self._fail([story], error)

    def _answer(self, story: Story) -> None:
        with self._changed:
            request = self._forget(story)
        if request is not None and request.future.set_running_or_notify_cancel():
            request.future.set_result(story.completion())

    def _fail(self, stories: list[Story], error: Exception) -> None:
        with self._changed:
            requests = [self._forget(story) for story in stories]
        for request in requests:
            if request is not None and request.future.set_running_or_notify_cancel():
                request.future.set_exception(error)

    def _forget(self, story: Story) -> _Request | None:
        """Called with the lock held."""
        request = self._requests.pop(story, None)
        self._changed.notify_all()
        return request
