"""Stories out of a model: many at once, each row of the batch at its own place.

In: a `Backend` (which holds the model and its cache), the `Tokenizer`, prompts with their `SamplingParams`. Out:
continuations, whole or piece by piece. The training loop samples with it, `generate.py` prints from it,
`engine_thread.py` puts it behind a server. Neither Ray nor MLflow is known here.

Every story was preceded by the end mark in training, so the model is fed the end mark and then the prompt. The cache
holds `seq_len` positions; when a row is full, its last `seq_len // 2` tokens are read again from position 0 and the
story goes on. That is no stranger to the model than a training sample: those begin anywhere in a story too.
"""

import collections
import dataclasses
from collections.abc import Iterator, Sequence
from typing import Literal

from slm_ray.backend import Backend
from slm_ray.errors import UserError
from slm_ray.sampling import SamplingParams, draw
from slm_ray.tokenizer import Tokenizer

FinishReason = Literal["stop", "length"]
_PARTIAL = "\ufffd"  # how part of a character decodes
_TEXT_CONTEXT_TOKENS = 4


class PromptError(UserError):
    """A prompt that cannot be continued; the message says why."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Completion:
    """What the model wrote after a prompt."""

    text: str
    """The continuation, without the prompt."""
    tokens: tuple[int, ...]
    """Its tokens, without the end mark."""
    finish_reason: FinishReason
    """`stop`: the story came to its end; `length`: max_tokens were written."""
    prompt_tokens: int
    """Tokens of the prompt, without the end mark before it."""


class TextStream:
    """Turns tokens into text as they come, whole characters only.

    A byte-level token may hold part of a character: its text is held back until the rest is there. The pieces
    join to the text of all the tokens. `context` are the tokens before the first one, so that a tokenizer that
    treats the beginning of a text in its own way is not misled.
    """

    def __init__(self, tokenizer: Tokenizer, context: Sequence[int]) -> None:
        self._tokenizer = tokenizer
        self._given = list(context[-_TEXT_CONTEXT_TOKENS:])
        self._held: list[int] = []

    def push(self, token: int) -> str:
        """The text that is certain now, which may be none."""
        self._held.append(token)
        piece = self._held_text()
        if not piece or piece.endswith(_PARTIAL):
            return ""
        self._given, self._held = self._held, []
        return piece

    def flush(self) -> str:
        """What is left at the end; part of a character becomes U+FFFD."""
        piece = self._held_text()
        self._held = []
        return piece

    def _held_text(self) -> str:
        before = self._tokenizer.decode(self._given)
        return self._tokenizer.decode(self._given + self._held)[len(before) :]


class Story:
    """One request on its way through the engine. `Engine.story` makes it."""

    def __init__(self, tokenizer: Tokenizer, prompt_ids: list[int], params: SamplingParams) -> None:
        self.params = params
        self.prompt_tokens = len(prompt_ids)
        self.finish_reason: FinishReason | None = None
        self.is_cancelled = False
        self._end_id = tokenizer.end_id
        self._tokens = [tokenizer.end_id, *prompt_ids]
        self._random = params.random()
        self._text = TextStream(tokenizer, prompt_ids)
        self._pieces: list[str] = []

    @property
    def is_over(self) -> bool:
        """Whether it needs no more steps."""
        return self.finish_reason is not None or self.is_cancelled

    @property
    def written(self) -> list[int]:
        """Tokens written so far."""
        return self._tokens[1 + self.prompt_tokens :]

    def last_tokens(self, count: int) -> list[int]:
        """The newest `count` tokens that the model has to see, or all there are."""
        return self._tokens[-count:]

    def uniform(self) -> float:
        """The next of its random numbers, in [0, 1)."""
        return self._random.random() if self.params.temperature > 0 else 0.0

    def accept(self, token: int) -> None:
        """Go on by one token, or end."""
        if token == self._end_id:
            self.finish_reason = "stop"
        else:
            self._tokens.append(token)
            self._pieces.append(self._text.push(token))
            if len(self._tokens) - 1 - self.prompt_tokens == self.params.max_tokens:
                self.finish_reason = "length"
        if self.finish_reason is not None:
            self._pieces.append(self._text.flush())

    def pieces(self, start: int) -> list[str]:
        """Pieces of text from number `start` on; some are empty. All of them joined are the continuation."""
        return self._pieces[start:]

    def completion(self) -> Completion:
        """The finished story."""
        assert self.finish_reason is not None
        return Completion(
            text="".join(self._pieces),
            tokens=tuple(self.written),
            finish_reason=self.finish_reason,
            prompt_tokens=self.prompt_tokens,
        )


class Engine:
    """A running batch of up to `backend.max_rows` stories: they join and leave it at any token.

    For one thread at a time; `EngineThread` shares it among many. Only `story` may be called from anywhere.
    """

    def __init__(self, backend: Backend, tokenizer: Tokenizer) -> None:
        self.backend = backend
        self.tokenizer = tokenizer
        self._rows: list[Story] = []  # the first len(_rows) rows of the backend belong to these, in this order
        self._waiting: collections.deque[Story] = collections.deque()

    def generate(self, prompts: Sequence[str], params: Sequence[SamplingParams]) -> list[Completion]:
        """Continue every prompt; more than the backend has rows take turns.

        Raises:
            PromptError: a prompt is longer than the context, before anything runs.
        """
        stories = [self.story(prompt, row) for prompt, row in zip(prompts, params, strict=True)]
        for story in stories:
            self.add(story)
        while not all(story.is_over for story in stories):
            self.step()
        return [story.completion() for story in stories]

    def stream(self, prompt: str, params: SamplingParams) -> Iterator[str]:
        """Continue one prompt, in pieces of whole characters that join to its continuation.

        Closing the iterator ends the story. Raises: PromptError when the first piece is asked for.
        """
        story = self.story(prompt, params)
        self.add(story)
        given = 0
        try:
            while not story.is_over:
                self.step()
                pieces = story.pieces(given)
                given += len(pieces)
                yield from filter(None, pieces)
        finally:
            story.is_cancelled = story.finish_reason is None

    def story(self, prompt: str, params: SamplingParams) -> Story:
        """Check and encode a request; `add` puts it in line.

        Raises:
            PromptError: the prompt is longer than the context, or no Unicode text.
        """
        try:
            prompt.encode("utf-8")
        except UnicodeEncodeError as error:
            raise PromptError(f"the prompt is no Unicode text: {error.reason} at {error.start}") from error
        ids = self.tokenizer.encode(prompt)
        limit = self.backend.config.seq_len - 1
        if len(ids) > limit:
            raise PromptError(
                f"the prompt has {len(ids)} tokens and the context of this model holds {limit}: shorten it"
            )
        return Story(self.tokenizer, ids, params)

    def add(self, story: Story) -> None:
        """Put a story in line: it joins at the next step with a free row."""
        self._waiting.append(story)

    @property
    def is_idle(self) -> bool:
        """Whether there is nothing to do."""
        return not self._rows and not self._waiting

    def clear(self) -> None:
        """Forget every story, after a failure."""
        self._rows.clear()
        self._waiting.clear()

    def step(self) -> list[Story]:
        """Write one token of every running story; returns those that are over now."""
        over = self._drop_finished()
        self._admit()
        if self._rows:
            self._decode()
        return over + self._drop_finished()

    def _decode(self) -> None:
        seq_len = self.backend.config.seq_len
        for row, story in enumerate(self._rows):
            if self.backend.length(row) == seq_len:
                self._read(row, story.last_tokens(max(seq_len // 2, 1)))
        logits = self.backend.decode([story.last_tokens(1)[0] for story in self._rows])  # (B, vocab_size)
        uniforms = [story.uniform() for story in self._rows]
        for story, token in zip(self._rows, draw(logits, [s.params for s in self._rows], uniforms), strict=True):
            story.accept(token)

    def _admit(self) -> None:
        while self._waiting and len(self._rows) < self.backend.max_rows:
            story = self._waiting.popleft()
            if not story.is_over:
                self._rows.append(story)
                self._read(len(self._rows) - 1, story.last_tokens(self.backend.config.seq_len))

    def _read(self, row: int, tokens: list[int]) -> None:
        """Fill a row of the cache anew with all tokens but the last, which the next `decode` takes."""
        self.backend.read(row, tokens[:-1])

    def _drop_finished(self) -> list[Story]:
        """Take stories that are over out of the batch; the last row moves into each gap."""
        over = []
        for row in reversed(range(len(self._rows))):
            if self._rows[row].is_over:
                over.append(self._rows[row])
                last = len(self._rows) - 1
                if row != last:
                    self.backend.move(last, row)
                    self._rows[row] = self._rows[last]
                self._rows.pop()
        return over
