"""A model as a folder in Hugging Face's layout, which transformers and what is built on it open.

In: an `Origin` and a number format. Out: the files of `AutoModelForCausalLM` and `AutoTokenizer`. Weights are
safetensors in that number format; everything else is as it is in the checkpoint.
"""

import json
import shutil
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError

from slm_ray.exports.formats import Dtype
from slm_ray.exports.hf_runtimes import TransformersRuntime, is_installed, own_folder
from slm_ray.exports.origin import Origin
from slm_ray.exports.parity import Expected, Parity, compare
from slm_ray.model import hf_layout
from slm_ray.tokenization.tokenizer import END_OF_TEXT

TYPES = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}
CONFIG, WEIGHTS = "config.json", "model.safetensors"


def write_hf(folder: Path, origin: Origin, dtype: Dtype) -> None:
    """Write the files into a folder that is there.

    Raises:
        OSError: they could not be written.
    """
    left_out = shutil.ignore_patterns(*([] if dtype == "f32" else [WEIGHTS]))
    shutil.copytree(origin.folder, folder, dirs_exist_ok=True, ignore=left_out)
    ends = {f"{kind}_token": END_OF_TEXT for kind in ("bos", "eos", "pad")}
    write_json(folder / "special_tokens_map.json", ends)  # for programs that do not read tokenizer_config.json
    if dtype == "f32":
        return
    content = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    write_json(folder / CONFIG, content | {"dtype": str(TYPES[dtype]).removeprefix("torch.")})
    tensors = hf_layout.to_hf(origin.model.state_dict(), origin.model.config)
    rounded = {name: tensor.to(TYPES[dtype]).contiguous() for name, tensor in tensors.items()}
    try:
        safetensors.torch.save_file(rounded, folder / WEIGHTS, metadata={"format": "pt"})
    except SafetensorError as error:  # a full disk, in the words of its Rust side
        raise OSError(str(error)) from error


def check_hf(folder: Path, origin: Origin, wanted: Expected, dtype: Dtype) -> list[Parity]:
    """Open the folder with transformers where it knows the shape and is installed, else with our own reader."""
    is_known = not hf_layout.why_not_transformers(origin.model.config)
    if is_known and is_installed("transformers"):
        return [compare(TransformersRuntime(folder), wanted, dtype)]
    return [compare(own_folder(folder, origin.tokenizer.eos_id), wanted, dtype)]


def write_json(path: Path, content: Any) -> None:
    """Write a file that is read by people too."""
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
