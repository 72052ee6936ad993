"""How much each place of a batch is asked for the tokens after the next one: multi-token prediction.

In: a `TrainConfig` and the step. Out: the weights of that step; they are a function of the step, as the learning rate
is, so a resumed run goes on bit for bit. They fall to 0 within the run: further tokens help to learn early, and what
counts at its end is the next one. Sources: `model.further_targets`; the falling weights are from the public record of
Keller Jordan's modded-nanogpt.
"""

import numpy as np
import torch
from torch import Tensor

from slm_ray.config.schema import TrainConfig
from slm_ray.training.gpu_traffic import to_device


def mtp_weights(step: int, max_steps: int, config: TrainConfig) -> list[float]:
    """Weights at step `step` (from 0) of the second next token, the third next and so on; the next one has 1.

    The n-th of K begins at its weight in `config.mtp_weights` and is 0 from `config.mtp_until / n` of the run on.
    """
    done = step / max_steps
    return [
        weight * max(0.0, 1 - done * number / config.mtp_until)
        for number, weight in enumerate(config.mtp_weights, start=1)
    ]


def mtp_shares(step: int, max_steps: int, config: TrainConfig, device: torch.device) -> Tensor | None:
    """The same for `Decoder.forward`, (K,) in fp32; None without any, or where the stories have no part in the loss.

    Zeros stay, lest a compiled model change.
    """
    weights = mtp_weights(step, max_steps, config)
    if not weights or (config.teacher and config.teacher_weight == 1):
        return None
    return to_device(np.array(weights, dtype=np.float32), device)
