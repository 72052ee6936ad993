"""Models that transformers made, read by us and given back; and what we refuse to read."""

import dataclasses
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import Tensor

from slm_ray.config.schema import ModelConfig
from slm_ray.errors import UserError
from slm_ray.generation.onnx_backend import OnnxBackend
from slm_ray.model import hf_layout
from slm_ray.model.decoder import Decoder, KVCache
from tests.support.tiny_model import random_model, some_tokens

STEPS = 20
LLAMA = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 24,
}
GPT2 = {"vocab_size": 97, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 24}
GPT_NEO = {
    "vocab_size": 97,
    "hidden_size": 32,
    "num_layers": 4,
    "num_heads": 4,
    "max_position_embeddings": 24,
    "attention_types": [[["global", "local"], 2]],
    "window_size": 5,  # shorter than the texts
}
THEIRS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", LLAMA),
    "llama tied, one key head": ("llama", LLAMA | {"tie_word_embeddings": True, "num_key_value_heads": 1}),
    "llama with biases of attention": ("llama", LLAMA | {"attention_bias": True, "num_key_value_heads": 2}),
    "llama with biases of the mlp": ("llama", LLAMA | {"mlp_bias": True, "rms_norm_eps": 1e-3}),
    "llama with wide heads": ("llama", LLAMA | {"head_dim": 14, "rope_theta": 500.0}),
    "qwen3": ("qwen3", LLAMA | {"head_dim": 16, "num_key_value_heads": 2, "rope_theta": 1e6}),
    "qwen3 tied with biases": (
        "qwen3",
        LLAMA | {"head_dim": 8, "tie_word_embeddings": True, "attention_bias": True} | {"num_key_value_heads": 4},
    ),
    "qwen3 with odd heads": ("qwen3", LLAMA | {"head_dim": 10, "num_attention_heads": 3, "num_key_value_heads": 1}),
    "gpt2": ("gpt2", GPT2),
    "gpt2 untied, unscaled": (
        "gpt2",
        GPT2 | {"n_inner": 40, "tie_word_embeddings": False, "scale_attn_weights": False},
    ),
    "gpt2 upcast": ("gpt2", GPT2 | {"reorder_and_upcast_attn": True, "activation_function": "gelu_pytorch_tanh"}),
    "gpt_neo": ("gpt_neo", GPT_NEO),
    "gpt_neo untied, odd layers": (
        "gpt_neo",
        GPT_NEO
        | {
            "tie_word_embeddings": False,
            "num_layers": 3,
            "attention_types": [[["global", "local"], 1], [["global"], 1]],
        },
    ),
    "gpt_neo global": ("gpt_neo", GPT_NEO | {"attention_types": [[["global"], 4]], "intermediate_size": 40}),
}


@pytest.fixture(scope="module", params=THEIRS, ids=lambda name: name.replace(" ", "-"))
def theirs(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Tensor]:
    """A folder that `save_pretrained` wrote, of random weights, and its logits."""
    transformers = pytest.importorskip("transformers")
    model_type, fields = THEIRS[request.param]
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.for_model(model_type, **fields))
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, mean=0.1, std=0.2)
    folder = tmp_path_factory.mktemp("theirs")
    model.eval().save_pretrained(folder)
    with torch.no_grad():
        return folder, model(some_tokens(97, steps=STEPS)).logits


def read(folder: Path) -> Decoder:
    content = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    config = hf_layout.model_config(content, str(folder / "config.json"))
    model = Decoder(config).eval()
    model.load_state_dict(hf_layout.from_hf(safetensors.torch.load_file(folder / "model.safetensors"), config))
    return model


@torch.no_grad()
def test_what_transformers_saved_is_read_with_equal_logits(theirs: tuple[Path, Tensor]) -> None:
    folder, logits = theirs
    model, tokens = read(folder), some_tokens(97, steps=STEPS)
    torch.testing.assert_close(model(tokens), logits, atol=1e-4, rtol=0)
    cache = KVCache.empty(model.config, rows=3)
    parts = [model.decode(tokens[:, :7], cache), *(model.decode(tokens[:, i : i + 1], cache) for i in range(7, STEPS))]
    torch.testing.assert_close(torch.cat(parts, dim=1), logits, atol=1e-4, rtol=0)


@torch.no_grad()
def test_the_fast_backend_gives_its_logits(theirs: tuple[Path, Tensor]) -> None:
    folder, logits = theirs
    backend, rows = OnnxBackend(read(folder), 2, threads=1), some_tokens(97, steps=STEPS).tolist()
    for slot, count in enumerate((8, 3)):
        torch.testing.assert_close(
            torch.from_numpy(backend.prefill(slot, rows[slot][:count])), logits[slot, :count], atol=1e-4, rtol=0
        )
    for step in range(STEPS - 8):
        got = torch.from_numpy(backend.decode([rows[0][8 + step], rows[1][3 + step]]))
        torch.testing.assert_close(got, torch.stack([logits[0, 8 + step], logits[1, 3 + step]]), atol=1e-4, rtol=0)


@torch.no_grad()
def test_what_we_write_of_it_transformers_opens_with_equal_logits(theirs: tuple[Path, Tensor], tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    folder, logits = theirs
    model = read(folder)
    write(model, tmp_path)
    again, loading = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(loading.values()), "a missing, unexpected or mismatched tensor"
    assert type(again) is type(transformers.AutoModelForCausalLM.from_pretrained(folder))
    torch.testing.assert_close(again(some_tokens(97, steps=STEPS)).logits, logits, atol=1e-4, rtol=0)


def write(model: Decoder, folder: Path) -> None:
    content = hf_layout.config_json(model.config, eos_id=0)
    (folder / "config.json").write_text(json.dumps(content), encoding="utf-8")
    tensors = hf_layout.to_hf(model.state_dict(), model.config)
    safetensors.torch.save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize("name", ["llama", "qwen3"])
@torch.no_grad()
def test_long_contexts_have_its_logits_in_torch_and_as_served(name: str, tmp_path: Path) -> None:
    """Sharp attention over 4,096 tokens: rotary angles of another precision are 8e-4 away there."""
    transformers = pytest.importorskip("transformers")
    steps, ends = 4096, slice(4032, None)
    fields = LLAMA | {"head_dim": 64, "rope_theta": 5e5, "num_key_value_heads": 2, "max_position_embeddings": steps}
    torch.manual_seed(0)
    theirs = transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.for_model(name, **fields)).eval()
    for parameter in theirs.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.3 if name == "llama" else 0.6)
    theirs.save_pretrained(tmp_path)
    model, tokens = read(tmp_path), some_tokens(97, rows=1, steps=steps)
    logits = theirs(tokens).logits
    torch.testing.assert_close(model(tokens), logits, atol=1e-4, rtol=0)
    cache = KVCache.empty(model.config, rows=1)
    model.decode(tokens[:, : steps - 1], cache)
    torch.testing.assert_close(model.decode(tokens[:, -1:], cache), logits[:, -1:], atol=1e-4, rtol=0)
    served = torch.from_numpy(OnnxBackend(model, 1, threads=1).prefill(0, tokens[0].tolist()))
    torch.testing.assert_close(served[ends], logits[0, ends], atol=1e-4, rtol=0)


# ---- older forms, and what is refused


def config_of(name: str, **changes: Any) -> dict[str, Any]:
    """A config.json in few words: a family's, with other values; None takes a field out."""
    model_type, fields = {"llama": LLAMA, "qwen3": LLAMA, "gpt2": GPT2, "gpt_neo": GPT_NEO}, {}
    fields = {"model_type": name} | model_type[name] | changes
    return {key: value for key, value in fields.items() if value is not None}


def shape_of(name: str, **changes: Any) -> ModelConfig:
    return hf_layout.model_config(config_of(name, **changes), "config.json")


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (config_of("llama"), {"n_kv_heads": 0, "d_head": 0, "tie_embeddings": False, "norm_eps": 1e-6}),
        (config_of("llama", rope_theta=500.0) | {"rope_scaling": None}, {"rope_theta": 500.0}),
        (config_of("llama", rope_parameters={"rope_type": "default", "rope_theta": 7.0}), {"rope_theta": 7.0}),
        (config_of("llama", rope_scaling={"type": "default"}, rope_theta=9), {"rope_theta": 9.0}),
        (config_of("llama", hidden_act="swish", torch_dtype="float16", pretraining_tp=1), {"mlp": "swiglu"}),
        (config_of("llama", layer_types=["full_attention"] * 2, attention_dropout=0.1), {"dropout": 0.1}),
        (config_of("qwen3", sliding_window=4096, max_window_layers=28), {"d_head": 128, "qk_norm": True}),
        (config_of("gpt2", n_ctx=24) | {"n_inner": None}, {"d_ff": 128, "tie_embeddings": True, "dropout": 0.1}),
        (config_of("gpt2", activation_function="gelu_pytorch_tanh", resid_pdrop=0), {"dropout": 0.0}),
        (config_of("gpt_neo") | {"intermediate_size": None}, {"d_ff": 128, "local_window": 5, "tie_embeddings": True}),
        (config_of("gpt_neo", window_size=None, num_layers=24, attention_types=None), {"local_window": 256}),
        (config_of("gpt_neo", attention_types=[[["global"], 1], [["local", "global"], 1], [["local"], 1]]),
         {"local_window": 5}),
    ],
)  # fmt: skip
def test_a_config_of_another_version_or_with_few_fields_means_what_it_means_there(
    content: dict[str, Any], expected: dict[str, Any]
) -> None:
    config = hf_layout.model_config(content, "config.json")
    assert {name: getattr(config, name) for name in expected} == expected


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({}, "model_type is null, and the known are Llama (llama), Qwen3 (qwen3), GPT-Neo (gpt_neo), GPT-2 (gpt2)"),
        ({"model_type": "mamba"}, "model_type is 'mamba', and the known are Llama"),
        ({"model_type": ["llama"]}, "model_type is ['llama'], and the known are"),
        ({"model_type": "slm_ray"}, "model_type is 'slm_ray', and the known are"),
        (config_of("llama", slm_ray=[1]), "slm_ray is [1], and an object is expected"),
        (config_of("llama", architectures=["LlamaForSequenceClassification"]), "and LlamaForCausalLM is supported"),
        (config_of("llama", quantization_config={"bits": 4}), "quantization_config is {'bits': 4}, and null is"),
        (config_of("llama", hidden_act="gelu"), "hidden_act is 'gelu', and silu or swish is supported"),
        (config_of("llama", rope_scaling={"type": "linear", "factor": 2.0}), "rope_scaling is {'type': 'linear'"),
        (config_of("llama", rope_parameters={"rope_type": "yarn"}), "plain rotary positions (rope_type default)"),
        (config_of("llama", rope_parameters={"full_attention": {"rope_type": "default"}}), "rope_theta alone"),
        (config_of("llama", rope_parameters={"partial_rotary_factor": 0.5}), "partial_rotary_factor is 0.5"),
        (config_of("llama", rope_parameters=[1]), "rope_parameters is [1]"),
        (config_of("llama", rope_theta=1e4, rope_parameters={"rope_theta": 2e4}), "rope_theta is 10000.0, and that of"),
        (config_of("llama", partial_rotary_factor=0.25), "partial_rotary_factor is 0.25, and 1.0 is supported"),
        (config_of("llama", sliding_window=64), "sliding_window is 64, and null is supported"),
        (config_of("llama", layer_types=["sliding_attention"]), "full_attention in every layer"),
        (config_of("llama", num_attention_heads=5), "hidden_size is 32, and a multiple of num_attention_heads (5)"),
        (config_of("llama", num_key_value_heads=3), "n_heads (4) must be divisible by n_kv_heads (3)"),
        (config_of("llama", head_dim=7), "rotary positions need an even head width"),
        (config_of("qwen3", use_sliding_window=True, sliding_window=64), "sliding_window is 64"),
        (config_of("gpt2", activation_function="gelu"), "activation_function is 'gelu', and gelu_new or"),
        (config_of("gpt2", scale_attn_by_inverse_layer_idx=True), "is true, and false is supported"),
        (config_of("gpt2", add_cross_attention=True), "add_cross_attention is true, and false is supported"),
        (config_of("gpt_neo", attention_types=[[["local"], 4]]), "global and local in turns, or global, in 4 layers"),
        (config_of("gpt_neo", attention_types=[[["global", "local"], 10**12]]), "in turns, or global, in 4 layers"),
        (config_of("gpt_neo", attention_types="global"), "attention_types is 'global'"),
        (config_of("gpt_neo", attention_types=[[["global", 3], 2]]), "attention_types is [[['global', 3], 2]]"),
        (config_of("gpt_neo", activation_function="relu"), "activation_function is 'relu'"),
    ],
)  # fmt: skip
def test_what_we_have_not_is_refused_by_name(content: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError) as caught:
        hf_layout.model_config(content, "config.json")
    said = str(caught.value)
    assert said.startswith("config.json: ") and message in said and "\n" not in said


def id_of(value: object) -> str:
    return "huge" if isinstance(value, int) and value > 1000 else repr(value)


SIZES = {
    "llama": (*LLAMA, "num_key_value_heads", "head_dim"),
    "gpt2": (*GPT2, "n_inner"),
    "gpt_neo": (*(set(GPT_NEO) - {"attention_types"}), "intermediate_size"),
}


@pytest.mark.parametrize("value", [0, -1, 2**60, 10**5000, 3.5, "64", True, math.nan, math.inf, [8], {}], ids=id_of)
def test_a_size_that_is_none_is_refused_in_one_line(value: object) -> None:
    for family, names in SIZES.items():
        for name in names:
            with pytest.raises(UserError, match=f"^config.json: {name} is .{{1,70}}, and a whole number from 1 to"):
                shape_of(family, **{name: value})


@pytest.mark.parametrize("value", [0, -1e-5, math.nan, math.inf, "1", True, 10**400, [1.0]], ids=id_of)
def test_a_number_that_is_none_is_refused_in_one_line(value: object) -> None:
    numbers = {"llama": ("rms_norm_eps", "rope_theta", "initializer_range"), "gpt_neo": ("layer_norm_epsilon",)}
    for family, names in numbers.items():
        for name in names:
            with pytest.raises(UserError, match=f"^config.json: {name} is .{{1,70}}, and a "):
                shape_of(family, **{name: value})
    if value != 0:
        with pytest.raises(UserError, match="resid_pdrop is"):
            shape_of("gpt2", resid_pdrop=value)


@pytest.mark.parametrize("value", [0, 1, "true", []], ids=id_of)
def test_what_is_neither_true_nor_false_is_refused(value: object) -> None:
    for family, name in (("llama", "mlp_bias"), ("gpt2", "tie_word_embeddings"), ("qwen3", "use_sliding_window")):
        with pytest.raises(UserError, match=f"{name} is .*, and true or false is supported"):
            shape_of(family, **{name: value})


@pytest.mark.parametrize("name", ["vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers"])
def test_a_missing_size_is_named(name: str) -> None:
    with pytest.raises(UserError, match=f"^config.json: {name} is missing$"):
        shape_of("llama", **{name: None})


@pytest.mark.parametrize(
    ("name", "changes", "field"),
    [
        ("gpt2", {"num_attention_heads": 2}, "num_attention_heads"),
        ("gpt_neo", {"num_attention_heads": 2}, "num_attention_heads"),
        ("gpt_neo", {"attention_layers": ["global"] * 4}, "attention_layers"),
        ("gpt_neo", {"attention_types": [[[], 10**30]]}, "attention_types"),
        (
            "llama",
            {
                "rope_parameters": {"rope_type": "default", "rope_theta": 1e4},
                "rope_scaling": {"rope_type": "default", "rope_theta": 100.0},
            },
            "rope_scaling",
        ),
    ],
)
def test_a_second_name_that_says_something_else_is_refused(name: str, changes: dict[str, Any], field: str) -> None:
    """transformers takes the second: read without a word, the model would have other logits."""
    with pytest.raises(UserError, match=f"^config.json: {field} is "):
        hf_layout.model_config(config_of(name, **changes), "config.json")


@pytest.mark.parametrize("model_type", ["mistral", "gemma"])
def test_an_unknown_model_is_refused_also_with_our_field_beside_it(model_type: str) -> None:
    content = hf_layout.config_json(ModelConfig(vocab_size=97), 0) | {"model_type": model_type}
    with pytest.raises(UserError, match=f"model_type is '{model_type}', and the known are Llama"):
        hf_layout.model_config(content, "config.json")


def test_our_config_and_another_beside_it_are_refused() -> None:
    content = hf_layout.config_json(shape_of("llama"), eos_id=0)
    with pytest.raises(UserError, match="vocab_size is 97 under slm_ray, and 98 by Llama's own fields: remove slm_ray"):
        hf_layout.model_config(content | {"vocab_size": 98}, "config.json")
    with pytest.raises(UserError, match="model_type is qwen3, and slm_ray describes Llama"):
        hf_layout.model_config(content | {"model_type": "qwen3", "architectures": None}, "config.json")
    del content["slm_ray"]
    assert hf_layout.model_config(content | {"vocab_size": 98}, "config.json").vocab_size == 98


def tensors_of(name: str, **changes: Any) -> tuple[ModelConfig, dict[str, Tensor], dict[str, Tensor]]:
    """A shape, a state dict of it, and the same in the family's names."""
    config = shape_of(name, **changes)
    state = random_model(config).state_dict()
    return config, state, hf_layout.to_hf(state, config)


@pytest.mark.parametrize(
    ("name", "prefix", "buffers"),
    [
        ("llama", "model.", ("layers.1.self_attn.rotary_emb.inv_freq", "rotary_emb.inv_freq")),
        ("gpt2", "transformer.", ("h.0.attn.bias", "h.1.attn.masked_bias")),
        ("gpt_neo", "transformer.", ("h.3.attn.attention.bias", "h.0.attn.attention.masked_bias")),
    ],
)
def test_buffers_of_old_versions_are_left_out_by_name_and_a_base_model_has_no_prefix(
    name: str, prefix: str, buffers: tuple[str, ...]
) -> None:
    config, state, theirs = tensors_of(name)
    old = theirs | {prefix + buffer: torch.ones(2) for buffer in buffers}
    bare = {tensor.removeprefix(prefix): value for tensor, value in old.items()}
    for tensors in (old, bare):
        assert same(hf_layout.from_hf(tensors, config), state)
    strange = hf_layout.from_hf(theirs | {f"{prefix}{buffers[0]}.more": torch.ones(2)}, config)
    assert strange.keys() - state.keys() == {f"{prefix}{buffers[0]}.more"}


def same(first: Mapping[str, Tensor], second: Mapping[str, Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("name", ["llama", "qwen3", "gpt2", "gpt_neo"])
def test_a_tensor_that_is_missing_or_unknown_is_found_and_one_that_is_there_twice_is_refused(name: str) -> None:
    config, state, theirs = tensors_of(name)
    for gone in theirs:
        found = hf_layout.from_hf({key: value for key, value in theirs.items() if key != gone}, config)
        assert state.keys() - found.keys(), gone
    for strange in ("layers.0.mlp.up_proj.extra.weight", "h.0.attn.rotary.weight", "score.weight", "lm_head.bias"):
        assert hf_layout.from_hf(theirs | {strange: torch.ones(1)}, config).keys() - state.keys(), strange
    first = next(key for key in theirs if "norm" in key or "ln_1" in key)
    with pytest.raises(ValueError, match="is there twice"):
        hf_layout.from_hf(theirs | {first.partition(".")[2]: theirs[first]}, config)


def test_a_tied_output_layer_is_the_embedding_or_refused() -> None:
    config, state, theirs = tensors_of("llama", tie_word_embeddings=True)
    embedding = theirs["model.embed_tokens.weight"]
    assert same(hf_layout.from_hf(theirs | {"lm_head.weight": embedding.clone()}, config), state)
    ill = {"model.embed_tokens.weight": torch.full_like(embedding, math.nan)}  # that is said by whoever runs it
    assert hf_layout.from_hf(theirs | ill, config).keys() == state.keys()
    assert hf_layout.from_hf(theirs | ill | {"lm_head.weight": embedding * math.nan}, config).keys() == state.keys()
    with pytest.raises(ValueError, match=r"lm_head\.weight is not the embedding's, and config.json says that they are"):
        hf_layout.from_hf(theirs | {"lm_head.weight": embedding + 1}, config)


def test_a_bias_that_we_wrote_as_zeros_is_refused_when_it_is_none_any_more() -> None:
    config = dataclasses.replace(shape_of("gpt2"), bias=False)
    theirs = hf_layout.to_hf(random_model(config).state_dict(), config)
    with pytest.raises(ValueError, match=r"layers.1.mlp.up_proj.bias is not zero, and config.json says that there is"):
        hf_layout.from_hf(theirs | {"transformer.h.1.mlp.c_fc.bias": torch.ones(128)}, config)


@pytest.mark.parametrize("shape", [(), (32,), (96, 32, 1), (32, 95), (3, 2)])
def test_a_fused_matrix_of_another_shape_makes_no_model(shape: tuple[int, ...]) -> None:
    config, state, theirs = tensors_of("gpt2")
    try:
        found = hf_layout.from_hf(theirs | {"transformer.h.0.attn.c_attn.weight": torch.ones(shape)}, config)
    except ValueError as error:
        assert "c_attn.weight has shape" in str(error)
    else:
        assert any(found[name].shape != tensor.shape for name, tensor in state.items())
