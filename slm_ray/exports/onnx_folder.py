"""A model as ONNX graphs with what their hosts need beside them.

In: a `SourceModel` and a number format. Out: `model.onnx` with a cache and `genai_config.json`, which ONNX Runtime
GenAI opens; `model_no_cache.onnx` for hosts that only know ids in and logits out; the tokenizer.
"""

import logging
from pathlib import Path
from typing import Any

from slm_ray.config.schema import ModelConfig
from slm_ray.errors import one_line
from slm_ray.exports.formats import Dtype
from slm_ray.exports.hf_folder import copy_tokenizer, write_json
from slm_ray.exports.hf_runtimes import is_installed
from slm_ray.exports.onnx_graph import standard_graph
from slm_ray.exports.onnx_runtimes import GENAI_CONFIG, GenAiRuntime, OnnxRuntime
from slm_ray.exports.parity import Expected, Parity, compare
from slm_ray.exports.source_model import SourceModel
from slm_ray.tokenization.tokenizer import Tokenizer

LOGGER = logging.getLogger(__name__)
WITH_CACHE, NO_CACHE = "model.onnx", "model_no_cache.onnx"


def write_onnx(folder: Path, given: SourceModel, dtype: Dtype) -> None:
    """Write the files into a folder that is there.

    Raises:
        UserError: the weights are more than an ONNX file holds.
        OSError: they could not be written.
    """
    tokenizer = given.tokenizer
    known = {
        "context_length": given.model.config.seq_len,
        "start_token_id": tokenizer.start_id,
        "end_token_ids": ",".join(map(str, sorted(tokenizer.stop_ids))),
    }
    for name, with_cache in ((WITH_CACHE, True), (NO_CACHE, False)):
        graph = standard_graph(given.model, with_cache=with_cache, is_int8=dtype == "int8")
        for key, value in known.items():
            graph.metadata_props.add(key=key, value=str(value))
        (folder / name).write_bytes(graph.SerializeToString())
    copy_tokenizer(folder, given)
    write_json(folder / GENAI_CONFIG, settings(given.model.config, tokenizer))


def check_onnx(folder: Path, _: SourceModel, wanted: Expected, dtype: Dtype) -> list[Parity]:
    """Open both graphs with plain ONNX Runtime, and the folder with ONNX Runtime GenAI where that is installed.

    Where GenAI does not open the folder, or its tokenizer gives other ids, the file for it is taken out and that is
    said: the rest is for hosts that do without.
    """
    found = [compare(OnnxRuntime(folder, name), wanted, dtype) for name in (WITH_CACHE, NO_CACHE)]
    if not is_installed("onnxruntime_genai"):
        return found
    try:
        genai = compare(GenAiRuntime(folder), wanted, dtype)
        why = genai.fault
    except Exception as error:  # it knows not every tokenizer, and has errors of its own
        why = one_line(error)
    if not why:
        return [*found, genai]
    LOGGER.warning("no %s is written: in ONNX Runtime GenAI %s", GENAI_CONFIG, why)
    (folder / GENAI_CONFIG).unlink()
    return found


def settings(config: ModelConfig, tokenizer: Tokenizer) -> dict[str, Any]:
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
    stops = sorted(tokenizer.stop_ids)
    ends = {
        "bos_token_id": tokenizer.start_id,
        "eos_token_id": stops if len(stops) > 1 else stops[0],
        "pad_token_id": tokenizer.eos_id,
    }
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
