"""Continuous batching: many requests at once, each in a slot of the cache at its own length.

In: a `Backend` (which holds the model and its cache), the `Tokenizer`, prompts with their `SamplingParams`. Out:
continuations, whole or chunk by chunk, to the trainer, `generate.py` and `engine_thread.py`.

Every story followed the end-of-text token in training, so the model is fed that and then the prompt. When a slot's
`seq_len` positions are full, its request goes to the head of the line, and goes on from the last half of its tokens.
"""

import collections
from collections.abc import Iterator, Sequence

import numpy as np

from slm_ray.errors import UserError
from slm_ray.generation.backend import Backend, Logits
from slm_ray.generation.request import Completion, Reading, Request
from slm_ray.generation.sampling import SamplingParams, draw
from slm_ray.generation.token_weights import weighed
from slm_ray.tokenization.tokenizer import Tokenizer, TokenizerError

PROMPT_TOKENS_PER_STEP = 128
"""Of prompts that are read between two tokens of those that are being written."""


class PromptError(UserError):
    """A prompt that cannot be continued; the message says why."""


class BiasError(PromptError):
    """A bias of a token that the model does not have."""


class Engine:
    """A running batch of up to `backend.max_slots` requests: they join and leave it at any token.

    For one thread at a time; `EngineThread` shares it among many. Only `request` may be called from anywhere.
    """

    def __init__(self, backend: Backend, tokenizer: Tokenizer) -> None:
        self.backend = backend
        self.tokenizer = tokenizer
        self._running: list[Request] = []  # those in slots 0, 1, ... of the backend, in this order
        self._line = _Line(backend)
        self._finished: list[Request] = []  # not returned yet: what was finished before a step failed

    def generate(self, prompts: Sequence[str | Sequence[int]], params: Sequence[SamplingParams]) -> list[Completion]:
        """Continue every prompt; more than the backend has slots take turns.

        Raises:
            PromptError: a prompt is longer than the context, before anything runs.
            Exception: what one of them failed with.
        """
        requests = [self.request(prompt, own) for prompt, own in zip(prompts, params, strict=True)]
        for request in requests:
            self.add(request)
        while not all(request.is_finished for request in requests):
            self.step()
        return [request.completion() for request in requests]

    def stream(self, prompt: str, params: SamplingParams) -> Iterator[str]:
        """Continue one prompt, in chunks of whole characters that join to its continuation.

        Closing the iterator cancels the request. Raises: PromptError when the first chunk is asked for.
        """
        request = self.request(prompt, params)
        self.add(request)
        try:
            while not request.is_finished:
                self.step()
                chunk = request.take_chunk()
                if chunk is not None and chunk.text:
                    yield chunk.text
            if request.fault is not None:
                raise request.fault
        finally:
            request.is_cancelled = request.finish_reason is None

    def request(self, prompt: str | Sequence[int], params: SamplingParams, *, may_cut: bool = False) -> Request:
        """Check and encode a prompt, text or tokens; `add` puts the request in line.

        With `may_cut`, a text that is longer than the context is no error: it is read as a story that outgrew the
        context, its newest `seq_len // 2` tokens alone.

        Raises:
            PromptError: the prompt is longer than the context, no Unicode text, or holds no tokens of the vocabulary.
            BiasError: a bias is for none of them.
        """
        _check_biases(params, self.tokenizer)
        ids = prompt_ids(prompt, self.backend.config.seq_len - 1, self.tokenizer, may_cut=may_cut)
        return Request(self.tokenizer, ids, params)

    def add(self, request: Request) -> None:
        """Put a request in line: it joins at one of the next steps, when there is a free slot."""
        self._line.waiting.append(request)

    @property
    def is_idle(self) -> bool:
        """Whether there is nothing to do."""
        return not (self._running or self._line.reading or self._line.waiting or self._finished)

    @property
    def running(self) -> int:
        """Requests that have a slot."""
        return len(self._running) + (self._line.reading is not None)

    def drop_running(self) -> list[Request]:
        """Free every slot, after a failed step. Returns the requests that had one; those that wait go on waiting."""
        dropped, self._running = [*self._running, *self._line.drop_reading()], []
        return dropped

    def step(self) -> list[Request]:
        """Write one token of every running request; returns those that are finished now.

        Prompts are read before it, no more than `PROMPT_TOKENS_PER_STEP` of their tokens: a longer one goes on at the
        next step, so that nobody's story waits for another's prompt. A request that fails by itself is finished, with
        its `fault`.

        Raises:
            Exception: the backend cannot decode. Which request is at fault nobody knows.
        """
        self._finished += self._line.forget_finished()
        self._free_slots()
        self._finished += self._line.read_into(self._running)
        if self._running:
            self._decode()
        self._free_slots()
        finished, self._finished = self._finished, []
        return finished

    def _decode(self) -> None:
        running = self._running
        logits = writable(self.backend.decode([request.last_token for request in running]), self.tokenizer)
        tokens = _draw(logits, running, self.tokenizer.eos_id)
        for request, token, own in zip(running, tokens, logits, strict=True):
            try:
                if not request.is_finished:
                    request.accept(token, own)
            except KeyboardInterrupt:
                raise
            except BaseException as error:  # Rust's panics are no Exceptions
                request.fail(error)

    def _free_slots(self) -> None:
        """Take finished requests out of the batch, and full ones, which read the end of their story anew.

        The last one moves into each free slot, and behind them what is being read.
        """
        before, seq_len, length = len(self._running), self.backend.config.seq_len, self.backend.length
        for slot in reversed(range(before)):
            request = self._running[slot]
            if request.is_finished or length(slot) == seq_len:
                last = len(self._running) - 1
                if slot != last:
                    self.backend.copy_slot(last, slot)
                    self._running[slot] = self._running[last]
                self._running.pop()
                if request.is_finished:
                    self._finished.append(request)
                else:
                    self._line.waiting.appendleft(request)
        reading = self._line.reading
        if reading is not None and reading.request.is_finished:
            self._finished += self._line.drop_reading()
        elif reading is not None and reading.done and len(self._running) < before:
            self.backend.copy_slot(before, len(self._running))


class _Line:
    """Requests that wait for a slot, and the one in the slot behind all others whose prompt is being read."""

    def __init__(self, backend: Backend) -> None:
        self._backend = backend
        self.waiting: collections.deque[Request] = collections.deque()
        self.reading: Reading | None = None

    def forget_finished(self) -> list[Request]:
        """Take out those that were cancelled, for whom nobody waits. Returns those that failed in the line."""
        failed = [request for request in self.waiting if request.fault is not None]
        self.waiting = collections.deque(request for request in self.waiting if not request.is_finished)
        return failed

    def drop_reading(self) -> list[Request]:
        """Give up what is being read. Returns it."""
        dropped, self.reading = self.reading, None
        return [] if dropped is None else [dropped.request]

    def read_into(self, running: list[Request]) -> list[Request]:
        """Read prompts, and add those that are read to the running ones. Returns those that are finished by then."""
        left, ended = PROMPT_TOKENS_PER_STEP, list[Request]()
        while left > 0 and len(running) < self._backend.max_slots and (self.reading or self.waiting):
            readings = [self.reading] if self.reading else self._next(left, self._backend.max_slots - len(running))
            if len(readings) > 1:
                left -= self._read_together(readings, running, ended)
                continue
            self.reading = reading = readings[0]
            left -= reading.read(self._backend, len(running), left)
            if reading.is_over:
                self.reading = None
                (ended if reading.request.is_finished else running).append(reading.request)
        return ended

    def _next(self, most: int, free: int) -> list[Reading]:
        """Those at the head of the line that one run of at most so many tokens reads, or the first alone."""
        found, longest = list[Reading](), 0
        while self.waiting and len(found) < free and not (found and found[-1].is_alone):
            reading = Reading(self.waiting[0], self._backend.config.seq_len)
            longest = max(longest, len(reading.tokens))
            if found and (reading.is_alone or (len(found) + 1) * longest > most):
                break
            found.append(reading)
            self.waiting.popleft()
        return found

    def _read_together(self, readings: list[Reading], running: list[Request], ended: list[Request]) -> int:
        """Read whole prompts in one run. Returns what it took."""
        try:
            self._backend.prefill_all(len(running), [one.tokens for one in readings])
        except KeyboardInterrupt:
            raise
        except BaseException:  # one of them may be at fault: each by itself
            for one in readings:
                one.read(self._backend, len(running), len(one.tokens))
                (ended if one.request.is_finished else running).append(one.request)
        else:
            for one in readings:
                one.end()
                running.append(one.request)  # also one that failed just now: it has its slot
        return len(readings) * max(len(one.tokens) for one in readings)


def writable(logits: Logits, tokenizer: Tokenizer) -> Logits:
    """Logits of what the tokenizer has an entry for: (B, its vocab_size); the rest is padding, and is never written."""
    own = logits[:, : tokenizer.vocab_size]  # a view: of our models all of it
    if len(tokenizer.holes):
        own = own.copy()
        own[:, tokenizer.holes] = -np.inf
    return own


def prompt_ids(prompt: str | Sequence[int], limit: int, tokenizer: Tokenizer, *, may_cut: bool) -> list[int]:
    """Tokens of a prompt, or of one that has more than `limit` and may be cut those that half a context holds."""
    most = limit * tokenizer.longest_entry
    if isinstance(prompt, str) and len(prompt) > most:  # not read to count it
        if not may_cut:
            raise PromptError(f"the prompt has more tokens than the {limit} of this model's context: shorten it")
        prompt = prompt[len(prompt) - most :]
    ids = _encode(prompt, tokenizer) if isinstance(prompt, str) else _check_ids(prompt, tokenizer)
    if len(ids) > limit and may_cut:
        return ids[len(ids) - (limit + 1) // 2 :]
    if len(ids) > limit:
        sizes = f"the prompt has {len(ids)} tokens and the context of this model holds {limit}"
        raise PromptError(f"{sizes}: shorten it")
    return ids


def _encode(prompt: str, tokenizer: Tokenizer) -> list[int]:
    try:
        prompt.encode("utf-8")
    except UnicodeEncodeError as error:
        raise PromptError(f"the prompt is no Unicode text: {error.reason} at {error.start}") from error
    try:
        return tokenizer.encode(prompt)
    except TokenizerError as error:
        raise PromptError("the tokenizer of this model cannot read it") from error


def _check_biases(params: SamplingParams, tokenizer: Tokenizer) -> None:
    for token, _ in params.logit_bias:
        if token >= tokenizer.vocab_size:
            raise BiasError(f"token {token} is not one of the {tokenizer.vocab_size} of this model")


def _check_ids(ids: Sequence[int], tokenizer: Tokenizer) -> list[int]:
    for token in ids:
        if not 0 <= token < tokenizer.vocab_size:
            raise PromptError(f"token {token} is not one of the {tokenizer.vocab_size} of this model")
    return list(ids)


def _draw(logits: Logits, requests: Sequence[Request], eos_id: int) -> list[int]:
    """A token for each row. Where that fails, each is drawn for by itself, and those at fault fail."""
    uniforms = [request.uniform() for request in requests]
    try:
        return _drawn(logits, requests, uniforms)
    except Exception:
        return [_draw_one(*row, eos_id) for row in zip(logits, requests, uniforms, strict=True)]


def _draw_one(logits: Logits, request: Request, uniform: float, eos_id: int) -> int:
    try:
        return _drawn(logits[None], [request], [uniform])[0]
    except Exception as error:
        request.fail(error)
        return eos_id


def _drawn(logits: Logits, requests: Sequence[Request], uniforms: Sequence[float]) -> list[int]:
    own = weighed(logits, [request.weights for request in requests])
    return draw(own, [request.params for request in requests], uniforms)
