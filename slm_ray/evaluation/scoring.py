"""What a model says of tokens that are given: the loss of each, by torch or by a backend of the server.

In: windows of tokens, all of one padded length. Out: nats of each target, summed in float64 out of fp32 logits. How
long a window is padded depends on that window alone, never on what else is in its batch, and a row of a matrix product
does not depend on the other rows: so the loss of a story is the same in any company, to the last digit. Several threads
take a batch each, and none shares out an operation: so their number does not show, and none waits for another, which on
a busy machine takes twenty times as long.
"""

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import numpy.typing as npt
import torch

from slm_ray.config.schema import IGNORED_TARGET
from slm_ray.dataset.story_windows import Window, alike, stride_of, windows_of
from slm_ray.generation.backend import Backend
from slm_ray.model.decoder import Decoder
from slm_ray.model.threads import torch_threads

MAX_LOGITS = 2**22
"""Logits computed at a time: 16 MB in fp32."""

Nats = npt.NDArray[np.float64]
Tokens = npt.NDArray[np.int64]


@dataclasses.dataclass(frozen=True, eq=False)
class Scored:
    """What a model makes of some targets."""

    nats: Nats
    is_likeliest: npt.NDArray[np.bool_]
    """Whether no other token is likelier, at each."""

    @classmethod
    def nothing(cls, count: int) -> "Scored":
        """To be filled."""
        return cls(np.zeros(count), np.zeros(count, np.bool_))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Scorer:
    """A model that is measured: what it computes with, and how much it sees."""

    seq_len: int
    """Context in tokens."""
    stride: int
    """Tokens by which the next window of a longer text begins later."""
    vocab_size: int
    score: Callable[[Tokens, Tokens], "Scored"]
    """Of those targets (B, T) that are not IGNORED_TARGET, row after row, after inputs (B, T)."""
    threads: int = 1
    """Batches that are scored at once."""
    around: Callable[[], contextlib.AbstractContextManager[None]] = contextlib.nullcontext
    """Entered while batches are scored."""

    @classmethod
    def of_model(cls, model: Decoder) -> "Scorer":
        """By torch, on the device of the model, with as many threads as torch is set to now."""
        config = model.config
        return cls(
            seq_len=config.seq_len,
            stride=stride_of(config.seq_len),
            vocab_size=config.vocab_size,
            score=lambda inputs, targets: _torch_score(model, inputs, targets),
            threads=torch.get_num_threads(),
            around=lambda: _evaluating(model),
        )

    @classmethod
    def of_backend(cls, backend: Backend) -> "Scorer":
        """By what a backend of the server computes, a window at a time in its first slot."""
        config = backend.config
        return cls(
            seq_len=config.seq_len,
            stride=stride_of(config.seq_len),
            vocab_size=config.vocab_size,
            score=lambda inputs, targets: _backend_score(backend, inputs, targets),
        )

    def nats(self, texts: Sequence[Tokens]) -> list[Nats]:
        """The loss of each token of each text but its first, which is context alone. texts: ids, at least one each."""
        return [found.nats for found in self.scored(texts, [1] * len(texts))]

    def scored(self, texts: Sequence[Tokens], counted_from: Sequence[int]) -> list["Scored"]:
        """As `nats`, from the target at a place of each text on; those before it are context, and left at 0."""
        found = [Scored.nothing(len(text) - 1) for text in texts]
        windows = [
            window
            for number, text in enumerate(texts)
            for window in windows_of(number, len(text), seq_len=self.seq_len, stride=self.stride)
            if window.stop >= counted_from[number]
        ]

        def score(batch: list[Window]) -> None:
            length = batch[0].padded(self.seq_len)
            inputs = np.zeros((len(batch), length), np.int64)
            targets = np.full((len(batch), length), IGNORED_TARGET, np.int64)
            places = []
            for row, window in enumerate(batch):
                text, first = texts[window.text], max(window.first, counted_from[window.text])
                inputs[row, : window.stop - window.start] = text[window.start : window.stop]
                targets[row, first - window.start - 1 : window.stop - window.start] = text[first : window.stop + 1]
                places.append((window.text, first, window.stop))
            scored, done = self.score(inputs, targets), 0
            for number, first, stop in places:
                part = slice(done, done + stop - first + 1)
                found[number].nats[first - 1 : stop] = scored.nats[part]
                found[number].is_likeliest[first - 1 : stop] = scored.is_likeliest[part]
                done = part.stop

        with self.around(), ThreadPoolExecutor(self.threads) as pool:
            try:
                list(pool.map(score, self._batches(windows)))  # each writes to places of its own
            except BaseException:
                pool.shutdown(cancel_futures=True)
                raise
        return found

    def _batches(self, windows: list[Window]) -> Iterator[list[Window]]:
        """Windows of one padded length together, as many as `MAX_LOGITS` allows."""
        return alike(windows, seq_len=self.seq_len, most_tokens=MAX_LOGITS // self.vocab_size)


@contextlib.contextmanager
def _evaluating(model: Decoder) -> Iterator[None]:
    """Without dropout, and each operation in one thread; model and torch are found as they were."""
    was_training = model.training
    model.eval()
    try:
        with torch_threads(1):
            yield
    finally:
        model.train(was_training)


def _torch_score(model: Decoder, inputs: Tokens, targets: Tokens) -> Scored:
    device = next(model.parameters()).device
    with torch.inference_mode():
        wanted = torch.from_numpy(targets).to(device)  # (B, T)
        is_wanted = wanted != IGNORED_TARGET
        logits = model(torch.from_numpy(inputs).to(device))[is_wanted].float()  # (N, vocab_size)
        chosen = logits.gather(-1, wanted[is_wanted][:, None])[:, 0]
        largest = logits.amax(-1, keepdim=True)  # (N, 1)
        sums = logits.sub_(largest).exp_().sum(-1, dtype=torch.float64)
        short_of = largest[:, 0].double() - chosen
        return Scored((sums.log() + short_of).cpu().numpy(), (short_of == 0).cpu().numpy())


def _backend_score(backend: Backend, inputs: Tokens, targets: Tokens) -> Scored:
    rows: list[Scored] = []
    for tokens, own in zip(inputs.tolist(), targets):
        found = backend.prefill(0, tokens)  # (T, vocab_size)
        assert found is not None
        places = np.flatnonzero(own != IGNORED_TARGET)
        logits = found[places]
        largest = logits.max(-1)
        sums = np.exp(logits - largest[:, None]).sum(-1, dtype=np.float64)
        short_of = largest.astype(np.float64) - logits[np.arange(len(places)), own[places]]
        rows.append(Scored(np.log(sums) + short_of, short_of == 0))
    backend.prefill(0, [])
    return Scored(np.concatenate([row.nats for row in rows]), np.concatenate([row.is_likeliest for row in rows]))
