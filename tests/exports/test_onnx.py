"""ONNX: every shape, with and without a cache, in plain ONNX Runtime and in GenAI; only what the standard has."""

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch

from slm_ray.config.schema import ModelConfig
from slm_ray.exports.onnx_folder import settings
from slm_ray.exports.onnx_graph import standard_graph
from slm_ray.exports.onnx_parts import quantized
from slm_ray.model.decoder import Decoder
from slm_ray.tokenization.tokenizer import Tokenizer
from tests.support.tiny_model import random_model, some_tokens

GPT: dict[str, Any] = {"norm": "layer", "mlp": "gelu", "positions": "learned"}
SHAPES: dict[str, dict[str, Any]] = {
    "llama": {},
    "llama, grouped, wide heads, biases, untied": {
        "n_kv_heads": 2,
        "d_head": 10,
        "bias": True,
        "tie_embeddings": False,
    },
    "qwen3": {"qk_norm": True, "n_kv_heads": 2, "qkv_bias": True},
    "gpt2": {**GPT, "bias": True},
    "gpt-neo": {**GPT, "bias": True, "qkv_bias": False, "scale_attention": False, "local_window": 5},
    "our own": {"norm": "layer", "n_kv_heads": 1},
}
shapes = pytest.mark.parametrize("shape", SHAPES.values(), ids=list(SHAPES))


def model_of(shape: dict[str, Any]) -> Decoder:
    config = ModelConfig(vocab_size=40, seq_len=24, n_layers=2, d_model=32, n_heads=4, d_ff=48, **shape)
    return random_model(config)


def session(model: Decoder, **options: bool) -> Any:
    content = standard_graph(model, **options).SerializeToString()
    return onnxruntime.InferenceSession(content, providers=["CPUExecutionProvider"])


def logits_of(model: Decoder, tokens: torch.Tensor) -> Any:
    with torch.inference_mode():
        return model(tokens).numpy()


@shapes
def test_logits_are_torch_s(shape: dict[str, Any]) -> None:
    model, tokens = model_of(shape), some_tokens(40)
    found = session(model, with_cache=False).run(["logits"], {"input_ids": tokens.numpy()})[0]
    np.testing.assert_allclose(found, logits_of(model, tokens), atol=2e-4)


@shapes
def test_a_cache_goes_on_where_it_was_and_padding_before_a_text_changes_nothing(shape: dict[str, Any]) -> None:
    model, tokens = model_of(shape), some_tokens(40)
    run = session(model, with_cache=True)
    cache = {
        one.name: np.zeros((3, one.shape[1], 0, one.shape[3]), np.float32)
        for one in run.get_inputs()
        if one.name.startswith("past")
    }
    padded = np.ones((3, 20), np.int64)
    padded[1, :4] = 0  # the second row begins after four tokens of padding
    wanted = logits_of(model, tokens)
    wanted[1, 4:] = logits_of(model, tokens[1:2, 4:])[0]
    names = [one.name for one in run.get_outputs()]
    at = 0
    for steps in (9, 1, 4, 6):
        part = slice(at, at + steps)
        feed = {"input_ids": tokens.numpy()[:, part], "attention_mask": padded[:, : at + steps], **cache}
        found = dict(zip(names, run.run(names, feed), strict=True))
        is_text = padded[:, part] == 1
        np.testing.assert_allclose(found.pop("logits")[is_text], wanted[:, part][is_text], atol=2e-4)
        cache = {name.replace("present", "past_key_values"): value for name, value in found.items()}
        at += steps


@pytest.mark.parametrize("is_int8", [False, True])
@pytest.mark.parametrize("with_cache", [False, True])
@shapes
def test_nothing_but_the_standard_is_in_a_graph(shape: dict[str, Any], with_cache: bool, is_int8: bool) -> None:
    graph = standard_graph(model_of(shape), with_cache=with_cache, is_int8=is_int8)
    onnx.checker.check_model(graph, full_check=True)
    assert [(one.domain, one.version) for one in graph.opset_import] == [("", 17)]
    assert {node.domain for node in graph.graph.node} == {""}
    inputs = {one.name for one in graph.graph.input}
    assert with_cache or inputs == {"input_ids"}


def test_int8_is_a_quarter_and_what_its_levels_say() -> None:
    model = model_of({"n_kv_heads": 2, "tie_embeddings": False})
    whole, small = (standard_graph(model, with_cache=False, is_int8=one).ByteSize() for one in (False, True))
    assert small < 0.45 * whole  # of weights a quarter; the nodes of a tiny model are a large part
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 2 and name != "embed_positions.weight":
                levels, scales = quantized(parameter)
                parameter.copy_(torch.from_numpy(levels.astype(np.float32) * scales))
    tokens = some_tokens(40)
    found = session(model, with_cache=False, is_int8=True).run(["logits"], {"input_ids": tokens.numpy()})[0]
    np.testing.assert_allclose(found, logits_of(model, tokens), atol=2e-4)


def test_levels_of_a_row_of_zeros_are_zeros() -> None:
    levels, scales = quantized(torch.tensor([[0.0, 0.0], [-2.0, 1.0]]))
    assert levels.tolist() == [[0, 0], [-127, 64]]
    assert scales.shape == (2, 1)


def test_genai_s_settings_name_what_the_graph_has(tiny_tokenizer: Tokenizer) -> None:
    model = model_of({"n_kv_heads": 2, "d_head": 10})
    decoder = settings(model.config, tiny_tokenizer)["model"]["decoder"]
    graph = standard_graph(model, with_cache=True).graph
    inputs, outputs = decoder["inputs"], decoder["outputs"]
    expected_inputs = {inputs["input_ids"], inputs["attention_mask"]} | {
        inputs[name] % layer for name in ("past_key_names", "past_value_names") for layer in range(2)
    }
    expected_outputs = {outputs["logits"]} | {
        outputs[name] % layer for name in ("present_key_names", "present_value_names") for layer in range(2)
    }
    assert {one.name for one in graph.input} == expected_inputs
    assert {one.name for one in graph.output} == expected_outputs
    assert (decoder["head_size"], decoder["num_key_value_heads"]) == (10, 2)


def test_a_graph_of_more_than_one_file_holds_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(onnx.checker, "MAXIMUM_PROTOBUF", 10_000)
    with pytest.raises(Exception, match="bytes of weights, and one ONNX file holds 2 GB"):
        standard_graph(model_of({}), with_cache=False)
