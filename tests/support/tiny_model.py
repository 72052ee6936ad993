"""Tiny random models, for the tests that need one that answers, or two that must agree."""

from pathlib import Path

import torch
from torch import Tensor

from slm_ray.config.schema import ModelConfig
from slm_ray.corpus.instructions import STORY_TEMPLATE
from slm_ray.model.decoder import Decoder
from slm_ray.runs import checkpoint
from slm_ray.tokenization.tokenizer import Tokenizer
from slm_ray.tokenization.training import train_bpe

SENTENCES = [
    "Once upon a time there was a little cat called Mia.",
    "The cat went to the forest and found a shiny stone.",
    "Tom and Mia played in the garden until the sun went down.",
]


def random_model(config: ModelConfig, seed: int = 0) -> Decoder:
    """Random weights, norms and biases away from one and zero, so that a mix-up shows."""
    torch.manual_seed(seed)
    model = Decoder(config).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, mean=0.1, std=0.2)
    return model


def talkative_model(tokenizer: Tokenizer, *, seq_len: int = 64, **changes: object) -> Decoder:
    """Random weights of which the likeliest tokens differ from place to place."""
    torch.manual_seed(1)
    config = ModelConfig(
        vocab_size=tokenizer.vocab_size,
        seq_len=seq_len,
        n_layers=2,
        d_model=32,
        n_heads=4,
        d_ff=64,
        init_std=0.3,
        **changes,
    )
    return Decoder(config).eval()


def without_end(model: Decoder, tokenizer: Tokenizer) -> Decoder:
    """Make the end-of-text token (its output row) the least likely token, so that stories reach their length."""
    head = torch.nn.Linear(model.config.d_model, model.config.vocab_size)
    head.weight.data = model.lm_head.weight.data.clone()
    head.bias.data.zero_()
    head.bias.data[tokenizer.eos_id] = -1e9
    model.lm_head = head
    return model


def some_tokens(vocab_size: int, rows: int = 3, steps: int = 20) -> Tensor:
    """The same random ids each time, (rows, steps)."""
    return torch.randint(0, vocab_size, (rows, steps), generator=torch.Generator().manual_seed(1))


def write_tiny_model(folder: Path, seq_len: int = 64, seed: int = 0, template: str = STORY_TEMPLATE) -> Path:
    """Save a checkpoint of a 2-layer model with random weights; another seed writes other stories."""
    return _write(folder, seed, template, seq_len=seq_len, n_layers=2, d_model=32, n_heads=4, d_ff=64)


def write_endless_model(folder: Path, seed: int = 0) -> Path:
    """The same with stories that take a second and more: the end-of-text token is never among the 50 likeliest
    tokens."""
    return _write(folder, seed, is_endless=True, seq_len=64, n_layers=4, d_model=128, n_heads=4, d_ff=256)


def _write(folder: Path, seed: int, template: str = STORY_TEMPLATE, *, is_endless: bool = False, **shape: int) -> Path:
    torch.manual_seed(seed)
    tokenizer = train_bpe(SENTENCES, vocab_size=300)
    model = Decoder(ModelConfig(vocab_size=tokenizer.vocab_size, **shape))
    if is_endless:
        model.embed_tokens.weight.data[tokenizer.eos_id] = 0  # it is the output layer too: the logit is 0
    state = checkpoint.TrainState(
        step=12,
        samples_seen=384,
        seed=0,
        world_size=1,
        data_fingerprint="f" * 16,
        config={"name": "tiny"},
        metrics=None,
        run_id="run-1",
    )
    checkpoint.save(folder, model, tokenizer, state, {}, template)
    return folder
