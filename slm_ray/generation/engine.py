"""Stories out of a model: many at once, each row of the batch at its own place.

In: a `Backend` (which holds the model and its cache), the `Tokenizer`, prompts with their `SamplingParams`. Out:
continuations, whole or piece by piece. The training loop samples with it, `generate.py` prints from it,
`engine_thread.py` puts it behind a server. Neither Ray nor MLflow is known here.

Every story was preceded by the end-of-text token in training, so the model is fed the end-of-text token and then the
prompt. The cache holds `seq_len` positions; when a row is full, its last `seq_len // 2` tokens are read again from
position 0 and the story goes on. That is no stranger to the model than a training sample: those begin anywhere in a
story too.
"""

import collections
from collections.abc import Iterator, Sequence

from slm_ray.errors import UserError
from slm_ray.generation.backend import Array, Backend
from slm_ray.generation.request import Completion, Story
from slm_ray.generation.sampling import SamplingParams, draw
from slm_ray.tokenization.tokenizer import Tokenizer


class PromptError(UserError):
    """A prompt that cannot be continued; the message says why."""


class Engine:
    """A running batch of up to `backend.max_rows` stories: they join and leave it at any token.

    For one thread at a time; `EngineThread` shares it among many. Only `story` may be called from anywhere.
    """

    def __init__(self, backend: Backend, tokenizer: Tokenizer) -> None:
        self.backend = backend
        self.tokenizer = tokenizer
        self._rows: list[Story] = []  # the first len(_rows) rows of the backend belong to these, in this order
        self._waiting: collections.deque[Story] = collections.deque()
        self._over: list[Story] = []  # not handed out yet: what was over before a step failed

    def generate(self, prompts: Sequence[str | Sequence[int]], params: Sequence[SamplingParams]) -> list[Completion]:
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
        try:
            while not story.is_over:
                self.step()
                piece = story.take_piece()
                if piece is not None and piece.text:
                    yield piece.text
        finally:
            story.is_cancelled = story.finish_reason is None

    def story(self, prompt: str | Sequence[int], params: SamplingParams) -> Story:
        """Check and encode a request, given as text or as tokens; `add` puts it in line.

        Raises:
            PromptError: the prompt is longer than the context, no Unicode text, or holds no tokens of the vocabulary.
        """
        ids = self._encode(prompt) if isinstance(prompt, str) else self._checked(prompt)
        limit = self.backend.config.seq_len - 1
        if len(ids) > limit:
            raise PromptError(
                f"the prompt has {len(ids)} tokens and the context of this model holds {limit}: shorten it"
            )
        return Story(self.tokenizer, ids, params)

    def _encode(self, prompt: str) -> list[int]:
        try:
            prompt.encode("utf-8")
        except UnicodeEncodeError as error:
            raise PromptError(f"the prompt is no Unicode text: {error.reason} at {error.start}") from error
        return self.tokenizer.encode(prompt)

    def _checked(self, ids: Sequence[int]) -> list[int]:
        for token in ids:
            if not 0 <= token < self.tokenizer.vocab_size:
                raise PromptError(f"token {token} is not one of the {self.tokenizer.vocab_size} of this model")
        return list(ids)

    def add(self, story: Story) -> None:
        """Put a story in line: it joins at the next step with a free row."""
        self._waiting.append(story)

    @property
    def is_idle(self) -> bool:
        """Whether there is nothing to do."""
        return not (self._rows or self._waiting or self._over)

    @property
    def running(self) -> int:
        """Stories that have a row."""
        return len(self._rows)

    def drop_running(self) -> list[Story]:
        """Give every row free, after a failed step: gives the stories that had one. Those that wait go on waiting."""
        dropped, self._rows = self._rows, []
        return dropped

    def step(self) -> list[Story]:
        """Write one token of every running story; returns those that are over now."""
        self._over += self._drop_finished()
        self._admit()
        self._over += self._drop_finished()  # those that only measured their prompt
        if self._rows:
            self._decode()
        over, self._over = [*self._over, *self._drop_finished()], []
        return over

    def _decode(self) -> None:
        seq_len = self.backend.config.seq_len
        for row, story in enumerate(self._rows):
            if self.backend.length(row) == seq_len:
                self._read(row, story.last_tokens(max(seq_len // 2, 1)))
        rows = self._rows
        logits = self.backend.decode([story.last_token for story in rows])  # (B, vocab_size)
        uniforms = [story.uniform() for story in rows]
        tokens = draw(logits, [story.params for story in rows], uniforms, [story.seen for story in rows])
        for story, token, own in zip(rows, tokens, logits, strict=True):
            story.accept(token, own)

    def _admit(self) -> None:
        while self._waiting and len(self._rows) < self.backend.max_rows:
            story = self._waiting.popleft()
            if not story.is_over:
                self._rows.append(story)
                tokens = story.last_tokens(self.backend.config.seq_len)
                logits = self._read(len(self._rows) - 1, tokens, wants_logits=story.params.prompt_logprobs)
                story.accept_prompt(logits)

    def _read(self, row: int, tokens: list[int], *, wants_logits: bool = False) -> Array | None:
        """Fill a row of the cache anew with all tokens but the last, which the next `decode` takes."""
        return self.backend.read(row, tokens[:-1], wants_logits=wants_logits)

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
