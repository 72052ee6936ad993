"""Stories written on a GPU: by the engine, the command line, the server's model, and measured there."""

import json
from pathlib import Path

import numpy as np
import pytest

from serve.models.loaded_model import LoadedModel
from slm_ray import evaluate, generate
from slm_ray.generation.backend_choice import BackendError, make_backend
from slm_ray.generation.engine import Engine
from slm_ray.generation.sampling import SamplingParams
from slm_ray.generation.torch_backend import TorchBackend
from slm_ray.tokenization.tokenizer import Tokenizer
from slm_ray.tracking.registry import resolve_model
from tests.support.gpu import GPU, needs_gpu
from tests.support.saved_models import save_model
from tests.support.tiny_model import SENTENCES, talkative_model

pytestmark = needs_gpu
PROMPTS = ["Once", "Once upon a time there", "The cat", "Tom and Mia played"]


def greedy(n_tokens: int) -> SamplingParams:
    return SamplingParams(max_tokens=n_tokens, temperature=0)


@pytest.fixture
def model(tmp_path: Path, tiny_tokenizer: Tokenizer) -> Path:
    """A saved model that has something to say."""
    return save_model(tmp_path / "model", talkative_model(tiny_tokenizer), tiny_tokenizer)


def test_greedy_stories_are_those_of_the_cpu(tiny_tokenizer: Tokenizer) -> None:
    stories = []
    for device in ("cpu", GPU):
        model = talkative_model(tiny_tokenizer).to(device)
        engine = Engine(TorchBackend(model, len(PROMPTS)), tiny_tokenizer)
        stories.append([found.text for found in engine.generate(PROMPTS, [greedy(40)] * len(PROMPTS))])
    assert stories[0] == stories[1]


def test_a_story_alone_is_the_story_in_a_batch(tiny_tokenizer: Tokenizer) -> None:
    model = talkative_model(tiny_tokenizer).to(GPU)
    params = [SamplingParams(max_tokens=100, temperature=0.8, seed=seed) for seed in range(len(PROMPTS))]
    together = Engine(TorchBackend(model, len(PROMPTS)), tiny_tokenizer).generate(PROMPTS, params)
    for prompt, one, found in zip(PROMPTS, params, together):
        (alone,) = Engine(TorchBackend(model, 1), tiny_tokenizer).generate([prompt], [one])
        assert alone.text == found.text


def test_logits_are_those_of_the_cpu(tiny_tokenizer: Tokenizer) -> None:
    tokens = tiny_tokenizer.encode(SENTENCES[0])
    found = [
        make_backend(talkative_model(tiny_tokenizer).to(device), 2, "torch").prefill(1, tokens)
        for device in ("cpu", GPU)
    ]
    assert found[0] is not None
    np.testing.assert_allclose(found[1], found[0], atol=1e-3)


def test_a_backend_of_cpus_refuses_it_and_auto_takes_torch(tiny_tokenizer: Tokenizer) -> None:
    model = talkative_model(tiny_tokenizer).to(GPU)
    with pytest.raises(BackendError, match="runs on the CPU"):
        make_backend(model, 2, "onnx")
    assert isinstance(make_backend(model, 2), TorchBackend)


def test_the_commands_take_it(model: Path, tiny_data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    stories = {}
    for device in ("cpu", "cuda", "auto"):
        words = ["--model", str(model), "--temperature", "0", "--max-tokens", "20", "--json", "--device", device]
        assert generate.main([*words, "--backend", "torch"]) == 0
        stories[device] = json.loads(capsys.readouterr().out)["text"]
    assert stories["cuda"] == stories["cpu"] == stories["auto"]
    losses = {}
    for device in ("cpu", "cuda"):
        words = ["--model", str(model), "--data", str(tiny_data), "--device", device, "--json"]
        assert evaluate.main(words) == 0
        losses[device] = json.loads(capsys.readouterr().out)["loss"]
    assert losses["cuda"] == pytest.approx(losses["cpu"], abs=1e-4)


def test_the_server_s_model_answers_there(model: Path) -> None:
    loaded = LoadedModel(resolve_model(str(model)), max_slots=2, device="cuda")
    try:
        assert loaded.submit("Once", greedy(10)).result(timeout=60).text
    finally:
        loaded.close()
