"""One request on its way through the engine: its tokens, its text as it becomes certain, and where it ends.

In: tokens, one after another. Out: chunks of text, and a `Completion` at the end; which of its tokens the model has
read. `engine.py` runs it.
"""

import dataclasses
import time
from typing import Literal

from slm_ray.generation.backend import Backend
from slm_ray.generation.detokenizer import StopTexts, TextStream
from slm_ray.generation.logprobs import Array, TokenLogprob, token_logprobs
from slm_ray.generation.sampling import SamplingParams
from slm_ray.generation.token_weights import token_weights
from slm_ray.tokenization.tokenizer import Tokenizer

FinishReason = Literal["stop", "length"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Completion:
    """What the model wrote after a prompt."""

    text: str
    """The continuation, without the prompt and without a stop text."""
    tokens: tuple[int, ...]
    """All tokens written, without the end-of-text token."""
    finish_reason: FinishReason
    """`stop`: the story came to its end or to a stop text; `length`: max_tokens were written."""
    prompt_tokens: int
    """Tokens of the prompt, without the end-of-text token before it."""
    logprobs: tuple[TokenLogprob, ...] = ()
    """Of every written token, where asked for."""
    prompt_logprobs: tuple[TokenLogprob, ...] = ()
    """Of every token of the prompt, where asked for."""
    end_logprob: TokenLogprob | None = None
    """Of the end-of-text token, where log-probabilities were asked for and the story came to its end by itself."""
    reading_s: tuple[float, float] = dataclasses.field(default=(0.0, 0.0), compare=False)
    """When its prompt began to be read, after its wait for a slot, and was read, in perf_counter's time."""


@dataclasses.dataclass(frozen=True)
class Chunk:
    """What one or more steps made certain. All texts joined are the continuation."""

    text: str
    logprobs: tuple[TokenLogprob, ...] = ()
    """Of the tokens written since the chunk before, where asked for."""


class Request:
    """A prompt that is being continued. `Engine.request` makes it."""

    def __init__(self, tokenizer: Tokenizer, prompt_ids: list[int], params: SamplingParams) -> None:
        self.params = params
        self.prompt_tokens = len(prompt_ids)
        self.finish_reason: FinishReason | None = None
        self.is_cancelled = False
        self.is_read = False
        """Whether its prompt was read, so that a token can follow."""
        self.fault: BaseException | None = None
        """What it failed with, by itself."""
        self.reading_s = (0.0, 0.0)
        """When its prompt began to be read and was read, as in `Completion`."""
        self.weights = token_weights(params, prompt_ids)
        """What its settings add to the logits of single tokens; None where they add nothing."""
        self._tokenizer = tokenizer
        self._tokens = [tokenizer.start_id, *prompt_ids]
        self._random = params.random()
        self._text = TextStream(tokenizer, prompt_ids)
        self._stops = StopTexts(params.stop)
        self._texts: list[str] = []
        self._spelt = len(self._tokens)  # tokens that are text already
        self._logprobs: list[TokenLogprob] = []
        self._prompt_logprobs: list[TokenLogprob] = []
        self._end_logprob: TokenLogprob | None = None
        self._taken = (0, 0)  # texts and logprobs that `take_chunk` returned

    @property
    def vocab_size(self) -> int:
        """Of its tokenizer: a model may have more rows."""
        return self._tokenizer.vocab_size

    @property
    def is_finished(self) -> bool:
        """Whether it needs no more steps."""
        return self.finish_reason is not None or self.is_cancelled or self.fault is not None

    def fail(self, error: BaseException) -> None:
        """End it by a fault that is its own."""
        self.fault = error

    @property
    def written(self) -> list[int]:
        """Tokens written so far."""
        return self._tokens[1 + self.prompt_tokens :]

    def last_tokens(self, count: int) -> list[int]:
        """The newest `count` tokens that the model has to see, or all there are."""
        return self._tokens[-count:]

    @property
    def last_token(self) -> int:
        """The newest token."""
        return self._tokens[-1]

    def uniform(self) -> float:
        """The next of its random numbers, in [0, 1)."""
        return self._random.random() if self.params.temperature > 0 else 0.0

    def accept_prompt(self, logits: Array) -> None:
        """Note what the model makes of the next T tokens of the prompt. logits: (T, vocab_size)."""
        done = 1 + len(self._prompt_logprobs)
        part = self._tokens[done : done + len(logits)]
        self._prompt_logprobs += token_logprobs(logits, part, self.params.logprobs or 0, self._tokenizer)

    def begin_prompt(self) -> None:
        """It has a slot."""
        now = time.perf_counter()
        self.reading_s = (now, now)

    def end_prompt(self) -> None:
        """The prompt is read: a request that only measures is done."""
        if not self.is_read:  # a story that outgrew the context is read again
            self.reading_s = (self.reading_s[0], time.perf_counter())
        self.is_read = True
        if self.params.max_tokens == 0:
            self.finish_reason = "length"

    def accept(self, token: int, logits: Array) -> None:
        """Go on by one token, or end. logits: (vocab_size,), those that it was drawn from."""
        if token in self._tokenizer.stop_ids:
            if self.params.logprobs is not None:
                (self._end_logprob,) = token_logprobs(logits[None], [token], self.params.logprobs, self._tokenizer)
            self._end("stop")
            return
        self._tokens.append(token)
        if self.weights is not None:
            self.weights.add(token)
        if self.params.logprobs is not None:
            self._logprobs += token_logprobs(logits[None], [token], self.params.logprobs, self._tokenizer)
        # Without a stop text to look for, tokens become text when somebody reads it: that is most of a step's work.
        is_stopped = bool(self.params.stop) and self._spell()
        if not is_stopped and len(self._tokens) - 1 - self.prompt_tokens == self.params.max_tokens:
            self._end("length")

    def _spell(self) -> bool:
        """Turn the newest tokens into text; whether a stop text ended the story."""
        newest, self._spelt = self._tokens[self._spelt :], len(self._tokens)
        return self._add("".join(map(self._text.push, newest)))

    def _add(self, text: str) -> bool:
        """Add text; whether a stop text ended the story."""
        sure, is_stopped = self._stops.push(text)
        self._texts.append(sure)
        if is_stopped:
            self.finish_reason = "stop"
        return is_stopped

    def _end(self, reason: FinishReason) -> None:
        if not (self._spell() or self._add(self._text.flush())):
            self._texts.append(self._stops.flush())
            self.finish_reason = reason

    def take_chunk(self) -> Chunk | None:
        """What was written since the last call; None where that is nothing to show, or it failed just now."""
        try:
            self._spell()
        except KeyboardInterrupt:
            raise
        except BaseException as error:  # Rust's panics are no Exceptions
            self.fail(error)
            return None
        texts, logprobs = self._taken
        chunk = Chunk("".join(self._texts[texts:]), tuple(self._logprobs[logprobs:]))
        if not chunk.text and not (chunk.logprobs and self.is_finished):
            return None
        self._taken = len(self._texts), len(self._logprobs)
        return chunk

    def completion(self) -> Completion:
        """The result of a finished request. Raises: what it failed with."""
        if self.fault is not None:
            raise self.fault
        assert self.finish_reason is not None
        return Completion(
            text="".join(self._texts),
            tokens=tuple(self.written),
            finish_reason=self.finish_reason,
            prompt_tokens=self.prompt_tokens,
            logprobs=tuple(self._logprobs),
            prompt_logprobs=tuple(self._prompt_logprobs),
            end_logprob=self._end_logprob,
            reading_s=self.reading_s,
        )


class Reading:
    """A request whose prompt is being read, part by part; of a story that outgrew the context, its newest half."""

    def __init__(self, request: Request, seq_len: int) -> None:
        self.request = request
        is_prompt = not request.is_read
        if is_prompt:
            request.begin_prompt()
        newest = request.last_tokens(seq_len if is_prompt else max(seq_len // 2, 1))
        self.tokens = newest[:-1]  # the next `decode` takes the last
        self.done = 0
        self._wants_logits = is_prompt and request.params.prompt_logprobs

    @property
    def is_alone(self) -> bool:
        """Whether it cannot be read in one run with others."""
        return self._wants_logits or not self.tokens

    @property
    def is_over(self) -> bool:
        """Whether it is read, or need not be."""
        return self.done == len(self.tokens) or self.request.is_finished

    def read(self, backend: Backend, slot: int, most: int) -> int:
        """Read at most so many tokens into a slot. Returns what it took."""
        tokens = self.tokens[self.done :][:most]
        try:
            logits = backend.prefill(slot, tokens, start=self.done, wants_logits=self._wants_logits)  # (T, vocab_size)
            if self._wants_logits and logits is not None:
                self.request.accept_prompt(logits[:, : self.request.vocab_size])
        except KeyboardInterrupt:  # the fault of no request: who calls is to end
            raise
        except BaseException as error:  # Rust's panics are no Exceptions
            self.request.fail(error)
        else:
            self.done += len(tokens)
            if self.done == len(self.tokens):
                self.end()
        return max(len(tokens), 1)

    def end(self) -> None:
        """Note that all of it is read."""
        self.done = len(self.tokens)
        try:
            self.request.end_prompt()
        except KeyboardInterrupt:
            raise
        except BaseException as error:
            self.request.fail(error)
