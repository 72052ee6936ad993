"""Checkpoints of tiny models that fit the tiny data set."""

from pathlib import Path

import torch

from slm_ray.model.decoder import Decoder
from slm_ray.runs import checkpoint
from slm_ray.tokenization.tokenizer import Tokenizer
from tests.support.tiny_model import talkative_model


def save_model(folder: Path, model: Decoder, tokenizer: Tokenizer, name: str = "tiny") -> Path:
    """Write a model as a checkpoint of step 12."""
    state = checkpoint.TrainState(
        step=12,
        samples_seen=384,
        seed=0,
        world_size=1,
        data_fingerprint="f" * 16,
        config={"name": name},
        metrics=None,
        run_id="",
    )
    checkpoint.save(folder, model, tokenizer, state, {})
    return folder


def save_talkative(folder: Path, tokenizer: Tokenizer, seq_len: int = 64, noise: float = 0.0) -> Path:
    """Write a model with random weights; with noise, a model a little beside it."""
    model = talkative_model(tokenizer, seq_len=seq_len)
    torch.manual_seed(7)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += noise * torch.randn_like(parameter)
    return save_model(folder, model, tokenizer, folder.name)
