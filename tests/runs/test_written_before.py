"""Checkpoints and registered models of earlier versions still open: `checkpoint_v1` was written by commit 413fe9d."""

import dataclasses
import json
import shutil
from pathlib import Path

import pytest

from slm_ray.config.files import from_dict
from slm_ray.config.schema import TrainConfig
from slm_ray.generation.engine import Engine
from slm_ray.generation.sampling import SamplingParams
from slm_ray.generation.torch_backend import TorchBackend
from slm_ray.runs import checkpoint
from slm_ray.tokenization.tokenizer import Tokenizer
from slm_ray.tokenization.training import train_bpe
from slm_ray.tracking.mlflow_runs import client
from slm_ray.tracking.registry import resolve_model
from slm_ray.tracking.tracker import NullTracker
from slm_ray.training.context import TrainContext
from slm_ray.training.inputs import load_inputs
from slm_ray.training.loop import fit
from tests.support.data_sets import write_data

V1 = Path(__file__).with_name("checkpoint_v1")
VAL_LOSS = {4: 4.795021, 8: 4.539814}  # nats a token at a step, as that version measured them
GREEDY = "e" * 24


def test_a_checkpoint_of_before_tells_its_stories() -> None:
    model, tokenizer = checkpoint.load_model(V1 / "run")
    params = SamplingParams(max_tokens=24, temperature=0.0)
    assert Engine(TorchBackend(model), tokenizer).generate(["Once upon a time"], [params])[0].text == GREEDY
    assert checkpoint.load_state(V1 / "run").metrics.val_loss == pytest.approx(VAL_LOSS[4], abs=1e-6)


def test_a_run_of_before_is_resumed_as_if_nothing_had_changed(tmp_path: Path) -> None:
    shutil.copytree(V1 / "run", tmp_path / "runs" / "old" / "checkpoints" / "step-00000004")
    (tmp_path / "data").mkdir()
    tokenizer = Tokenizer.load(V1 / "run" / "model" / "tokenizer.json")
    stories = json.loads((V1 / "stories.json").read_text(encoding="utf-8"))  # the sample corpus of that version
    assert tokenizer.sha256 == train_bpe(stories, vocab_size=272).sha256
    splits = {"train": [(0, 60), (60, 110)], "validation": [(110, 120)]}
    write_data(tmp_path / "data", tokenizer, splits, lambda start, stop: stories[start:stop])
    state = checkpoint.load_state(V1 / "run")
    saved = from_dict(TrainConfig, state.config, "state.json")
    places = {"data": str(tmp_path / "data"), "output": str(tmp_path / "runs"), "name": "old"}
    inputs = load_inputs(dataclasses.replace(saved, **places), NullTracker())
    assert inputs.data_fingerprint == state.data_fingerprint
    summary = fit(inputs, TrainContext())
    assert (summary.status, summary.step) == ("finished", 8)
    assert summary.metrics.val_loss == pytest.approx(VAL_LOSS[8], abs=1e-4)


def test_a_version_registered_before_is_found_by_its_alias(mlflow_uri: str) -> None:
    store = client(mlflow_uri)
    store.create_registered_model("old")
    version = store.create_model_version("old", source=(V1 / "registered").as_uri(), tags={"step": "4"})
    store.set_registered_model_alias("old", "champion", version.version)
    found = resolve_model("models:/old@champion", mlflow_uri)
    assert (found.version, found.step) == ("1", 4)
    model, _ = checkpoint.load_model(found.path)
    assert model.config.vocab_size == 272


def test_a_run_of_before_has_the_one_data_set_that_it_names() -> None:
    state = checkpoint.load_state(V1 / "run")
    assert state.data_lineage == state.lineage_with(state.data_fingerprint) == [(state.data_fingerprint, 0)]
    assert state.lineage_with("other") == [(state.data_fingerprint, 0), ("other", 4)]
