"""Prompts that come together: read in one run, as if each were read by itself."""

import numpy as np
import pytest

from slm_ray.config.schema import ModelConfig
from slm_ray.generation import engine as engine_module
from slm_ray.generation.engine import Engine
from slm_ray.generation.onnx_backend import OnnxBackend
from slm_ray.generation.sampling import SamplingParams
from slm_ray.generation.torch_backend import TorchBackend
from slm_ray.model.decoder import Decoder
from slm_ray.tokenization.tokenizer import Tokenizer
from slm_ray.tokenization.training import train_bpe
from tests.support.tiny_model import SENTENCES, random_model, some_tokens, talkative_model, without_end

GREEDY = SamplingParams(temperature=0, max_tokens=40)
SHAPE: dict[str, object] = {"vocab_size": 97, "seq_len": 24, "n_layers": 2, "d_model": 32, "n_heads": 4, "d_ff": 40}
SHAPES: dict[str, dict[str, object]] = {
    "llama": {},
    "gpt2": {"positions": "learned", "norm": "layer", "mlp": "gelu", "bias": True},
    "qk norm, heads of 54": {"qk_norm": True, "d_head": 54},
    "local window, grouped": {"local_window": 3, "n_kv_heads": 2},
}


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train_bpe(SENTENCES, vocab_size=300)


@pytest.fixture(scope="module")
def model(tokenizer: Tokenizer) -> Decoder:
    return without_end(talkative_model(tokenizer), tokenizer)


@pytest.mark.parametrize("weights", ["fp32", "int8"])
@pytest.mark.parametrize("shape", SHAPES)
def test_prompts_read_in_one_run_are_those_read_one_by_one(shape: str, weights: str) -> None:
    """Bit by bit, in slots that were longer before, behind one that is in use."""
    model = random_model(ModelConfig(**SHAPE | SHAPES[shape]))
    ids = some_tokens(model.config.vocab_size, rows=6, steps=24).tolist()
    prompts = [ids[0][:7], ids[1][:1], ids[2][:20], ids[3][:2]]
    backends = [OnnxBackend(model, 5, weights=weights, threads=1) for _ in range(2)]
    for backend in backends:
        for slot in range(5):
            backend.prefill(slot, ids[5 - slot][:22], wants_logits=False)
    backends[0].prefill_all(1, prompts)
    for slot, tokens in enumerate(prompts, start=1):
        backends[1].prefill(slot, tokens, wants_logits=False)
    assert [backends[0].length(slot) for slot in range(5)] == [22, 7, 1, 20, 2]
    for step in range(2):
        logits = [backend.decode(ids[4][step : step + 5]).copy() for backend in backends]
        np.testing.assert_allclose(*logits, atol=1e-6, rtol=0)


def test_prompts_that_come_together_are_read_in_runs_of_bounded_size(
    model: Decoder, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the order of the line; a long one among them, which is read part by part, holds back those behind it."""
    monkeypatch.setattr(engine_module, "PROMPT_TOKENS_PER_STEP", 20)
    backend, read = TorchBackend(model, max_slots=8), []
    whole = backend.prefill_all
    monkeypatch.setattr(backend, "prefill_all", lambda slot, some: read.append((slot, len(some))) or whole(slot, some))
    prompts = ["Mia", "", "Tom and", "Once", "The cat went to the forest and found a shiny stone.", "Mia", "Tom"]
    stories = Engine(backend, tokenizer).generate(prompts, [GREEDY] * len(prompts))
    assert stories == [Engine(TorchBackend(model), tokenizer).generate([one], [GREEDY])[0] for one in prompts]
    assert read == [(2, 2), (5, 2)]  # an empty prompt has nothing to read; then the long one


@pytest.mark.parametrize("is_read", [True, False])
def test_prompts_that_fail_together_are_read_one_by_one(
    model: Decoder, tokenizer: Tokenizer, is_read: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = Engine(TorchBackend(model), tokenizer)
    requests = [engine.request(prompt, GREEDY) for prompt in ("Mia", "Once", "Tom")]
    if is_read:  # all together, and one of them cannot go on
        monkeypatch.setattr(requests[1], "end_prompt", lambda: (_ for _ in ()).throw(ValueError("broken")))
    else:
        prefill, lost = engine.backend.prefill, requests[1].last_tokens(99)[:-1]
        monkeypatch.setattr(engine.backend, "prefill_all", lambda *_: (_ for _ in ()).throw(ValueError("broken")))

        def all_but_one(slot: int, tokens: list[int], **options: object) -> object:
            if tokens == lost:
                raise ValueError("broken")
            return prefill(slot, tokens, **options)

        monkeypatch.setattr(engine.backend, "prefill", all_but_one)
    for request in requests:
        engine.add(request)
    while not all(request.is_finished for request in requests):
        engine.step()
    assert [str(request.fault) for request in requests] == ["None", "broken", "None"]
    alone = [Engine(TorchBackend(model), tokenizer).generate([one], [GREEDY])[0] for one in ("Mia", "Tom")]
    assert [requests[0].completion(), requests[2].completion()] == alone


def test_a_story_whose_text_cannot_be_told_fails_by_itself(
    model: Decoder, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Tokens become text when somebody reads it, which is not where they are written."""
    engine = Engine(TorchBackend(model), tokenizer)
    requests = [engine.request(prompt, GREEDY) for prompt in ("Mia", "Tom")]
    monkeypatch.setattr(requests[0]._text, "push", lambda _: (_ for _ in ()).throw(ValueError("broken")))
    for request in requests:
        engine.add(request)
    engine.step()
    assert [request.take_chunk() is None for request in requests] == [True, False]
    assert [str(request.fault) for request in requests] == ["broken", "None"]
    assert engine.step() == [requests[0]] and engine.running == 1


def test_a_story_that_fails_while_it_waits_for_a_slot_is_answered(
    model: Decoder, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One that outgrew the context is back in the line when its reader asks for its text."""
    engine = Engine(TorchBackend(model), tokenizer)
    request = engine.request("Mia", SamplingParams(temperature=0, max_tokens=200))
    engine.add(request)
    while not engine._line.waiting or not request.is_read:
        engine.step()
    monkeypatch.setattr(request._text, "push", lambda _: (_ for _ in ()).throw(ValueError("broken")))
    assert request.take_chunk() is None
    assert engine.step() == [request] and str(request.fault) == "broken"
    assert engine.is_idle
