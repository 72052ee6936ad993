"""A model as ONNX graphs with what their hosts need beside them.

In: an `Origin` and a number format. Out: `model.onnx` with a cache and `genai_config.json`, which ONNX Runtime GenAI
opens; `model_no_cache.onnx` for hosts that only know ids in and logits out; the tokenizer.
"""

import shutil
from pathlib import Path
from typing import Any

from slm_ray.config.schema import ModelConfig
from slm_ray.exports.formats import Dtype
from slm_ray.exports.hf_folder import write_json
from slm_ray.exports.hf_runtimes import is_installed
from slm_ray.exports.onnx_graph import standard_graph
from slm_ray.exports.onnx_runtimes import GenAiRuntime, OnnxRuntime
from slm_ray.exports.origin import Origin
from slm_ray.exports.parity import Expected, Parity, compare

WITH_CACHE, NO_CACHE = "model.onnx", "model_no_cache.onnx"
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "generation_config.json", "chat_template.jinja")


def write_onnx(folder: Path, origin: Origin, dtype: Dtype) -> None:
    """Write the files into a folder that is there.

    Raises:
        UserError: the weights are more than an ONNX file holds.
        OSError: they could not be written.
    """
    for name, with_cache in ((WITH_CACHE, True), (NO_CACHE, False)):
        graph = standard_graph(origin.model, with_cache=with_cache, is_int8=dtype == "int8")
        (folder / name).write_bytes(graph.SerializeToString())
    for name in TOKENIZER_FILES:
        if (origin.folder / name).is_file():
            shutil.copy(origin.folder / name, folder / name)
    write_json(folder / "genai_config.json", settings(origin.model.config, origin.tokenizer.eos_id))


def check_onnx(folder: Path, origin: Origin, wanted: Expected, dtype: Dtype) -> list[Parity]:
    """Open both graphs with plain ONNX Runtime, and the folder with ONNX Runtime GenAI where that is installed."""
    found = [
        compare(OnnxRuntime(folder, name, origin.tokenizer.eos_id), wanted, dtype) for name in (WITH_CACHE, NO_CACHE)
    ]
    if is_installed("onnxruntime_genai"):
        found.append(compare(GenAiRuntime(folder), wanted, dtype))
    return found


def settings(config: ModelConfig, eos_id: int) -> dict[str, Any]:
    """`genai_config.json` of the graph with a cache, for ONNX Runtime GenAI."""
    inputs = {
        "input_ids": "input_ids",
        "attention_mask": "attention_mask",
        "past_key_names": "past_key_values.%d.key",
        "past_value_names": "past_key_values.%d.value",
    }
    outputs = {
        "logits": "logits",
        "present_key_names": "present.%d.key",
        "present_value_names": "present.%d.value",
    }
    decoder = {
        "session_options": {"log_id": "onnxruntime-genai", "provider_options": []},
        "filename": WITH_CACHE,
        "head_size": config.head_width,
        "hidden_size": config.d_model,
        "inputs": inputs,
        "outputs": outputs,
        "num_attention_heads": config.n_heads,
        "num_hidden_layers": config.n_layers,
        "num_key_value_heads": config.kv_heads,
    }
    ends = {"bos_token_id": eos_id, "eos_token_id": eos_id, "pad_token_id": eos_id}
    return {
        "model": {
            **ends,
            "context_length": config.seq_len,
            "decoder": decoder,
            "type": "decoder",
            "vocab_size": config.vocab_size,
        },
        "search": {"do_sample": False, "max_length": config.seq_len, "past_present_share_buffer": False},
    }
