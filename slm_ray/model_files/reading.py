"""The model in a folder of Hugging Face's layout: ours, or one of the families that `hf_layout` knows.

In: a folder with `config.json` and safetensors. Out: a `Decoder` in fp32, every size of which was found in the headers
of its weights before memory was asked for. Weights in bf16 or fp16 are read as fp32, and all is computed in it.
"""

import dataclasses
import math
from collections.abc import Mapping
from pathlib import Path

from safetensors import SafetensorError
from torch import Tensor

from slm_ray.config.schema import ModelConfig
from slm_ray.errors import UserError, one_line
from slm_ray.model import hf_layout
from slm_ray.model.decoder import Decoder
from slm_ray.model.shapes import shapes_only
from slm_ray.model_files.folders import CONFIG, needed_file, weight_files
from slm_ray.model_files.json_files import read_json
from slm_ray.model_files.weights import StoredTensor, meta_tensors, not_finite, read_tensors, stored_tensors, type_fault

MAX_CONTEXT = 2**17
"""Longest context in tokens that is believed: with rotary positions nothing in the weights bears it out."""
MAX_ANGLES = 2**25
"""Largest table of rotary angles, in numbers: 131,072 tokens of heads of 256."""
LEAST_TENSORS = 6
"""Of a block, over all families: GPT-2's without biases, whose query, key and value are one."""
_BLOCK = "layers.0."
_MISFITS = (RuntimeError, TypeError, ValueError, KeyError, OverflowError)  # of torch, for sizes that it cannot hold


class BrokenWeightsError(UserError):
    """All is there and fits, and a weight is no finite number."""

    def __init__(self, place: Path, broken: str) -> None:
        super().__init__(f"{place}: {broken} holds numbers that are not finite")
        self.broken = broken
        """The weight's name."""


def read_model(path: Path) -> Decoder:
    """Build the model in a folder of Hugging Face's layout, in eval mode on the CPU.

    Raises:
        BrokenWeightsError: a weight is no finite number.
        UserError: its files cannot be read, or do not fit each other.
    """
    config, stored = _checked(path)
    try:
        tensors = hf_layout.without_buffers(read_tensors(stored))  # an old GPT's masks are -inf in fp16, and never read
        broken = not_finite(tensors)
        if not broken:
            model = Decoder(config)
            model.load_state_dict(hf_layout.from_hf(tensors, config))
    except (OSError, SafetensorError, *_MISFITS) as error:
        raise UserError(f"{_weights(stored)} does not fit its config.json: {one_line(error)}") from error
    if broken:
        raise BrokenWeightsError(_weights(stored), broken)
    return model.eval()


def read_shape(path: Path) -> ModelConfig:
    """The shape of the model in a folder, borne out by the headers of its weights. Raises: as `read_model`."""
    return _checked(path)[0]


def weights_bytes(path: Path) -> int:
    """What the weights of a folder take in fp32, by their headers. Raises: as `read_model`."""
    return sum(4 * math.prod(tensor.shape) for tensor in _checked(path)[1].values())


def _checked(path: Path) -> tuple[ModelConfig, dict[str, StoredTensor]]:
    """Config and headers of a folder, found to fit each other; allocates nothing."""
    config_file = path / CONFIG
    try:
        content = read_json(needed_file(path, CONFIG))
        stored = stored_tensors(weight_files(path))
    except (OSError, ValueError) as error:
        raise UserError(f"{path} is no model: {one_line(error)}") from error
    config = hf_layout.model_config(content, str(config_file))
    misfit = _misfit(config, stored)
    if misfit:
        raise UserError(f"{_weights(stored, path)} does not fit its config.json: {misfit}")
    return config, stored


def _weights(stored: Mapping[str, StoredTensor], folder: Path | None = None) -> Path:
    """What a message names: the one file of the weights, or their folder."""
    files = {tensor.file for tensor in stored.values()}
    (file,) = files if len(files) == 1 else {next(iter(files)).parent if files else folder or Path()}
    return file


def _misfit(config: ModelConfig, stored: Mapping[str, StoredTensor]) -> str:
    """What a config says that the weights do not bear out; empty where they agree. Allocates nothing."""
    if config.vocab_size < 1:
        return "vocab_size (0) must be that of a tokenizer"
    if config.seq_len > MAX_CONTEXT:
        return f"seq_len ({config.seq_len}) must be at most {MAX_CONTEXT}"
    if LEAST_TENSORS * config.n_layers > len(stored):
        return f"n_layers is {config.n_layers}, and there are {len(stored)} tensors"
    try:
        with shapes_only():
            expected = _expected(config)
            found = hf_layout.from_hf(meta_tensors(stored), config)
    except _MISFITS as error:
        return f"{type(error).__name__}: {one_line(error)}"
    return _difference(expected, found) or type_fault(found) or _angles_fault(config)


def _expected(config: ModelConfig) -> dict[str, Tensor]:
    """What the state dict of a model holds, without building it: thousands of blocks take half a minute."""
    one = Decoder(dataclasses.replace(config, n_layers=1)).state_dict()
    block = {name: tensor for name, tensor in one.items() if name.startswith(_BLOCK)}
    rest = {name: tensor for name, tensor in one.items() if name not in block}
    layers = range(config.n_layers)
    return rest | {f"layers.{layer}.{name.removeprefix(_BLOCK)}": block[name] for layer in layers for name in block}


def _angles_fault(config: ModelConfig) -> str:
    """Why the table of rotary angles is too large, whose length nothing in the weights bears out."""
    if config.positions != "rotary" or config.seq_len * config.head_width <= MAX_ANGLES:
        return ""
    return f"seq_len ({config.seq_len}) x d_head ({config.head_width}) must be at most {MAX_ANGLES}"


def _difference(expected: Mapping[str, Tensor], found: Mapping[str, Tensor]) -> str:
    for name in sorted(expected.keys() ^ found.keys()):
        return f"{name} is missing" if name in expected else f"{name} is there, and the model has none"
    for name, tensor in expected.items():
        if tensor.shape != found[name].shape:
            return f"{name} has shape {list(found[name].shape)}, and {list(tensor.shape)} is expected"
    return ""
