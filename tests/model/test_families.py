"""Models that transformers made, read by us and given back; and what we refuse to read."""

import json
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import Tensor

from slm_ray.generation.onnx_backend import OnnxBackend
from slm_ray.model import hf_layout
from slm_ray.model.decoder import Decoder, KVCache
from tests.support.tiny_model import some_tokens

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
