"""A GGUF file read back: shape, weights and vocabulary out of the file alone.

In: a file. Out: a `Runtime` of the model and the tokenizer in it, and how far its weights are from those that were
written. What is checked here needs no llama.cpp; `llamacpp` asks that.
"""

import importlib.metadata
import json
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import tokenizers
import torch
from gguf import GGMLQuantizationType as Kind
from gguf import GGUFReader, TokenType
from numpy.typing import NDArray

from slm_ray.config.schema import ModelConfig
from slm_ray.exports.formats import Dtype
from slm_ray.exports.gguf_files.file import BLOCK, tensors, weights_of
from slm_ray.exports.gguf_files.vocabulary import PRE_TOKENIZERS, SPACE
from slm_ray.exports.parity import ParityError, TorchRuntime
from slm_ray.model import hf_layout
from slm_ray.model.decoder import Decoder

Array = NDArray[Any]
_ROUNDING = {Kind.F32: 0.0, Kind.F16: 2.0**-11, Kind.BF16: 2.0**-8}
"""Largest error of a weight, relative to itself."""
_SMALLEST_F16 = 2.0**-24


def read_back(path: Path) -> TorchRuntime:
    """Build what the file describes.

    Raises:
        ParityError: it does not describe a model and a tokenizer that fit each other.
    """
    try:
        reader = GGUFReader(path)
        config = _config(reader)
        fields = {tensor.name: gguf.quants.dequantize(tensor.data, tensor.tensor_type) for tensor in reader.tensors}
        state = {
            name: torch.from_numpy(np.array(values, order="C")) for name, values in weights_of(fields, config).items()
        }
        model = Decoder(config)
        model.load_state_dict(hf_layout.from_hf(state, config))
        encoder, ends = _tokenizer(reader), _ends(reader)
    except (LookupError, ValueError, RuntimeError, TypeError) as error:
        raise ParityError(f"{path.name} cannot be read back: {type(error).__name__}: {error}") from error
    name = f"gguf {importlib.metadata.version('gguf')}, read back"
    return TorchRuntime(model, lambda text: list(encoder.encode(text, add_special_tokens=False).ids), ends, name)


def largest_weight_error(path: Path, model: Decoder, dtype: Dtype) -> float:
    """The largest error of a weight, over the one that its number format allows: at most 1.

    Raises:
        ParityError: it is larger, or a tensor is missing, of another shape or type.
    """
    stored = {tensor.name: tensor for tensor in GGUFReader(path).tensors}
    worst = 0.0
    for name, values, kind in tensors(model, dtype):
        tensor = stored.pop(name, None)
        if tensor is None or tensor.tensor_type != kind:
            raise ParityError(f"{path.name} has no {name} in {kind.name}")
        found = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        if found.shape != values.shape:
            raise ParityError(f"{path.name} has {name} in shape {found.shape}, and {values.shape} is expected")
        share = _share(np.abs(found - values), values, kind)
        if share > 1:
            raise ParityError(f"{path.name} has {name} with {share:.3g} times the error that {kind.name} allows")
        worst = max(worst, share)
    if stored:
        raise ParityError(f"{path.name} has a tensor that the model has not: {next(iter(stored))}")
    return worst


def _share(error: Array, values: Array, kind: Kind) -> float:
    """The largest error over the allowed one; infinite where none is allowed."""
    if kind == Kind.Q8_0:  # a level is a 127th of the largest of its block; half of one, and the scale is in f16
        largest = np.abs(values).reshape(*values.shape[:-1], -1, BLOCK).max(axis=-1)
        allowed = np.repeat(largest * (0.5 / 127 + 2.0**-10) + _SMALLEST_F16 * 128, BLOCK, axis=-1)
    else:
        allowed = np.abs(values) * _ROUNDING[kind] * 1.0001 + (_SMALLEST_F16 if kind == Kind.F16 else 0.0)
    wrong = error > 0
    with np.errstate(divide="ignore"):
        shares = error[wrong] / allowed[wrong]
    return float(shares.max(initial=0.0))


def _of(reader: GGUFReader, key: str) -> Any:
    """A field's value. Raises: KeyError when it is not there."""
    field = reader.get_field(key)
    if field is None:
        raise KeyError(key)
    return field.contents()


def _ends(reader: GGUFReader) -> frozenset[int]:
    """What ends a text in llama.cpp."""
    fields = [reader.get_field(f"tokenizer.ggml.{name}_token_id") for name in ("eos", "eot", "eom")]
    return frozenset(int(field.contents()) for field in fields if field is not None)


def _config(reader: GGUFReader) -> ModelConfig:
    """The shape, out of the metadata and the names of the tensors."""
    architecture = _of(reader, "general.architecture")
    names = {tensor.name for tensor in reader.tensors}

    def number(key: str) -> Any:
        return _of(reader, f"{architecture}.{key}")

    shape: dict[str, Any] = {
        "vocab_size": len(_of(reader, "tokenizer.ggml.tokens")),
        "seq_len": number("context_length"),
        "d_model": number("embedding_length"),
        "n_layers": number("block_count"),
        "d_ff": number("feed_forward_length"),
        "n_heads": number("attention.head_count"),
        "n_kv_heads": number("attention.head_count_kv"),
        "tie_embeddings": "output.weight" not in names,
        "qkv_bias": bool({"blk.0.attn_q.bias", "blk.0.attn_qkv.bias"} & names),
        "o_bias": "blk.0.attn_output.bias" in names,
        "mlp_bias": "blk.0.ffn_up.bias" in names,
        "qk_norm": "blk.0.attn_q_norm.weight" in names,
    }
    if architecture == "gpt2":
        eps = number("attention.layer_norm_epsilon")
        return ModelConfig(**shape, bias=True, norm="layer", mlp="gelu", positions="learned", norm_eps=eps)
    return ModelConfig(
        **shape,
        d_head=number("attention.key_length"),
        norm_eps=number("attention.layer_norm_rms_epsilon"),
        rope_theta=number("rope.freq_base"),
    )


def _tokenizer(reader: GGUFReader) -> Any:
    """The tokenizer that the metadata describes, in `tokenizers`."""
    tokens, types = _of(reader, "tokenizer.ggml.tokens"), _of(reader, "tokenizer.ggml.token_type")
    is_piece = [kind not in (TokenType.CONTROL, TokenType.UNUSED, TokenType.USER_DEFINED) for kind in types]
    vocab = {text: number for number, text in enumerate(tokens) if is_piece[number]}
    if _of(reader, "tokenizer.ggml.model") == "llama":
        scores = _of(reader, "tokenizer.ggml.scores")
        has_prefix = _of(reader, "tokenizer.ggml.add_space_prefix")
        model = _sentencepiece(vocab, scores, tokens[types.index(TokenType.UNKNOWN)])
        normalizers: list[dict[str, Any]] = [{"type": "Prepend", "prepend": SPACE}] if has_prefix else []
        normalizers.append({"type": "Replace", "pattern": {"String": " "}, "content": SPACE})
        parts: dict[str, Any] = {"normalizer": {"type": "Sequence", "normalizers": normalizers}, "pre_tokenizer": None}
    else:
        pre, ignores = PRE_TOKENIZERS[_of(reader, "tokenizer.ggml.pre")]
        merges = [merge.split(" ", 1) for merge in _of(reader, "tokenizer.ggml.merges")]
        model = {"type": "BPE", "vocab": vocab, "merges": merges, "ignore_merges": ignores}
        cut = [{**part, "trim_offsets": True} if part["type"] == "ByteLevel" else part for part in pre]
        parts = {"normalizer": None, "pre_tokenizer": {"type": "Sequence", "pretokenizers": cut}}
    content: dict[str, Any] = {"version": "1.0", "added_tokens": [], "model": model, **parts}
    return tokenizers.Tokenizer.from_str(json.dumps(content))


def _sentencepiece(vocab: dict[str, int], scores: list[float], unknown: str) -> dict[str, Any]:
    """llama.cpp joins whatever two neighbours make the piece of best score."""
    wholes = sorted((text for text in vocab if len(text) > 1), key=lambda text: (-scores[vocab[text]], vocab[text]))
    cuts = [(text[:at], text[at:]) for text in wholes for at in range(1, len(text))]
    return {
        "type": "BPE",
        "vocab": vocab,
        "merges": [cut for cut in cuts if cut[0] in vocab and cut[1] in vocab],
        "unk_token": unknown,
        "fuse_unk": True,
        "byte_fallback": True,
    }
