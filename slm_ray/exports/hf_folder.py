"""A model as a folder in Hugging Face's layout, which transformers and what is built on it open.

In: a `SourceModel` and a number format. Out: the files of `AutoModelForCausalLM` and `AutoTokenizer`. Weights are
safetensors in that number format; the tokenizer's files are those of the checkpoint.
"""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError

from slm_ray.exports.formats import Dtype
from slm_ray.exports.hf_runtimes import TransformersRuntime, is_installed, own_folder
from slm_ray.exports.parity import Expected, Parity, compare
from slm_ray.exports.source_model import CHAT_TEMPLATE, SourceModel
from slm_ray.model import hf_layout
from slm_ray.model_files.folders import CONFIG, GENERATION_CONFIG, TOKENIZER, TOKENIZER_CONFIG, WEIGHTS
from slm_ray.tokenization.tokenizer import Tokenizer

MAKERS_OWN = frozenset(("auto_map", "custom_generate", "name_or_path", "special_tokens_map_file", "tokenizer_file"))
"""Fields of a stranger's files that name code, or places on another machine."""
_PLACE = re.compile(r"(?:[~/\\]|[A-Za-z]:[\\/]|[a-z][a-z0-9+.-]*://)\S+")
TYPES = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}


def write_hf(folder: Path, given: SourceModel, dtype: Dtype) -> None:
    """Write the files into a folder that is there.

    Raises:
        UserError: a file of a model of others leads out of its folder.
        OSError: they could not be written.
    """
    copy_tokenizer(folder, given)
    ends = {f"{kind}_token": token for kind, token in _end_tokens(given).items()}
    write_json(folder / "special_tokens_map.json", ends)  # for programs that do not read tokenizer_config.json
    content = hf_layout.config_json(given.model.config, given.tokenizer.eos_id)
    ids = {"bos_token_id": given.tokenizer.start_id, "eos_token_id": end_ids(given.tokenizer)}
    write_json(folder / CONFIG, content | ids | {"dtype": str(TYPES[dtype]).removeprefix("torch.")})
    if dtype == "f32" and given.state is not None:
        shutil.copyfile(given.folder / WEIGHTS, folder / WEIGHTS)
        return
    tensors = hf_layout.to_hf(given.model.state_dict(), given.model.config)
    rounded = {name: tensor.to(TYPES[dtype]).contiguous() for name, tensor in tensors.items()}
    try:
        safetensors.torch.save_file(rounded, folder / WEIGHTS, metadata={"format": "pt"})
    except SafetensorError as error:  # a full disk, in the words of its Rust side
        raise OSError(str(error)) from error


def copy_tokenizer(folder: Path, given: SourceModel) -> None:
    """The tokenizer's files, and what says how to write; those that a model of others lacks are made. Raises: as
    `write_hf`."""
    for name in (TOKENIZER, TOKENIZER_CONFIG, GENERATION_CONFIG, CHAT_TEMPLATE):
        if (content := given.content(name)) is None:
            continue
        if given.state is None and name in (TOKENIZER_CONFIG, GENERATION_CONFIG):
            ends = {"eos_token_id": end_ids(given.tokenizer)} if name == GENERATION_CONFIG else {}
            write_json(folder / name, _public(json.loads(content)) | ends)
        else:
            (folder / name).write_bytes(content)
    tokenizer = given.tokenizer
    if not (folder / GENERATION_CONFIG).exists():
        ids = {"bos_token_id": tokenizer.start_id, "pad_token_id": tokenizer.eos_id}
        write_json(folder / GENERATION_CONFIG, ids | {"eos_token_id": end_ids(tokenizer)})
    if not (folder / TOKENIZER_CONFIG).exists():
        tokens = {f"{kind}_token": token for kind, token in _end_tokens(given).items()}
        kept = {"clean_up_tokenization_spaces": False, "model_max_length": given.model.config.seq_len}
        write_json(folder / TOKENIZER_CONFIG, {"tokenizer_class": "PreTrainedTokenizerFast", **tokens, **kept})


def end_ids(tokenizer: Tokenizer) -> int | list[int]:
    """`eos_token_id` of a config: one, or a list of all that end a text."""
    ends = tokenizer.borders.end_ids
    return ends[0] if len(ends) == 1 else ends


def _public(content: dict[str, Any]) -> dict[str, Any]:
    """What a stranger's file says of the model: no code to run, no place or address of its maker."""
    return {
        name: value
        for name, value in content.items()
        if not name.startswith("_")
        and name not in MAKERS_OWN
        and not (isinstance(value, str) and _PLACE.fullmatch(value))
    }


def _end_tokens(given: SourceModel) -> dict[str, str]:
    """The tokens before and after a text, and for padding, by what transformers calls them."""
    names = {number: text for text, number in given.tokenizer.entries.items()}
    start, end = names[given.tokenizer.start_id], names[given.tokenizer.eos_id]
    return {"bos": start, "eos": end, "pad": end}


def check_hf(folder: Path, given: SourceModel, wanted: Expected, dtype: Dtype) -> list[Parity]:
    """Open the folder with transformers where it knows the shape and is installed, else with our own reader."""
    is_known = not hf_layout.why_not_transformers(given.model.config)
    if is_known and is_installed("transformers"):
        return [compare(TransformersRuntime(folder), wanted, dtype)]
    return [compare(own_folder(folder), wanted, dtype)]


def write_json(path: Path, content: Any) -> None:
    """Write a file that is read by people too."""
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
