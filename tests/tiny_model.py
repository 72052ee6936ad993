"""A tiny random model in a checkpoint folder, for the tests that only need one that answers."""

from pathlib import Path

import torch

from slm_ray import checkpoint
from slm_ray.config import ModelConfig
from slm_ray.model import Decoder
from slm_ray.tokenizer import Tokenizer

SENTENCES = [
    "Once upon a time there was a little cat called Mia.",
    "The cat went to the forest and found a shiny stone.",
    "Tom and Mia played in the garden until the sun went down.",
]


def write_tiny_model(folder: Path, seq_len: int = 64) -> Path:
    """Save a checkpoint of a 2-layer model with random weights."""
    torch.manual_seed(0)
    tokenizer = Tokenizer.train(SENTENCES, vocab_size=300)
    config = ModelConfig(vocab_size=tokenizer.vocab_size, seq_len=seq_len, n_layers=2, d_model=32, n_heads=4, d_ff=64)
    state = checkpoint.TrainState(
        step=12,
        samples_seen=384,
        seed=0,
        world_size=1,
        data_fingerprint="f" * 16,
        config={"name": "tiny"},
        metrics={},
        run_id="run-1",
    )
    checkpoint.save(folder, Decoder(config), tokenizer, state, {})
    return folder
