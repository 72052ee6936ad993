"""Names and files of Hugging Face: back to the same weights, and opened by transformers with equal logits."""

import dataclasses
import json
from pathlib import Path

import pytest
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from slm_ray import export
from slm_ray.config.schema import ModelConfig
from slm_ray.model import hf_layout
from slm_ray.model.decoder import Decoder
from slm_ray.runs import checkpoint
from slm_ray.tokenization.training import train_bpe
from tests.support.tiny_model import SENTENCES, random_model, some_tokens

SHAPE = {"vocab_size": 97, "seq_len": 24, "n_layers": 2, "d_model": 32, "n_heads": 4, "d_ff": 48}
GPT2_SHAPE = {**SHAPE, "positions": "learned", "norm": "layer", "mlp": "gelu"}
LLAMAS = {
    "llama": ModelConfig(**SHAPE),
    "dropout": ModelConfig(**SHAPE, dropout=0.1),
    "biases": ModelConfig(**SHAPE, bias=True),
    "grouped-biases": ModelConfig(**SHAPE, n_kv_heads=2, bias=True),
    "one-kv-head-wide": ModelConfig(**SHAPE, n_kv_heads=1, d_head=10),
    "narrow-heads-untied-biases": ModelConfig(**SHAPE, d_head=6, bias=True, tie_embeddings=False),
    "other-theta-and-eps": ModelConfig(**SHAPE, rope_theta=500.0, norm_eps=1e-3),
    "biases-of-the-mlp": ModelConfig(**SHAPE, mlp_bias=True),
    "biases-of-q-k-v": ModelConfig(**SHAPE, qkv_bias=True),
    "window-of-the-context": ModelConfig(**SHAPE, local_window=24),
}
QWEN3S = {
    "qwen3": ModelConfig(**SHAPE, qk_norm=True, n_kv_heads=2, d_head=10),
    "biases-7-heads": ModelConfig(**(SHAPE | {"n_heads": 7}), qk_norm=True, d_head=4, qkv_bias=True, o_bias=True),
}
GPT_NEOS = {
    "gpt-neo": ModelConfig(**GPT2_SHAPE, bias=True, qkv_bias=False, scale_attention=False, local_window=5),
    "global-without-biases": ModelConfig(**GPT2_SHAPE, scale_attention=False),
    "one-block-untied": ModelConfig(
        **(GPT2_SHAPE | {"n_layers": 1}), scale_attention=False, local_window=5, o_bias=True, tie_embeddings=False
    ),
}
GPT2S = {
    "gpt2": ModelConfig(**GPT2_SHAPE, bias=True),
    "without-biases": ModelConfig(**GPT2_SHAPE),
    "untied-dropout": ModelConfig(**GPT2_SHAPE, bias=True, tie_embeddings=False, dropout=0.1),
    "one-head-other-eps": ModelConfig(**(GPT2_SHAPE | {"n_heads": 1, "d_ff": 128}), bias=True, norm_eps=1e-3),
    "explicit-d_head": ModelConfig(**GPT2_SHAPE, n_kv_heads=4, d_head=8),
    "unscaled": ModelConfig(**GPT2_SHAPE, bias=True, scale_attention=False),
}
OTHERS = {
    "llama-with-layer-norm": ModelConfig(**SHAPE, norm="layer"),
    "llama-with-7-heads": ModelConfig(**(SHAPE | {"n_heads": 7}), d_head=4),
    "gpt2-with-rotary": ModelConfig(**(GPT2_SHAPE | {"positions": "rotary"}), bias=True),
    "gpt2-grouped": ModelConfig(**GPT2_SHAPE, n_kv_heads=2, bias=True),
    "gpt2-with-7-heads-of-4": ModelConfig(**(GPT2_SHAPE | {"n_heads": 7}), d_head=4, bias=True),
    "gpt2-with-windows": ModelConfig(**GPT2_SHAPE, bias=True, local_window=5),
    "qwen3-with-biases-of-the-mlp": ModelConfig(**SHAPE, qk_norm=True, bias=True),
    "llama-unscaled": ModelConfig(**SHAPE, scale_attention=False),
}
KNOWN = LLAMAS | QWEN3S | GPT_NEOS | {f"gpt2-{name}": config for name, config in GPT2S.items()}
ALL = KNOWN | OTHERS


@pytest.mark.parametrize("config", ALL.values(), ids=ALL.keys())
@torch.no_grad()
def test_names_of_hugging_face_lead_back_to_the_same_model(config: ModelConfig) -> None:
    model, copy = random_model(config), random_model(config, seed=1)
    copy.load_state_dict(hf_layout.from_hf(hf_layout.to_hf(model.state_dict(), config), config))
    assert torch.equal(copy(some_tokens(SHAPE["vocab_size"])), model(some_tokens(SHAPE["vocab_size"])))


@st.composite
def shapes(draw: st.DrawFn) -> ModelConfig:
    n_kv_heads, group, flags = draw(st.integers(1, 2)), draw(st.integers(1, 2)), st.booleans()
    return ModelConfig(
        vocab_size=5,
        seq_len=4,
        n_layers=draw(st.integers(1, 3)),
        d_model=4 * n_kv_heads * group,
        n_heads=n_kv_heads * group,
        n_kv_heads=draw(st.sampled_from([0, n_kv_heads])),
        d_head=draw(st.sampled_from([0, 2, 4])),
        d_ff=draw(st.integers(1, 9)),
        mlp=draw(st.sampled_from(["swiglu", "gelu"])),
        norm=draw(st.sampled_from(["rms", "layer"])),
        positions=draw(st.sampled_from(["rotary", "learned"])),
        **{name: draw(flags) for name in ("bias", "qk_norm", "scale_attention", "tie_embeddings")},
        **{name: draw(st.none() | flags) for name in ("qkv_bias", "o_bias", "mlp_bias")},
        local_window=draw(st.integers(0, 5)),
    )


@given(shapes())
@settings(max_examples=150, deadline=None)
def test_weights_and_config_of_any_shape_come_back_as_they_were(config: ModelConfig) -> None:
    state = random_model(config).state_dict()
    back = hf_layout.from_hf(hf_layout.to_hf(state, config), config)
    assert back.keys() == state.keys()
    assert all(torch.equal(back[name], tensor) for name, tensor in state.items())
    content = json.loads(json.dumps(hf_layout.config_json(config, eos_id=0)))
    assert hf_layout.model_config(content, "config.json") == config
    if content["model_type"] != hf_layout.OWN_FIELD:  # its own fields alone are enough
        del content[hf_layout.OWN_FIELD]
        read = hf_layout.model_config(content, "config.json")
        assert hf_layout.family(read) == content["model_type"]
        Decoder(read).load_state_dict(hf_layout.from_hf(hf_layout.to_hf(state, config), read))


@pytest.mark.parametrize("config", KNOWN.values(), ids=KNOWN.keys())
@torch.no_grad()
def test_transformers_opens_it_with_equal_logits(config: ModelConfig, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    model = random_model(config)
    (tmp_path / "config.json").write_text(json.dumps(hf_layout.config_json(config, eos_id=0)), encoding="utf-8")
    tensors = hf_layout.to_hf(model.state_dict(), config)
    safetensors.torch.save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    theirs, loading = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(loading.values()), "a missing, unexpected or mismatched tensor"
    assert theirs.config.model_type == hf_layout.family(config)
    tokens = some_tokens(SHAPE["vocab_size"])
    torch.testing.assert_close(theirs(tokens).logits, model(tokens), atol=1e-5, rtol=1e-5)


def test_each_known_shape_has_its_family_and_nothing_in_its_way() -> None:
    assert {hf_layout.family(config) for config in LLAMAS.values()} == {"llama"}
    assert {hf_layout.family(config) for config in QWEN3S.values()} == {"qwen3"}
    assert {hf_layout.family(config) for config in GPT2S.values()} == {"gpt2"}
    assert {hf_layout.family(config) for config in GPT_NEOS.values()} == {"gpt_neo"}
    assert {hf_layout.why_not_transformers(config) for config in KNOWN.values()} == {""}


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("llama-with-layer-norm", "not Llama (norm is layer, not rms)"),
        ("llama-with-7-heads", "not Llama (d_model 32 is no multiple of n_heads 7)"),
        ("gpt2-with-rotary", "not GPT-2 (positions is rotary, not learned)"),
        ("gpt2-grouped", "not GPT-2 (n_kv_heads 2 is not n_heads 4)"),
        ("gpt2-with-7-heads-of-4", "not GPT-2 (n_heads 7 x d_head 4 is not d_model 32)"),
        ("gpt2-with-windows", "not GPT-2 (local_window is 5, not 0)"),
        ("qwen3-with-biases-of-the-mlp", "not Qwen3 (the feed-forward block has biases)"),
        ("llama-unscaled", "not Llama (scale_attention is False, not True)"),
    ],
)
def test_a_shape_that_transformers_does_not_know_says_what_is_in_the_way(name: str, reason: str) -> None:
    assert hf_layout.family(OTHERS[name]) == hf_layout.OWN_FIELD
    assert reason in hf_layout.why_not_transformers(OTHERS[name])


def test_weights_of_a_bias_free_gpt2_under_llama_names_are_still_read() -> None:
    config = GPT2S["without-biases"]
    state = random_model(config).state_dict()
    older = {name if name.startswith("lm_head") else f"model.{name}": tensor for name, tensor in state.items()}
    assert hf_layout.from_hf(older, config).keys() == state.keys()


@pytest.mark.parametrize(("name", "is_known"), [("dropout", True), ("gpt2-with-7-heads-of-4", False)])
def test_export_says_when_transformers_will_not_open_it(
    name: str, is_known: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tokenizer = train_bpe(SENTENCES, vocab_size=300)
    config = dataclasses.replace(ALL[name], vocab_size=tokenizer.vocab_size)
    state = checkpoint.TrainState(
        step=1, samples_seen=1, seed=0, world_size=1, data_fingerprint="", config={}, metrics=None
    )
    checkpoint.save(tmp_path / "model", random_model(config), tokenizer, state, {})
    assert export.main(["--model", str(tmp_path / "model"), "--output", str(tmp_path / "away")]) == 0
    said = capsys.readouterr()
    assert said.out.strip() == str(tmp_path / "away")
    assert ("transformers has no model of this shape" in said.err) == (not is_known)
