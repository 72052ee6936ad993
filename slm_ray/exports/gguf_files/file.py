"""A model as a GGUF file, for llama.cpp and what is built on it.

In: a `Decoder`, its tokenizer. Out: one file with weights, shape and vocabulary. Llama, Qwen3 and GPT-2 shapes have an
architecture there; GPT-Neo has none. `reading` reads it back.

Source: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md, and llama.cpp's convert_hf_to_gguf.py, whose choices
are these: norms, biases and positions stay f32, and a matrix whose rows are no multiple of 32 is f16 in a q8_0 file.
"""

import dataclasses
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from gguf import GGMLQuantizationType as Kind
from numpy.typing import NDArray

from slm_ray.config.schema import ModelConfig
from slm_ray.errors import UserError
from slm_ray.exports.formats import Dtype
from slm_ray.exports.gguf_files.vocabulary import Vocabulary, vocabulary
from slm_ray.model import hf_layout
from slm_ray.model.decoder import Decoder
from slm_ray.model.shapes import shapes_only
from slm_ray.tokenization.tokenizer import Tokenizer

Array = NDArray[Any]
ARCHITECTURES = {"llama": gguf.MODEL_ARCH.LLAMA, "qwen3": gguf.MODEL_ARCH.QWEN3, "gpt2": gguf.MODEL_ARCH.GPT2}
"""Families of `hf_layout` that llama.cpp has."""
FILE_TYPES = {
    "f32": gguf.LlamaFileType.ALL_F32,
    "f16": gguf.LlamaFileType.MOSTLY_F16,
    "bf16": gguf.LlamaFileType.MOSTLY_BF16,
    "q8_0": gguf.LlamaFileType.MOSTLY_Q8_0,
}
KINDS = {"f32": Kind.F32, "f16": Kind.F16, "bf16": Kind.BF16, "q8_0": Kind.Q8_0}
BLOCK = 32
"""Weights of a row that share a scale in q8_0."""
_TURNED = re.compile(r"self_attn\.([qk])_proj\.")
_ALWAYS_F32 = re.compile(r"(^|\.)(norm|wpe|ln_\w+|\w*layernorm|[qk]_norm)\.weight$|\.bias$")
_TRANSPOSED = re.compile(r"\.(c_attn|c_proj|c_fc)\.weight$")
"""GPT-2's linear layers are stored (in, out)."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Description:
    """What the file says of a model beside its shape."""

    name: str
    license: str
    """SPDX identifier; empty where it is not known."""
    source: str = ""
    """One sentence: run, step, data."""
    chat_template: str = ""


def write_gguf(path: Path, model: Decoder, tokenizer: Tokenizer, about: Description, dtype: Dtype = "f32") -> None:
    """Write the file.

    Raises:
        UserError: llama.cpp has no such architecture, or no tokenizer that gives the same ids.
        OSError: it could not be written.
    """
    config = model.config
    architecture = _architecture(config)
    words = vocabulary(tokenizer, config.vocab_size)
    writer = gguf.GGUFWriter(path, gguf.MODEL_ARCH_NAMES[architecture])
    try:
        _describe(writer, about, dtype)
        _add_shape(writer, config)
        _add_vocabulary(writer, words, about.chat_template)
        for name, values, kind in tensors(model, dtype):
            writer.add_tensor(name, gguf.quants.quantize(values, kind), raw_dtype=kind)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
    finally:
        writer.close()


def _architecture(config: ModelConfig) -> gguf.MODEL_ARCH:
    why = _why_not(config)
    if why:
        raise UserError(f"llama.cpp has no architecture for this model: {why}")
    return ARCHITECTURES[hf_layout.family(config)]


def _why_not(config: ModelConfig) -> str:
    """What llama.cpp does not compute; empty where it has all of it."""
    family = hf_layout.family(config)
    if family not in ARCHITECTURES:
        named = hf_layout.FAMILIES[family].title if family in hf_layout.FAMILIES else ""
        return f"it has Llama, Qwen3 and GPT-2, and not {named}" if named else hf_layout.why_not_transformers(config)
    if family == "gpt2" and not config.scale_attention:
        return "its GPT-2 scales the scores of attention, and this model does not"
    if family == "qwen3" and config.has_o_bias:
        return "its Qwen3 has no bias in the output projection of attention, and this model has"
    return ""


def tensors(model: Decoder, dtype: Dtype) -> Iterator[tuple[str, Array, Kind]]:
    """Names in llama.cpp's terms, fp32 values (out, in), and how each is to be stored."""
    config = model.config
    names = gguf.get_tensor_name_map(_architecture(config), config.n_layers)
    for name, tensor in hf_layout.to_hf(model.state_dict(), config).items():
        if hf_layout.family(config) == "qwen3" and name.endswith("o_proj.bias"):
            continue  # zeros, for transformers has either all biases of attention or none
        values: Array = tensor.detach().float().cpu().numpy()
        if _TRANSPOSED.search(name):
            values = values.T
        if hf_layout.family(config) == "llama" and _TURNED.search(name):
            values = neighbours(values, config.head_width)
        theirs = names.get_name(name, try_suffixes=(".weight", ".bias"))
        assert theirs is not None, name
        yield theirs, np.ascontiguousarray(values), _kind(name, values, dtype)


def _kind(name: str, values: Array, dtype: Dtype) -> Kind:
    if _ALWAYS_F32.search(name):
        return Kind.F32
    if dtype == "q8_0" and values.shape[-1] % BLOCK:
        return Kind.F16
    return KINDS[dtype]


def neighbours(values: Array, width: int) -> Array:
    """Bring row i and row i + half of every head together: Llama's architecture in llama.cpp turns neighbours
    (2i, 2i + 1) by the rotary angles, where ours turns (i, i + half).

    values: (heads * width, ...), a weight or a bias.
    """
    heads = values.reshape(-1, 2, width // 2, *values.shape[1:])
    turned: Array = np.ascontiguousarray(heads.swapaxes(1, 2)).reshape(values.shape)
    return turned


def _describe(writer: Any, about: Description, dtype: Dtype) -> None:
    writer.add_type("model")
    writer.add_name(about.name)
    if about.license:
        writer.add_license(about.license)
    if about.source:
        writer.add_description(about.source)
    writer.add_file_type(FILE_TYPES[dtype])
    if dtype == "q8_0":
        writer.add_quantization_version(gguf.GGML_QUANT_VERSION)


def _add_shape(writer: Any, config: ModelConfig) -> None:
    writer.add_vocab_size(config.vocab_size)
    writer.add_context_length(config.seq_len)
    writer.add_embedding_length(config.d_model)
    writer.add_block_count(config.n_layers)
    writer.add_feed_forward_length(config.d_ff)
    writer.add_head_count(config.n_heads)
    writer.add_head_count_kv(config.kv_heads)
    if config.norm == "layer":
        writer.add_layer_norm_eps(config.norm_eps)
    else:
        writer.add_layer_norm_rms_eps(config.norm_eps)
    if config.positions == "rotary":
        writer.add_key_length(config.head_width)
        writer.add_value_length(config.head_width)
        writer.add_rope_dimension_count(config.head_width)
        writer.add_rope_freq_base(config.rope_theta)


def _add_vocabulary(writer: Any, words: Vocabulary, chat_template: str) -> None:
    writer.add_tokenizer_model(words.model)
    if words.pre:
        writer.add_tokenizer_pre(words.pre)
    writer.add_token_list(list(words.tokens))
    writer.add_token_types(list(words.types))
    if words.merges:
        writer.add_token_merges([f"{left} {right}" for left, right in words.merges])
    if words.scores:
        writer.add_token_scores(list(words.scores))
        writer.add_add_space_prefix(words.has_space_prefix)
    writer.add_bos_token_id(words.start_id)
    names = (writer.add_eos_token_id, writer.add_eot_token_id, writer.add_eom_token_id)
    for add, token in zip(names, words.end_ids):
        add(token)
    writer.add_pad_token_id(words.end_ids[0])
    writer.add_add_bos_token(words.start_id != words.end_ids[0])  # of a model of others, which has a token for it
    writer.add_add_eos_token(False)
    if chat_template:
        writer.add_chat_template(chat_template)


def weights_of(fields: Mapping[str, Array], config: ModelConfig) -> dict[str, Array]:
    """The opposite way: tensors under llama.cpp's names, (out, in) -> the tensors of `model.safetensors`.

    Raises:
        KeyError: a tensor is there that no model of this shape has.
    """
    family = hf_layout.family(config)
    names = gguf.get_tensor_name_map(_architecture(config), config.n_layers)
    expected = {names.get_name(name, try_suffixes=(".weight", ".bias")): name for name in _hf_names(config)}
    found = {}
    for theirs, values in fields.items():
        name = expected[theirs]
        if family == "llama" and _TURNED.search(name):
            values = _halves(values, config.head_width)
        found[name] = values.T if _TRANSPOSED.search(name) else values
    return found


def _hf_names(config: ModelConfig) -> list[str]:
    with shapes_only():
        return list(hf_layout.to_hf(Decoder(config).state_dict(), config))


def _halves(values: Array, width: int) -> Array:
    """The opposite of `neighbours`, by numbers of rows: even ones first, then odd ones."""
    order = np.concatenate([np.arange(0, width, 2), np.arange(1, width, 2)])
    rows = np.arange(0, len(values), width)[:, None] + order
    turned: Array = values[rows.reshape(-1)]
    return turned
