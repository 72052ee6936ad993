"""One engine shared by many callers: a thread that steps it while there is something to write.

In: requests from any thread or event loop. Out: a future each. `serve/app.py` puts HTTP around it. Requests join the
running batch at the next token; cancelling a future frees its row within one token.
"""

import collections
import logging
import threading
from concurrent.futures import Future

from slm_ray.engine import Completion, Engine, Story
from slm_ray.sampling import SamplingParams

LOGGER = logging.getLogger(__name__)


class EngineBusyError(RuntimeError):
    """As many requests wait as may wait: try again later."""


class EngineClosedError(RuntimeError):
    """The engine was closed before the request was answered."""


class EngineThread:
    """Owns an `Engine`: after this nobody else may step it."""

    def __init__(self, engine: Engine, max_waiting: int = 64) -> None:
        self._engine = engine
        self._most = engine.backend.max_rows + max_waiting
        self._futures: dict[Story, Future[Completion]] = {}
        self._arrived: collections.deque[Story] = collections.deque()
        self._changed = threading.Condition()
        self._is_closed = False
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._thread.start()

    def submit(self, prompt: str, params: SamplingParams) -> "Future[Completion]":
        """Ask for a continuation. The future may be cancelled at any time; its row is free one token later.

        Raises:
            PromptError: the prompt is longer than the context.
            EngineBusyError: too many requests wait already.
            EngineClosedError: `close` was called.
        """
        story = self._engine.story(prompt, params)
        future: Future[Completion] = Future()
        with self._changed:
            if self._is_closed:
                raise EngineClosedError("the engine is closed")
            if len(self._futures) >= self._most:
                raise EngineBusyError(f"{self._most} stories are being written or wait already")
            self._futures[story] = future
            self._arrived.append(story)
            self._changed.notify()
        return future

    def close(self) -> None:
        """Stop the thread; what is unanswered fails with `EngineClosedError`."""
        with self._changed:
            self._is_closed = True
            self._changed.notify()
        self._thread.join()

    def _run(self) -> None:
        while self._take_arrived():
            try:
                for story in self._engine.step():
                    self._answer(story)
            except Exception as error:  # a failed step must not end the thread: later requests may succeed
                LOGGER.exception("a step of the engine failed")
                self._fail_all(error)
        self._fail_all(EngineClosedError("the engine was closed"))

    def _take_arrived(self) -> bool:
        """Wait for something to do and hand new requests to the engine; False once closed."""
        with self._changed:
            while not (self._is_closed or self._arrived or not self._engine.is_idle):
                self._changed.wait()
            while self._arrived:
                self._engine.add(self._arrived.popleft())
            for story in [story for story, future in self._futures.items() if future.cancelled()]:
                story.is_cancelled = True
                del self._futures[story]
            return not self._is_closed

    def _answer(self, story: Story) -> None:
        with self._changed:
            future = self._futures.pop(story, None)
        if future is not None and future.set_running_or_notify_cancel():
            future.set_result(story.completion())

    def _fail_all(self, error: Exception) -> None:
        with self._changed:
            futures, self._futures = list(self._futures.values()), {}
            self._arrived.clear()
            self._engine.clear()
        for future in futures:
            if future.set_running_or_notify_cancel():
                future.set_exception(error)
