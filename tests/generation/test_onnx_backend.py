"""The fast backend against the torch one: same logits, same greedy stories, for every shape that a config can have."""

import dataclasses
import os
import sys

import numpy as np
import onnx
import pytest
import torch

from slm_ray.config.files import load_config
from slm_ray.config.schema import ModelConfig
from slm_ray.dataset.stream import TokenStream
from slm_ray.generation import onnx_backend
from slm_ray.generation.backend import Backend
from slm_ray.generation.backend_choice import BackendError, make_backend
from slm_ray.generation.engine import Engine
from slm_ray.generation.graph.cache_scales import cache_scales
from slm_ray.generation.onnx_backend import OnnxBackend, has_exact_signed_products
from slm_ray.generation.onnx_graph import decode_graph, padded_width
from slm_ray.generation.sampling import SamplingParams
from slm_ray.generation.torch_backend import TorchBackend
from slm_ray.model.decoder import Decoder
from slm_ray.tokenization.tokenizer import Tokenizer
from slm_ray.tokenization.training import train_bpe
from slm_ray.training.evaluation import bits_per_byte, evaluate_windows
from slm_ray.training.trainer import TrainContext
from tests.support.paths import ROOT
from tests.support.tiny_model import SENTENCES, random_model, some_tokens, talkative_model, without_end

PRESETS = sorted(path.stem for path in (ROOT / "slm_ray" / "presets").glob("*.yaml"))
GPT2 = {"positions": "learned", "norm": "layer", "mlp": "gelu", "bias": True}
SHAPES: dict[str, dict[str, object]] = {
    "llama": {},
    "grouped queries": {"n_kv_heads": 2},
    "one key head": {"n_kv_heads": 1},
    "biases": {"bias": True},
    "gpt2": GPT2,
    "layer norm without bias": {"norm": "layer"},
    "gelu without bias": {"mlp": "gelu"},
    "learned positions": {"positions": "learned"},
    "untied": {"tie_embeddings": False},
    "heads of 54": {"d_head": 54},
    "heads of 54, learned positions": {"d_head": 54, "positions": "learned"},
    "heads of 4, grouped": {"d_head": 4, "n_kv_heads": 2},
    "other rotary base": {"rope_theta": 500.0},
    "large eps": {"norm_eps": 0.5},
    "gpt-neo": GPT2 | {"qkv_bias": False, "scale_attention": False, "local_window": 6},
    "local window, rotary, grouped": {"local_window": 3, "n_kv_heads": 2},
    "window of one token": {"local_window": 1, "d_head": 10},
    "qk norm": {"qk_norm": True, "n_kv_heads": 2},
    "qk norm, heads of 54": {"qk_norm": True, "d_head": 54, "norm_eps": 0.01, "local_window": 9},
    "qk norm, learned positions": {"qk_norm": True, "d_head": 54, "positions": "learned"},
    "biases apart": {"qkv_bias": True, "mlp_bias": True, "scale_attention": False},
}


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train_bpe(SENTENCES, vocab_size=300)


def small_model(**changes: object) -> Decoder:
    shape = {"vocab_size": 97, "seq_len": 24, "n_layers": 2, "d_model": 32, "n_heads": 4, "d_ff": 40} | changes
    return random_model(ModelConfig(**shape))


def assert_same_walk(first: Backend, second: Backend, atol: float) -> None:
    """Prefill, decode, copy and prefill again with both, and compare all logits."""
    ids = some_tokens(first.config.vocab_size, rows=3, steps=first.config.seq_len).tolist()
    for slot, count in enumerate((5, 1, 13)):
        np.testing.assert_allclose(
            first.prefill(slot, ids[slot][:count]), second.prefill(slot, ids[slot][:count]), atol=atol, rtol=0
        )
    for step in range(4):  # slots of different lengths
        tokens = [ids[slot][step] for slot in range(3)]
        np.testing.assert_allclose(first.decode(tokens), second.decode(tokens), atol=atol, rtol=0)
    for backend in (first, second):
        backend.copy_slot(2, 0)  # a longer slot over a shorter one, which then stands alone
        assert [backend.length(slot) for slot in range(3)] == [17, 5, 17]
    for token in ids[0][: first.config.seq_len - 17]:  # until the slot is full
        np.testing.assert_allclose(first.decode([token]), second.decode([token]), atol=atol, rtol=0)
    for backend in (first, second):
        assert backend.length(0) == first.config.seq_len
        assert backend.prefill(0, []) is None and backend.prefill(1, ids[1][:12], wants_logits=False) is None
    more = [backend.prefill(1, ids[1][12:19], start=12) for backend in (first, second)]  # behind what is there
    np.testing.assert_allclose(*more, atol=atol, rtol=0)
    np.testing.assert_allclose(first.decode([3, 4]), second.decode([3, 4]), atol=atol, rtol=0)


@pytest.mark.parametrize("shape", SHAPES)
def test_logits_equal_torchs_for_slots_that_come_go_and_move(shape: str) -> None:
    model = small_model(**SHAPES[shape])
    assert_same_walk(TorchBackend(model, 3), OnnxBackend(model, 3, threads=1), atol=1e-4)


@pytest.mark.parametrize("name", PRESETS)
def test_logits_equal_torchs_for_every_preset(name: str) -> None:
    config = dataclasses.replace(load_config(name).model, vocab_size=300, seq_len=24, n_layers=2)
    torch.manual_seed(0)
    model = Decoder(config).eval()
    assert_same_walk(TorchBackend(model, 3), OnnxBackend(model, 3, threads=1), atol=1e-4)


@pytest.mark.parametrize("changes", [{}, {"n_kv_heads": 2, "tie_embeddings": False}, GPT2])
def test_greedy_stories_equal_torchs_token_for_token(tokenizer: Tokenizer, changes: dict[str, object]) -> None:
    """More stories than slots, of different lengths, on past the context of 64 tokens."""
    model = without_end(talkative_model(tokenizer, **changes), tokenizer)
    prompts = ["", "Once", "The cat went to the forest", "Tom and Mia played in the", "Mia"]
    params = [SamplingParams(temperature=0, max_tokens=30 + 25 * index) for index in range(5)]
    expected, got = (
        Engine(backend, tokenizer).generate(prompts, params)
        for backend in (TorchBackend(model, 3), OnnxBackend(model, 3, threads=1))
    )
    assert got == expected
    assert [len(story.tokens) for story in got] == [30, 55, 80, 105, 130]


@pytest.mark.parametrize("weights", ["fp32", "int8"])
def test_same_seed_writes_the_same_story_alone_and_in_company(tokenizer: Tokenizer, weights: str) -> None:
    model = without_end(talkative_model(tokenizer), tokenizer)
    engine = Engine(OnnxBackend(model, 4, weights=weights, threads=1), tokenizer)  # type: ignore[arg-type]
    mine = SamplingParams(seed=7, max_tokens=60)
    (alone,) = engine.generate(["The cat"], [mine])
    others = [SamplingParams(seed=seed, max_tokens=9 * seed + 4) for seed in range(6)]
    assert engine.generate([*["Once upon"] * 6, "The cat"], [*others, mine])[-1] == alone


@pytest.mark.parametrize("weights", ["fp32", "int8"])
def test_a_slot_does_not_depend_on_its_neighbours(weights: str) -> None:
    """With int8 each slot is rounded by its own scale: a loud neighbour leaves no trace."""
    backend = OnnxBackend(small_model(), 3, weights=weights, threads=1)  # type: ignore[arg-type]
    alone = backend.decode([5]).copy()
    for slot in range(3):
        backend.prefill(slot, [])
    company = backend.decode([5, 60, 61])[:1].copy()
    np.testing.assert_allclose(company, alone, atol=1e-5, rtol=0)


@pytest.mark.parametrize("shape", SHAPES)
def test_int8_is_near_torch_for_slots_that_come_go_and_move(shape: str) -> None:
    """Every shape has its products and its cache in int8; logits of random weights are about 1."""
    model = small_model(**SHAPES[shape])
    assert_same_walk(TorchBackend(model, 3), OnnxBackend(model, 3, weights="int8", threads=1), atol=0.2)


def test_int8_keeps_a_byte_a_number() -> None:
    graph = decode_graph(small_model(), "int8", cache_scales=cache_scales(small_model())).graph
    kinds = {one.name: one.type.tensor_type.elem_type for one in [*graph.input, *graph.output]}
    assert {kinds[name] for name in kinds if "keys" in name or "values" in name} == {onnx.TensorProto.INT8}
    weights = {one.name: one.data_type for one in graph.initializer if one.name.startswith(("qkv_0", "down_1"))}
    assert weights["qkv_0"] == weights["down_1"] == onnx.TensorProto.INT8


def test_int8_story_goes_on_beyond_the_context_with_a_read_prompt_or_a_written_one(tokenizer: Tokenizer) -> None:
    """A full slot reads its newest half anew: what prefill leaves in an int8 cache goes on as what decode left."""
    model = without_end(talkative_model(tokenizer), tokenizer)
    backend = OnnxBackend(model, 2, weights="int8", threads=1)
    params = SamplingParams(temperature=0, max_tokens=150)
    whole, other = Engine(backend, tokenizer).generate(["Once", "Tom and"], [params] * 2)
    assert [len(whole.tokens), len(other.tokens)] == [150, 150]
    (alone,) = Engine(OnnxBackend(model, 1, weights="int8", threads=1), tokenizer).generate(["Once"], [params])
    assert alone == whole


def test_processor_that_cuts_sums_gets_unsigned_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    """AVX2 without VNNI: it is asked by computing, not by the name of the processor."""
    model = small_model()
    expected = OnnxBackend(model, 1, weights="int8", threads=1).decode([5])
    monkeypatch.setattr(onnx_backend, "has_exact_signed_products", lambda: False)
    graphs: list[onnx.ModelProto] = []
    monkeypatch.setattr(
        onnx_backend, "decode_graph", lambda *a, **k: graphs.append(decode_graph(*a, **k)) or graphs[-1]
    )
    got = OnnxBackend(model, 1, weights="int8", threads=1).decode([5])
    assert {one.data_type for one in graphs[0].graph.initializer if one.name == "qkv_0"} == {onnx.TensorProto.UINT8}
    if has_exact_signed_products():
        np.testing.assert_array_equal(got, expected)


def test_sums_are_found_exact_or_not_by_the_largest(monkeypatch: pytest.MonkeyPatch) -> None:
    class Cutting:
        def run(self, _: object, inputs: dict[str, np.ndarray]) -> list[np.ndarray]:
            return [np.full(inputs["x"].shape, 32 * 32767, np.int32)]  # pairs of products cut at 16 bits

    monkeypatch.setattr(onnx_backend, "_session", lambda *_: Cutting())
    assert not has_exact_signed_products.__wrapped__()


def test_prompt_logprobs_come_from_either_backend(tokenizer: Tokenizer) -> None:
    model = talkative_model(tokenizer)
    params = SamplingParams(max_tokens=0, prompt_logprobs=True)
    expected, got = (
        Engine(backend, tokenizer).generate(["The cat went"], [params])[0].prompt_logprobs
        for backend in (TorchBackend(model), OnnxBackend(model, threads=1))
    )
    assert [one.token for one in got] == [one.token for one in expected]
    assert [one.logprob for one in got] == pytest.approx([one.logprob for one in expected], abs=1e-4)


@pytest.mark.parametrize(
    "changes",
    [{}, GPT2, {"tie_embeddings": False, "bias": True, "n_kv_heads": 2}, {"qk_norm": True, "local_window": 9}],
)
def test_int8_stays_near_fp32_but_is_not_it(changes: dict[str, object]) -> None:
    model = talkative_model(train_bpe(SENTENCES, vocab_size=300), **changes)
    stream = TokenStream(some_tokens(300, rows=1, steps=200)[0].numpy(), n_bytes=700)
    whole = evaluate_windows(model, stream, seq_len=64, context=TrainContext()).val_bits_per_byte
    exact = bits_per_byte(OnnxBackend(model, 1, threads=1), stream)
    rounded = bits_per_byte(OnnxBackend(model, 1, weights="int8", threads=1), stream)
    assert exact == pytest.approx(whole, rel=1e-5)
    assert 1e-7 < abs(rounded / exact - 1) < 0.01


@pytest.mark.parametrize("weights", ["fp32", "int8"])
def test_every_weight_is_stored_once_and_used(weights: str) -> None:
    graph = decode_graph(small_model(), weights).graph  # type: ignore[arg-type]
    names = [one.name for one in graph.initializer]
    assert len(names) == len(set(names))
    assert set(names) <= {name for node in graph.node for name in node.input}


def test_heads_are_filled_up_to_what_the_operator_takes() -> None:
    shapes = [("rotary", 8), ("rotary", 16), ("rotary", 54), ("learned", 4), ("learned", 54)]
    widths = [padded_width(ModelConfig(positions=kind, d_head=width)) for kind, width in shapes]  # type: ignore[arg-type]
    assert widths == [16, 16, 64, 8, 56]


def test_weights_are_copied() -> None:
    model = small_model()
    backend = OnnxBackend(model, 1, threads=1)
    before = backend.prefill(0, [1, 2, 3])
    for parameter in model.parameters():
        parameter.data.zero_()
    assert before is not None and np.abs(before).max() > 0
    np.testing.assert_allclose(backend.prefill(0, [1, 2, 3]), before)


# ---- the choice


@pytest.mark.parametrize(
    ("name", "kind"),
    [("auto", OnnxBackend), ("onnx", OnnxBackend), ("onnx-int8", OnnxBackend), ("torch", TorchBackend)],
)
def test_backend_is_chosen_by_name_and_starts_empty(name: str, kind: type) -> None:
    backend = make_backend(small_model(), 3, name)  # type: ignore[arg-type]
    assert isinstance(backend, kind) and backend.max_slots == 3
    assert [backend.length(slot) for slot in range(3)] == [0, 0, 0]


def test_unknown_backend_is_refused() -> None:
    with pytest.raises(ValueError, match="must be one of auto, torch, onnx, onnx-int8"):
        make_backend(small_model(), 1, "tensorrt")  # type: ignore[arg-type]


def test_model_too_large_for_a_graph_is_refused_by_name_and_left_to_torch_by_auto(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(onnx.checker, "MAXIMUM_PROTOBUF", 1000)
    with pytest.raises(BackendError, match=r"cannot run this model: the model has .* 2 GB fit .*; use torch"):
        make_backend(small_model(), 1, "onnx")
    assert isinstance(make_backend(small_model(), 1), TorchBackend)


def test_missing_package_is_named_and_auto_does_without(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    monkeypatch.delitem(sys.modules, "slm_ray.generation.onnx_backend")
    with pytest.raises(BackendError, match="backend onnx needs onnxruntime: pip install"):
        make_backend(small_model(), 1, "onnx")
    assert isinstance(make_backend(small_model(), 1), TorchBackend)


def test_model_elsewhere_than_on_the_cpu_is_left_to_torch() -> None:
    model = small_model().to("meta")
    with pytest.raises(BackendError, match="runs on the CPU and the model is on meta"):
        make_backend(model, 1, "onnx-int8")
    assert isinstance(make_backend(model, 1), TorchBackend)


def test_no_slots_are_refused() -> None:
    with pytest.raises(ValueError, match=r"max_slots \(0\) must be at least 1"):
        OnnxBackend(small_model(), 0)


def test_a_replica_of_another_cluster_sends_nothing_either(monkeypatch: pytest.MonkeyPatch) -> None:
    """No command of ours has set its environment."""
    monkeypatch.delenv("ORT_DISABLE_TELEMETRY", raising=False)
    make_backend(random_model(ModelConfig(vocab_size=300, seq_len=16, n_layers=1, d_model=16, n_heads=2)), 1, "onnx")
    assert os.environ["ORT_DISABLE_TELEMETRY"] == "1"
