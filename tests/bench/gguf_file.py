"""A Llama-shaped model of ours as a GGUF file in fp32, for llama.cpp in `serve.py`.

In: a `Decoder`. Out: a file with weights and shape but no vocabulary: the bench gives llama.cpp token ids.

Source: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md, version 3, and llama.cpp's convert_hf_to_gguf.py for
the names. llama.cpp turns neighbours (2i, 2i + 1) of a head by the rotary angles where ours turn (i, i + half), so the
rows of query and key are put in its order.
"""

import struct
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from slm_ray.config.schema import ModelConfig
from slm_ray.model.decoder import Decoder

ALIGNMENT = 32
F32 = 0
UINT32, FLOAT32, STRING = 4, 6, 8
LAYER = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def write_gguf(path: Path, model: Decoder) -> None:
    """Write the file. The shape must be Llama's, without biases."""
    tensors = dict(named_tensors(model))
    fields = metadata(model.config)
    parts = [b"GGUF", struct.pack("<IQQ", 3, len(tensors), len(fields))]
    parts += [_string(key) + _value(value) for key, value in fields.items()]
    offset = 0
    for name, values in tensors.items():
        sizes = values.shape[::-1]  # the fastest dimension first
        parts.append(_string(name) + struct.pack(f"<I{len(sizes)}QIQ", len(sizes), *sizes, F32, offset))
        offset += _padded(values.nbytes)
    header = b"".join(parts)
    with path.open("wb") as file:
        file.write(header.ljust(_padded(len(header)), b"\0"))
        for values in tensors.values():
            file.write(values.tobytes().ljust(_padded(values.nbytes), b"\0"))


def metadata(config: ModelConfig) -> Mapping[str, Any]:
    """What llama.cpp has to know of the shape."""
    return {
        "general.architecture": "llama",
        "general.name": "slm-ray",
        "llama.context_length": config.seq_len,
        "llama.embedding_length": config.d_model,
        "llama.block_count": config.n_layers,
        "llama.feed_forward_length": config.d_ff,
        "llama.attention.head_count": config.n_heads,
        "llama.attention.head_count_kv": config.kv_heads,
        "llama.attention.layer_norm_rms_epsilon": config.norm_eps,
        "llama.rope.dimension_count": config.head_width,
        "llama.rope.freq_base": config.rope_theta,
        "llama.vocab_size": config.vocab_size,
        "tokenizer.ggml.model": "none",
    }


def named_tensors(model: Decoder) -> Iterator[tuple[str, Any]]:
    """Weights under llama.cpp's names, in fp32."""
    config = model.config
    weights = {name: tensor.numpy() for name, tensor in model.state_dict().items()}
    yield "token_embd.weight", weights["embed_tokens.weight"]
    yield "output_norm.weight", weights["norm.weight"]
    yield "output.weight", weights["lm_head.weight"]
    for layer in range(config.n_layers):
        for ours, theirs in LAYER.items():
            values = weights[f"layers.{layer}.{ours}.weight"]
            if theirs in ("attn_q", "attn_k"):
                values = _neighbours(values, config.head_width)
            yield f"blk.{layer}.{theirs}.weight", values


def _neighbours(weight: Any, width: int) -> Any:
    """Bring row i and row i + half of every head together."""
    out, into = weight.shape
    return np.ascontiguousarray(weight.reshape(out // width, 2, width // 2, into).swapaxes(1, 2)).reshape(out, into)


def _padded(size: int) -> int:
    return -(-size // ALIGNMENT) * ALIGNMENT


def _string(text: str) -> bytes:
    return struct.pack("<Q", len(text.encode())) + text.encode()


def _value(value: Any) -> bytes:
    if isinstance(value, str):
        return struct.pack("<I", STRING) + _string(value)
    if isinstance(value, int):
        return struct.pack("<II", UINT32, value)
    return struct.pack("<If", FLOAT32, value)
