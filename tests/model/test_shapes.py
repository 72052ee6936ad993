"""Shapes without weights: the same as the model's, nothing drawn, and none of torch's compiler in memory."""

import subprocess
import sys

import pytest
import torch
from torch import nn

from slm_ray.config.schema import ModelConfig
from slm_ray.model.decoder import Decoder
from slm_ray.model.shapes import shapes_only
from tests.support.paths import ROOT

READ = """
import sys
from pathlib import Path
from slm_ray.config.schema import ModelConfig
from slm_ray.model.decoder import Decoder, parameter_count
from slm_ray.model_files.reading import read_shape
from tests.support.tiny_model import write_tiny_model

folder = write_tiny_model(Path(sys.argv[1]))
assert parameter_count(read_shape(folder / "model")) > 0
print(sorted({"torch._dynamo", "sympy"} & set(sys.modules)))
"""


@pytest.mark.parametrize(
    "changes", [{}, {"positions": "learned", "norm": "layer", "mlp": "gelu", "bias": True}, {"qk_norm": True}]
)
def test_shapes_are_those_of_the_model_and_no_random_number_is_taken(changes: dict[str, object]) -> None:
    shape = {"vocab_size": 97, "seq_len": 24, "n_layers": 2, "d_model": 32, "n_heads": 4, "d_ff": 40} | changes
    config = ModelConfig(**shape)
    whole = Decoder(config)
    before = torch.get_rng_state()
    with shapes_only():
        hollow = Decoder(config)
    assert torch.equal(torch.get_rng_state(), before)
    found = {name: (tensor.shape, tensor.dtype) for name, tensor in hollow.state_dict().items()}
    assert found == {name: (tensor.shape, tensor.dtype) for name, tensor in whole.state_dict().items()}
    assert {tensor.device.type for tensor in [*hollow.parameters(), *hollow.buffers()]} == {"meta"}
    buffers = {name: tensor.shape for name, tensor in hollow.named_buffers()}
    assert buffers == {name: tensor.shape for name, tensor in whole.named_buffers()}


def test_behind_the_block_weights_are_drawn_again() -> None:
    with shapes_only():
        nn.Linear(3, 3)
    weight = torch.full((2, 2), 7.0)
    assert nn.init.zeros_(weight).sum() == 0 and nn.Linear(3, 3).weight.device.type == "cpu"


def test_a_checkpoint_is_read_without_torchs_compiler(tmp_path: object) -> None:
    """It takes a second to import, of each process that reads a model."""
    words = [sys.executable, "-c", READ, str(tmp_path)]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)
    assert done.stdout == "[]\n", done.stderr
