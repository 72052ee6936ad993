"""Models that others made, of every family: measured, asked, served, continued and given back."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from serve.models.loaded_model import LoadedModel
from slm_ray import evaluate, generate
from slm_ray.config.schema import TrainConfig
from slm_ray.dataset.manifest import load_manifest
from slm_ray.evaluation.measurement import Data
from slm_ray.evaluation.stories import story_text
from slm_ray.generation.engine import Engine
from slm_ray.generation.sampling import SamplingParams
from slm_ray.generation.torch_backend import TorchBackend
from slm_ray.model_files.folders import weights_sha256
from slm_ray.model_files.foreign_tokenizer import read_tokenizer
from slm_ray.runs import checkpoint
from slm_ray.runs.outcome import RunStatus
from slm_ray.tokenization.loading import with_end_of_text
from slm_ray.tokenization.tokenizer import Tokenizer
from slm_ray.tracking import registry
from tests.support.begun_runs import begin, train
from tests.support.data_sets import write_data
from tests.support.foreign_models import SHAPES, loss_by_transformers, opened_by_transformers, write_foreign

PADDING = 24
LONG = 768
"""A context that holds every story whole."""
CHANGES = {
    "llama": {"max_position_embeddings": LONG, "attention_bias": True},
    "qwen3": {"max_position_embeddings": LONG},
    "gpt2": {"n_positions": LONG},
    "gpt_neo": {"max_position_embeddings": LONG},
}


@pytest.fixture(scope="module", params=sorted(SHAPES))
def foreign(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    kind = request.param
    return write_foreign(tmp_path_factory.mktemp("made") / kind, kind, padding=PADDING, **CHANGES[kind])


def test_its_loss_is_that_of_transformers(foreign: Path, tiny_data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert evaluate.main(["--model", str(foreign), "--data", str(tiny_data), "--json"]) == 0
    got = json.loads(capsys.readouterr().out)
    data, tokenizer = Data.open(str(tiny_data), "validation"), read_tokenizer(foreign)
    own = data.tokenizer()
    texts = [story_text(block, number, own) for block in data.stories() for number in range(len(block))]
    borders = tokenizer.borders
    windows = [[borders.start_id, *tokenizer.encode(text), borders.eos_id] for text in texts]
    assert max(map(len, windows)) <= LONG
    nats, count = loss_by_transformers(foreign, windows)
    assert got["tokens"] == count
    assert got["loss"] == pytest.approx(nats / count, abs=1e-4)
    n_bytes = load_manifest(tiny_data).splits["validation"].bytes
    assert got["bytes"] == n_bytes
    assert got["bits_per_byte"] == pytest.approx(nats / np.log(2) / n_bytes, rel=1e-5)
    assert "before each text" in got["borders"]
    assert got["model"].startswith(f"{foreign.name} hf-{weights_sha256(foreign)[:8]}")


def test_it_is_served_and_writes_what_transformers_would(foreign: Path) -> None:
    loaded = LoadedModel(registry.resolve_model(str(foreign)), max_slots=2)
    try:
        params = SamplingParams(max_tokens=12, temperature=0)
        answer = loaded.submit("Once upon a time", params).result(timeout=60)
        description = loaded.description
    finally:
        loaded.close()
    tokenizer, theirs = loaded.tokenizer, opened_by_transformers(foreign)
    ids = [tokenizer.start_id, *tokenizer.encode("Once upon a time")]
    with torch.inference_mode():
        for _ in range(12):
            logits = theirs(torch.tensor([ids])).logits[0, -1, : tokenizer.vocab_size]
            ids.append(int(logits.argmax()))
            if ids[-1] in tokenizer.stop_ids:
                break
    expected = [token for token in ids[-12:] if token not in tokenizer.stop_ids]
    assert list(answer.tokens) == expected[-len(answer.tokens) :] and answer.tokens
    assert (description.name, description.step, description.seq_len) == (foreign.name, 0, LONG)


def test_rows_that_no_token_has_are_never_written(foreign: Path) -> None:
    model, tokenizer = registry.load_model(registry.resolve_model(str(foreign)))
    assert model.config.vocab_size == tokenizer.vocab_size + PADDING
    with torch.no_grad():
        model.lm_head.weight[tokenizer.vocab_size :] *= 100  # the likeliest by far, and the least likely
    engine = Engine(TorchBackend(model, 2), tokenizer)
    hot = SamplingParams(max_tokens=60, temperature=5, top_k=0, seed=1, logprobs=3, prompt_logprobs=True)
    greedy = SamplingParams(max_tokens=60, temperature=0)
    for one in engine.generate(["The cat", "The cat"], [hot, greedy]):
        assert max(one.tokens, default=0) < tokenizer.vocab_size
        assert all(top[0] < tokenizer.vocab_size for seen in one.logprobs for top in seen.top)


def test_generate_prints_from_it(foreign: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--prompt", "The cat", "--max-tokens", "8", "--seed", "1", "--json"]
    assert generate.main(["--model", str(foreign), *words]) == 0
    record = json.loads(capsys.readouterr().out)
    assert record["model"].startswith(f"{foreign.name} hf-") and record["completion_tokens"] <= 8


def test_it_is_continued_and_opens_in_transformers_again(
    foreign: Path, tiny_config: TrainConfig, tmp_path: Path
) -> None:
    text = (foreign / "tokenizer.json").read_text(encoding="utf-8")
    tokenizer = Tokenizer.from_json(with_end_of_text(text))
    write_data(tmp_path / "data", tokenizer, {"train": [(0, 60)], "validation": [(110, 114)]})
    lengths = {"max_steps": 20, "eval_interval_steps": 20, "sample_prompt": ""}
    inputs = begin(tiny_config, foreign, data=str(tmp_path / "data"), model={"seq_len": 48}, **lengths)
    assert inputs.folder.latest_valid() is not None
    summary = train(inputs)
    assert (summary.status, summary.step) == (RunStatus.FINISHED, 20)
    _, (before, after) = inputs.history.series("val_loss")
    assert after < before
    state = checkpoint.load_state(inputs.folder.latest)
    assert state.origin is not None
    assert (state.origin.reference, state.origin.weights_sha256) == (foreign.name, weights_sha256(foreign))
    is_new = "<|endoftext|>" not in read_tokenizer(foreign).entries
    wanted = ["1 new rows in its embedding"] * is_new + [f"without the last {PADDING - is_new} rows"]
    assert all(any(said.startswith(start) for said in state.origin.changes) for start in wanted)
    ours, its_tokenizer = checkpoint.load_model(inputs.folder.latest)
    assert ours.config.vocab_size == its_tokenizer.vocab_size == tokenizer.vocab_size
    theirs = opened_by_transformers(inputs.folder.latest / "model")
    tokens = torch.tensor([[its_tokenizer.start_id, *its_tokenizer.encode("Once upon a time there was a cat")]])
    with torch.inference_mode():
        torch.testing.assert_close(ours(tokens), theirs(tokens).logits, atol=1e-4, rtol=0)
