"""The loss of a model over a whole stream.

In: a model or a backend, a token stream. Out: an `Evaluation`: nats a token, perplexity, bits per byte.
"""

import math

import torch
from torch import nn
from torch.nn import functional as F  # noqa: N812

from slm_ray.config.schema import IGNORED_TARGET
from slm_ray.dataset.batches import TokenStream, evaluation_batches
from slm_ray.generation.backend import Backend
from slm_ray.runs.train_state import Evaluation
from slm_ray.training.context import TrainContext
from slm_ray.training.gpu_traffic import to_device


def evaluate(model: nn.Module, stream: TokenStream, *, seq_len: int, context: TrainContext) -> Evaluation:
    """Loss of a model over a stream, each target once, in the caller's autocast and summed over the ranks.

    Windows of seq_len targets do not overlap.
    """
    sums = torch.zeros(2, dtype=torch.float64, device=context.device)
    windows = evaluation_batches(
        stream, seq_len=seq_len, batch_size=32, rank=context.rank, world_size=context.world_size
    )
    was_training = model.training
    model.eval()
    with torch.no_grad():
        for inputs, targets in windows:
            context.heartbeat()
            x, y = to_device(inputs, context.device), to_device(targets, context.device)
            sums += torch.stack([model(x, y).double(), (y != IGNORED_TARGET).sum().double()])
    model.train(was_training)
    nats, tokens = context.all_reduce_sum(sums).tolist()
    return Evaluation.of_nats(nats, tokens, stream.n_bytes)


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
