"""Continuous batching: many requests at once, each in a slot of the cache at its own length.

In: a `Backend` (which holds the model and its cache), the `Tokenizer`, prompts with their `SamplingParams`. Out:
continuations, whole or chunk by chunk. The trainer samples with it, `generate.py` prints from it, `engine_thread.py`
shares it among a server's clients.

Every story was preceded by the end-of-text token in training, so the model is fed the end-of-text token and then the
prompt. A slot holds `seq_len` positions; when it is full, the last `seq_len // 2` tokens of its request are prefilled
again from position 0 and the story goes on. That is no stranger to the model than a training sample: those begin
anywhere in a story too.
"""

import collections
from collections.abc import Iterator, Sequence

from slm_ray.errors import UserError
from slm_ray.generation.backend import Backend, Logits
from slm_ray.generation.request import Completion, Request
from slm_ray.generation.sampling import SamplingParams, draw
from slm_ray.tokenization.tokenizer import Tokenizer


class PromptError(UserError):
    """A prompt that cannot be continued; the message says why."""


class Engine:
    """A running batch of up to `backend.max_slots` requests: they join and leave it at any token.

    For one thread at a time; `EngineThread` shares it among many. Only `request` may be called from anywhere.
    """

    def __init__(self, backend: Backend, tokenizer: Tokenizer) -> None:
        self.backend = backend
        self.tokenizer = tokenizer
        self._running: list[Request] = []  # those in slots 0, 1, ... of the backend, in this order
        self._waiting: collections.deque[Request] = collections.deque()
        self._finished: list[Request] = []  # not returned yet: what was finished before a step failed

    def generate(self, prompts: Sequence[str | Sequence[int]], params: Sequence[SamplingParams]) -> list[Completion]:
        """Continue every prompt; more than the backend has slots take turns.

        Raises:
            PromptError: a prompt is longer than the context, before anything runs.
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
        finally:
            request.is_cancelled = request.finish_reason is None

    def request(self, prompt: str | Sequence[int], params: SamplingParams) -> Request:
        """Check and encode a prompt, text or tokens; `add` puts the request in line.

        Raises:
            PromptError: the prompt is longer than the context, no Unicode text, or holds no tokens of the vocabulary.
        """
        ids = self._encode(prompt) if isinstance(prompt, str) else self._check_ids(prompt)
        limit = self.backend.config.seq_len - 1
        if len(ids) > limit:
            raise PromptError(
                f"the prompt has {len(ids)} tokens and the context of this model holds {limit}: shorten it"
            )
        return Request(self.tokenizer, ids, params)

    def _encode(self, prompt: str) -> list[int]:
        try:
            prompt.encode("utf-8")
        except UnicodeEncodeError as error:
            raise PromptError(f"the prompt is no Unicode text: {error.reason} at {error.start}") from error
        return self.tokenizer.encode(prompt)

    def _check_ids(self, ids: Sequence[int]) -> list[int]:
        for token in ids:
            if not 0 <= token < self.tokenizer.vocab_size:
                raise PromptError(f"token {token} is not one of the {self.tokenizer.vocab_size} of this model")
        return list(ids)

    def add(self, request: Request) -> None:
        """Put a request in line: it joins at the next step with a free slot."""
        self._waiting.append(request)

    @property
    def is_idle(self) -> bool:
        """Whether there is nothing to do."""
        return not (self._running or self._waiting or self._finished)

    @property
    def running(self) -> int:
        """Requests that have a slot."""
        return len(self._running)

    def drop_running(self) -> list[Request]:
        """Free every slot, after a failed step. Returns the requests that had one; those that wait go on waiting."""
        dropped, self._running = self._running, []
        return dropped

    def step(self) -> list[Request]:
        """Write one token of every running request; returns those that are finished now."""
        self._finished += self._drop_finished()
        self._admit()
        self._finished += self._drop_finished()  # those that only measured their prompt
        if self._running:
            self._decode()
        finished, self._finished = [*self._finished, *self._drop_finished()], []
        return finished

    def _admit(self) -> None:
        while self._waiting and len(self._running) < self.backend.max_slots:
            request = self._waiting.popleft()
            if not request.is_finished:
                self._running.append(request)
                tokens = request.last_tokens(self.backend.config.seq_len)
                logits = self._prefill(len(self._running) - 1, tokens, wants_logits=request.params.prompt_logprobs)
                request.accept_prompt(logits)

    def _decode(self) -> None:
        seq_len = self.backend.config.seq_len
        for slot, request in enumerate(self._running):
            if self.backend.length(slot) == seq_len:
                self._prefill(slot, request.last_tokens(max(seq_len // 2, 1)))
        running = self._running
        logits = self.backend.decode([request.last_token for request in running])  # (B, vocab_size)
        uniforms = [request.uniform() for request in running]
        tokens = draw(logits, [request.params for request in running], uniforms, [request.seen for request in running])
        for request, token, own in zip(running, tokens, logits, strict=True):
            request.accept(token, own)

    def _prefill(self, slot: int, tokens: list[int], *, wants_logits: bool = False) -> Logits | None:
        """Fill a slot anew with all tokens but the last, which the next `decode` takes."""
        return self.backend.prefill(slot, tokens[:-1], wants_logits=wants_logits)

    def _drop_finished(self) -> list[Request]:
        """Take finished requests out of the batch; the last one moves into each free slot."""
        finished = []
        for slot in reversed(range(len(self._running))):
            if self._running[slot].is_finished:
                finished.append(self._running[slot])
                last = len(self._running) - 1
                if slot != last:
                    self.backend.copy_slot(last, slot)
                    self._running[slot] = self._running[last]
                self._running.pop()
        return finished
