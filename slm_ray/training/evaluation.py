"""The loss of a model over a whole stream.

In: a model or a backend, a token stream. Out: an `Evaluation`: nats a token, perplexity, bits per byte.
"""

import math
from collections.abc import Iterable, Iterator

import numpy as np
import numpy.typing as npt
import torch
from torch import nn
from torch.nn import functional as F  # noqa: N812

from slm_ray.config.schema import IGNORED_TARGET
from slm_ray.dataset.batches import evaluation_batches
from slm_ray.dataset.story_windows import Window, alike, stride_of, windows_of
from slm_ray.dataset.stream import TokenStream
from slm_ray.generation.backend import Backend
from slm_ray.runs.train_state import Evaluation
from slm_ray.training.context import TrainContext
from slm_ray.training.gpu_traffic import to_device

Rows = tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]
STORIES_AT_ONCE = 4096
"""Stories whose windows are sorted into batches together."""
TOKENS_AT_ONCE = 4096
"""Of a batch."""


def evaluate_stories(model: nn.Module, stream: TokenStream, *, seq_len: int, context: TrainContext) -> Evaluation:
    """Loss of a model over the stories of a stream, in the caller's autocast and summed over the ranks.

    Each story has its own beginning as context, one longer than seq_len is seen in windows that overlap by half, and
    every token is a target once: the measure of `evaluate.py`, which computes it in fp32.
    """
    nats, tokens = _summed(model, _story_batches(stream, seq_len, context), context)
    way = {"context": seq_len, "stride": stride_of(seq_len)}
    return Evaluation.of_nats(nats, tokens, stream.n_bytes, measure="stories", **way)


def evaluate_windows(model: nn.Module, stream: TokenStream, *, seq_len: int, context: TrainContext) -> Evaluation:
    """Loss of a model over a stream, each target once, in the caller's autocast and summed over the ranks.

    Windows of seq_len targets do not overlap and are cut anywhere.
    """
    windows = evaluation_batches(
        stream, seq_len=seq_len, batch_size=32, rank=context.rank, world_size=context.world_size
    )
    nats, tokens = _summed(model, windows, context)
    return Evaluation.of_nats(nats, tokens, stream.n_bytes, measure="windows", context=seq_len, stride=seq_len)


EVALUATIONS = {"stories": evaluate_stories, "windows": evaluate_windows}


def _story_batches(stream: TokenStream, seq_len: int, context: TrainContext) -> Iterator[Rows]:
    """The rank's share of the windows, those of one padded length together."""
    lengths, stride, number = np.diff(stream.stories.ends).tolist(), stride_of(seq_len), 0
    for first in range(0, len(lengths), STORIES_AT_ONCE):
        windows = [
            window
            for story, length in enumerate(lengths[first : first + STORIES_AT_ONCE], first)
            for window in windows_of(story, 1 + length, seq_len=seq_len, stride=stride)
        ]
        for batch in alike(windows, seq_len=seq_len, most_tokens=TOKENS_AT_ONCE):
            if number % context.world_size == context.rank:
                yield _filled(stream, batch, batch[0].padded(seq_len))
            number += 1


def _filled(stream: TokenStream, batch: list[Window], length: int) -> Rows:
    """Inputs and targets of some windows, each (windows, length)."""
    inputs = np.zeros((len(batch), length), np.int64)
    targets = np.full((len(batch), length), IGNORED_TARGET, np.int64)
    for row, window in enumerate(batch):
        counted = slice(window.first - window.start - 1, window.stop - window.start)
        inputs[row, : counted.stop] = stream.inputs_of(window.text, window.start, window.stop)
        targets[row, counted] = stream.targets_of(window.text, window.first - 1, window.stop)
    return inputs, targets


def _summed(model: nn.Module, windows: Iterable[Rows], context: TrainContext) -> tuple[float, float]:
    """Nats and number of all targets, over all ranks."""
    sums = torch.zeros(2, dtype=torch.float64, device=context.device)
    was_training = model.training
    model.eval()
    with torch.no_grad():
        for inputs, targets in windows:
            context.heartbeat()
            x, y = to_device(inputs, context.device), to_device(targets, context.device)
            sums += torch.stack([model(x, y).double(), (y != IGNORED_TARGET).sum().double()])
    model.train(was_training)
    nats, tokens = context.all_reduce_sum(sums).tolist()
    return nats, tokens


def bits_per_byte(backend: Backend, stream: TokenStream) -> float:
    """Loss over a stream by what a backend computes, each target once: how `onnx-int8` compares with `onnx`.

    The figure is that of `evaluate.py`: bits of all targets over the UTF-8 bytes of the stories.
    """
    nats = 0.0
    for inputs, targets in evaluation_batches(stream, seq_len=backend.config.seq_len, batch_size=1):
        logits = backend.prefill(0, inputs[0].tolist())
        assert logits is not None
        wanted = torch.from_numpy(targets[0])  # (T,)
        nats += F.cross_entropy(
            torch.from_numpy(logits).double(), wanted, ignore_index=IGNORED_TARGET, reduction="sum"
        ).item()
    backend.prefill(0, [])
    return nats / math.log(2) / stream.n_bytes
