"""GGUF: what is read back of a file, in our terms and in transformers'; and llama.cpp itself where it is installed."""

import json
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from slm_ray.errors import UserError
from slm_ray.exports.gguf_files.file import Description, neighbours, write_gguf
from slm_ray.exports.gguf_files.llamacpp import LlamaCppRuntime, slack
from slm_ray.exports.gguf_files.reading import largest_weight_error, read_back
from slm_ray.exports.gguf_files.vocabulary import PRE_TOKENIZERS, vocabulary
from slm_ray.exports.hf_runtimes import is_installed
from slm_ray.exports.parity import AWKWARD_TEXTS, ParityError, compare, expected
from slm_ray.model.decoder import Decoder
from slm_ray.model.rotary import rotary_tables, rotate
from slm_ray.tokenization.tokenizer import Tokenizer
from tests.support.sentencepiece_models import MIXED, from_model
from tests.support.tiny_model import talkative_model

STOPS = (0,)
ABOUT = Description(name="Tiny", license="apache-2.0", source="A test.", chat_template="{{ messages }}")
GPT: dict[str, Any] = {"norm": "layer", "mlp": "gelu", "positions": "learned"}
SHAPES: dict[str, dict[str, Any]] = {
    "llama, grouped, wide heads, untied": {"n_kv_heads": 2, "d_head": 16, "tie_embeddings": False},
    "llama with biases": {"bias": True},
    "qwen3, biases of q, k and v": {"qk_norm": True, "n_kv_heads": 2, "qkv_bias": True, "d_head": 10},
    "gpt2": {**GPT, "bias": True},
    "gpt2 without biases": GPT,
}
shapes = pytest.mark.parametrize("shape", SHAPES.values(), ids=list(SHAPES))


def model_of(tokenizer: Tokenizer, shape: dict[str, Any]) -> Decoder:
    """Norms and biases away from one and zero, so that a mix-up shows."""
    model = talkative_model(tokenizer, **shape)
    torch.manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() < 2:
                parameter += 0.3 * torch.randn_like(parameter)
    return model


def with_pre_tokenizer(tokenizer: Tokenizer, name: str) -> Tokenizer:
    """The same entries, cut as another family's."""
    config = json.loads(tokenizer.to_json())
    parts, config["model"]["ignore_merges"] = PRE_TOKENIZERS[name]
    parts = [part | {"trim_offsets": True} if part["type"] == "ByteLevel" else part for part in parts]
    config["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": parts}
    return Tokenizer.from_json(json.dumps(config))


@shapes
def test_every_shape_comes_back_out_of_the_file_alone(
    shape: dict[str, Any], tiny_tokenizer: Tokenizer, tmp_path: Path
) -> None:
    model, path = model_of(tiny_tokenizer, shape), tmp_path / "model.gguf"
    write_gguf(path, model, tiny_tokenizer, ABOUT)
    found = compare(read_back(path), expected(model, tiny_tokenizer), "f32")
    assert found.fault == ""
    assert found.largest_logit_error == 0
    assert largest_weight_error(path, model, "f32") == 0
    if is_installed("llama_cpp"):
        with LlamaCppRuntime(path, STOPS) as runtime:
            assert compare(runtime, expected(model, tiny_tokenizer), "f32", slack(model.config)).fault == ""


@pytest.mark.parametrize("dtype", ["f16", "bf16", "q8_0"])
def test_weights_are_within_what_their_numbers_allow(dtype: Any, tiny_tokenizer: Tokenizer, tmp_path: Path) -> None:
    model, path = model_of(tiny_tokenizer, SHAPES["gpt2"]), tmp_path / "model.gguf"
    write_gguf(path, model, tiny_tokenizer, ABOUT, dtype)
    assert 0.5 < largest_weight_error(path, model, dtype) <= 1
    with torch.no_grad():
        model.layers[1].mlp.up_proj.weight[3, 5] *= 1.05
    with pytest.raises(ParityError, match=r"has blk\.1\.ffn_up\.weight with .* times the error that"):
        largest_weight_error(path, model, dtype)


def test_rows_of_no_whole_block_are_kept_in_f16(tiny_tokenizer: Tokenizer, tmp_path: Path) -> None:
    model, path = talkative_model(tiny_tokenizer, d_head=6), tmp_path / "model.gguf"  # rows of o_proj: 24
    write_gguf(path, model, tiny_tokenizer, ABOUT, "q8_0")
    kinds = {tensor.name: tensor.tensor_type.name for tensor in gguf.GGUFReader(path).tensors}
    assert (kinds["blk.0.attn_output.weight"], kinds["blk.0.attn_q.weight"]) == ("F16", "Q8_0")
    assert kinds["blk.0.attn_norm.weight"] == "F32"
    assert largest_weight_error(path, model, "q8_0") <= 1


def test_neighbours_turned_are_halves_turned() -> None:
    """Scores of Llama's architecture in llama.cpp, by its own rule, are those of ours."""
    torch.manual_seed(0)
    width, steps, d_model = 8, 5, 16
    x, q, k = torch.randn(steps, d_model), torch.randn(width, d_model), torch.randn(width, d_model)
    cos, sin = rotary_tables(steps, width, 10_000.0)
    ours = [rotate((x @ one.T)[None, :, None], cos[None, :, None], sin[None, :, None])[0, :, 0] for one in (q, k)]
    angles = torch.arange(steps)[:, None] * 10_000.0 ** (-torch.arange(0, width, 2) / width)  # (T, width / 2)
    theirs = []
    for one in (q, k):
        pairs = (x @ torch.from_numpy(neighbours(one.numpy(), width)).T).reshape(steps, -1, 2)
        turned = torch.view_as_complex(pairs) * torch.polar(torch.ones_like(angles), angles)
        theirs.append(torch.view_as_real(turned).reshape(steps, width))
    torch.testing.assert_close(theirs[0] @ theirs[1].T, ours[0] @ ours[1].T)


def test_the_file_says_what_programs_ask(tiny_tokenizer: Tokenizer, tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    write_gguf(path, talkative_model(tiny_tokenizer, n_kv_heads=2), tiny_tokenizer, ABOUT, "q8_0")
    reader = gguf.GGUFReader(path)
    expected_fields = {
        "general.architecture": "llama",
        "general.name": "Tiny",
        "general.license": "apache-2.0",
        "general.file_type": 7,
        "llama.context_length": 64,
        "llama.attention.head_count_kv": 2,
        "llama.rope.dimension_count": 8,
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "gpt-2",
        "tokenizer.ggml.bos_token_id": tiny_tokenizer.eos_id,
        "tokenizer.ggml.eos_token_id": tiny_tokenizer.eos_id,
        "tokenizer.ggml.add_bos_token": False,
        "tokenizer.chat_template": "{{ messages }}",
    }
    found = {name: field.contents() if (field := reader.get_field(name)) else None for name in expected_fields}
    assert found == expected_fields


@pytest.mark.parametrize("name", PRE_TOKENIZERS)
def test_transformers_reads_the_same_ids_out_of_the_file(name: str, tiny_tokenizer: Tokenizer, tmp_path: Path) -> None:
    """It has its own reader of GGUF; of pre-tokenizers it knows GPT-2's alone."""
    import transformers

    tokenizer = with_pre_tokenizer(tiny_tokenizer, name)
    path = tmp_path / "model.gguf"
    write_gguf(path, talkative_model(tokenizer), tokenizer, ABOUT)
    assert [*map(read_back(path).encode, AWKWARD_TEXTS)] == [*map(tokenizer.encode, AWKWARD_TEXTS)]
    if name == "gpt-2":
        theirs = transformers.AutoTokenizer.from_pretrained(tmp_path, gguf_file=path.name)
        for text in AWKWARD_TEXTS:
            ids = theirs(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]
            assert list(ids) == tokenizer.encode(text)


@pytest.mark.parametrize("changes", [{}, {"add_dummy_prefix": False}], ids=["prefix", "no prefix"])
def test_sentencepiece_s_bpe_keeps_its_ids(changes: dict[str, Any], tmp_path: Path) -> None:
    tokenizer, path = from_model("bpe", **changes), tmp_path / "model.gguf"
    write_gguf(path, talkative_model(tokenizer), tokenizer, ABOUT)
    runtime = read_back(path)

    @given(MIXED | st.text())
    def same_ids(text: str) -> None:
        text = text.replace("\u2581", "_")  # SentencePiece takes it for a space, and we do not
        assert runtime.encode(text) == tokenizer.encode(text)

    same_ids()
    reader = gguf.GGUFReader(path)
    field = reader.get_field("tokenizer.ggml.model")
    assert field is not None and field.contents() == "llama"


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"normalizer": {"type": "NFKC"}}, r"it changes text before it is cut \(NFKC\)"),
        ({"pre_tokenizer": {"type": "Whitespace"}}, "its pre-tokenizer is none of gpt-2, qwen2, llama-bpe"),
        ({"pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": True}}, "its pre-tokenizer is none of"),
    ],
)
def test_a_tokenizer_that_llama_cpp_does_not_have_is_refused(
    change: dict[str, Any], reason: str, tiny_tokenizer: Tokenizer
) -> None:
    config = json.loads(tiny_tokenizer.to_json())
    if change.get("pre_tokenizer", {}).get("type") == "ByteLevel":
        change = {"pre_tokenizer": config["pre_tokenizer"] | change["pre_tokenizer"]}
    with pytest.raises(UserError, match=f"llama.cpp has no tokenizer that gives the ids of this one: {reason}"):
        vocabulary(Tokenizer.from_json(json.dumps(config | change)), 512)


def test_merges_in_another_order_than_sentencepiece_s_are_refused() -> None:
    config = json.loads(from_model("bpe").to_json())
    config["model"]["merges"].insert(0, config["model"]["merges"].pop(-1))
    vocabulary(Tokenizer.from_json(json.dumps(config)), 600)  # still piece after piece: only other scores
    config["model"]["merges"] = config["model"]["merges"][1:]
    with pytest.raises(UserError, match="its merges are not all ways to put its pieces together"):
        vocabulary(Tokenizer.from_json(json.dumps(config)), 600)


def test_entries_that_the_tokenizer_lacks_are_unused(tiny_tokenizer: Tokenizer) -> None:
    found = vocabulary(tiny_tokenizer, 520)
    assert len(found.tokens) == len(set(found.tokens)) == 520
    assert found.types[512:] == (int(gguf.TokenType.UNUSED),) * 8
    assert found.types[found.end_ids[0]] == int(gguf.TokenType.CONTROL)


def test_a_broken_file_is_no_traceback(tiny_tokenizer: Tokenizer, tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    write_gguf(path, talkative_model(tiny_tokenizer), tiny_tokenizer, ABOUT)
    path.write_bytes(path.read_bytes()[:200])
    with pytest.raises(ParityError, match=r"model\.gguf cannot be read back"):
        read_back(path)


@pytest.mark.skipif(
    not is_installed("llama_cpp"), reason="llama-cpp-python is not installed: `make bench-export` has it"
)
@pytest.mark.parametrize("kind", ["bpe", *PRE_TOKENIZERS])
def test_llama_cpp_gives_the_same_ids(kind: str, tiny_tokenizer: Tokenizer, tmp_path: Path) -> None:
    tokenizer = from_model("bpe") if kind == "bpe" else with_pre_tokenizer(tiny_tokenizer, kind)
    path = tmp_path / "model.gguf"
    write_gguf(path, talkative_model(tokenizer), tokenizer, ABOUT)
    code_points = np.r_[1:0x2581, 0x2582:0x3100, 0xAC00:0xAD00, 0xFB00:0x10000, 0x1F600:0x1F700]
    with LlamaCppRuntime(path, STOPS) as runtime:
        for text in [*AWKWARD_TEXTS, *(f"a {chr(code)}b" for code in code_points)]:
            assert runtime.encode(text) == tokenizer.encode(text), repr(text)
