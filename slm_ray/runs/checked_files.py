"""What is read of a checkpoint's folder: nothing that a file says is believed before it is compared with another.

In: the files of a folder that a stranger may have made. Out: JSON of bounded size, the names in a marker, a model whose
every size was found in the header of its weights before memory was asked for. `checkpoint.py` reads with it.
"""

import json
from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from slm_ray.config.schema import ModelConfig
from slm_ray.errors import UserError, one_line
from slm_ray.model import hf_layout
from slm_ray.model.decoder import Decoder

MAX_JSON_BYTES = 4 * 1024 * 1024
"""Of config.json, state.json and the marker: a thousand times what they need."""
MAX_CONTEXT = 2**17
"""Longest context in tokens that is believed: with rotary positions nothing in the weights bears it out."""
_MISFITS = (RuntimeError, TypeError, ValueError, KeyError, OverflowError)  # of torch, for sizes that it cannot hold


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a small file. Raises: OSError; ValueError when it is none, or too large to be one of ours."""
    with path.open("rb") as file:
        text = file.read(MAX_JSON_BYTES + 1)
    if len(text) > MAX_JSON_BYTES:
        raise ValueError(f"it is larger than {MAX_JSON_BYTES} bytes")
    try:
        content = json.loads(text)
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error
    if not isinstance(content, dict):
        raise ValueError(f"a JSON object is expected, not a {type(content).__name__}")
    return content


def listed_files(marker: Mapping[str, Any], needed: tuple[str, ...]) -> dict[str, str]:
    """The names of a marker with their digests.

    Raises:
        ValueError: it lists anything but files by their digests, one of `needed` is not there, or a name leads out of
            the folder.
    """
    files = marker.get("files")
    if not isinstance(files, dict) or not all(isinstance(digest, str) for digest in files.values()):
        raise ValueError("it does not list files with their digests")
    for name in files:
        path = PurePosixPath(name)
        if path.is_absolute() or ".." in path.parts or "\\" in name or "\0" in name or not path.parts:
            raise ValueError(f"it lists {name!r}, which leads out of the folder")
    missing = [name for name in needed if name not in files]
    if missing:
        raise ValueError(f"it does not list {', '.join(missing)}")
    return files


def read_model(path: Path) -> Decoder:
    """Build the model in a folder of Hugging Face's layout, in eval mode on the CPU.

    Raises:
        UserError: its files cannot be read, or do not fit each other.
    """
    config_file, weights_file = path / "config.json", path / "model.safetensors"
    try:
        content = read_json(config_file)
        shapes = _shapes(weights_file)
    except (OSError, ValueError, SafetensorError) as error:
        raise UserError(f"{path} is no model: {error}") from error
    config = hf_layout.model_config(content, str(config_file))
    misfit = _misfit(config, shapes)
    if misfit:
        raise UserError(f"{weights_file} does not fit its config.json: {misfit}")
    try:
        model = Decoder(config)
        model.load_state_dict(hf_layout.from_hf(safetensors.torch.load_file(weights_file), config))
    except (OSError, SafetensorError, *_MISFITS) as error:
        raise UserError(f"{weights_file} does not fit its config.json: {one_line(error)}") from error
    return model.eval()


def _shapes(path: Path) -> dict[str, list[int]]:
    """Shape of each tensor, out of the file's header, which safetensors holds against the size of the file."""
    with safe_open(path, framework="pt") as file:
        return {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118  # it is no mapping


def _misfit(config: ModelConfig, shapes: Mapping[str, list[int]]) -> str:
    """What a config says that the weights do not bear out; empty where they agree. Allocates nothing."""
    if config.vocab_size < 1:
        return "vocab_size (0) must be that of a tokenizer"
    if config.seq_len > MAX_CONTEXT:
        return f"seq_len ({config.seq_len}) must be at most {MAX_CONTEXT}"
    if config.n_layers > len(shapes):
        return f"n_layers is {config.n_layers}, and there are {len(shapes)} tensors"
    try:
        with torch.device("meta"):
            expected = Decoder(config).state_dict()
            found = hf_layout.from_hf({name: torch.empty(shape) for name, shape in shapes.items()}, config)
    except _MISFITS as error:
        return f"{type(error).__name__}: {one_line(error)}"
    return _difference(expected, found)


def _difference(expected: Mapping[str, Tensor], found: Mapping[str, Tensor]) -> str:
    for name in sorted(expected.keys() ^ found.keys()):
        return f"{name} is missing" if name in expected else f"{name} is there, and the model has none"
    for name, tensor in expected.items():
        if tensor.shape != found[name].shape:
            return f"{name} has shape {list(found[name].shape)}, and {list(tensor.shape)} is expected"
    return ""
