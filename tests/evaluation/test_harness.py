"""The harness gets the numbers of our own measure."""

import json
import math
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("lm_eval")
from lm_eval.api.registry import get_model

from slm_ray.dataset.manifest import load_manifest
from slm_ray.evaluation.harness import SlmRayLM
from slm_ray.evaluation.measurement import Data, measure, subject
from slm_ray.evaluation.scoring import Scorer
from slm_ray.evaluation.stories import read_stories, story_text
from slm_ray.generation.engine import Engine
from slm_ray.generation.sampling import SamplingParams
from slm_ray.generation.torch_backend import TorchBackend
from slm_ray.tokenization.tokenizer import Tokenizer
from tests.support.paths import ROOT
from tests.support.saved_models import save_talkative


@dataclass
class Request:
    args: tuple[Any, ...]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer: Tokenizer) -> Path:
    return save_talkative(tmp_path_factory.mktemp("models") / "tiny", tiny_tokenizer, seq_len=48)


@pytest.fixture(scope="module")
def lm(folder: Path) -> SlmRayLM:
    made: SlmRayLM = get_model("slm_ray").create_from_arg_string(f"model={folder}", {"batch_size": 2, "device": "cpu"})
    return made


@pytest.fixture(scope="module")
def texts(tiny_data: Path, tiny_tokenizer: Tokenizer) -> list[str]:
    (block,) = read_stories(str(tiny_data), "validation", load_manifest(tiny_data))
    return [story_text(block, number, tiny_tokenizer) for number in range(len(block))]


def test_rolling_is_our_measure_without_the_end_mark(
    lm: SlmRayLM, folder: Path, tiny_data: Path, texts: list[str]
) -> None:
    by_harness = lm.loglikelihood_rolling([Request((text,)) for text in texts])
    with subject(str(folder)) as found:
        ours = measure(found, Data.open(str(tiny_data), "validation"))
        scorer, eos_id = Scorer.of_model(found.model), found.tokenizer.eos_id
        whole = [np.array([eos_id, *found.tokenizer.encode(text), eos_id]) for text in texts]
        end_marks = [float(nats[-1]) for nats in scorer.nats(whole)]
    assert ours.stories is not None
    assert [-nats + end for nats, end in zip(by_harness, end_marks)] == pytest.approx(ours.stories.losses.nats)


def test_a_continuation_has_its_part_of_the_whole(lm: SlmRayLM) -> None:
    context, continuation = "Once upon a time there was", " a little cat."
    (whole,) = lm.loglikelihood_rolling([Request((context + continuation,))])
    (before,) = lm.loglikelihood_rolling([Request((context,))])
    ((part, is_greedy),) = lm.loglikelihood([Request((context, continuation))])
    assert part == pytest.approx(whole - before)
    assert not is_greedy
    ((spaced, _),) = lm.loglikelihood([Request((f"{context} ", continuation.lstrip()))])
    assert spaced == part
    ((alone, _),) = lm.loglikelihood([Request(("", context))])
    assert alone == pytest.approx(before)
    assert lm.loglikelihood([Request((context, "")), Request(("", ""))]) == [(0.0, True), (0.0, True)]


def test_greedy_continuations_are_known_as_such(lm: SlmRayLM, folder: Path) -> None:
    with subject(str(folder)) as found:
        greedy = SamplingParams(max_tokens=6, temperature=0, top_k=0)
        engine = Engine(TorchBackend(found.model), found.tokenizer)
        (expected,) = engine.generate(["Tom and Mia"], [greedy])
    (text,) = lm.generate_until([Request(("Tom and Mia", {"until": [], "max_gen_toks": 6}))])
    assert text == expected.text
    prompt = [found.tokenizer.eos_id, *found.tokenizer.encode("Tom and Mia")]
    (scored,) = lm._scorer.scored([np.array([*prompt, *expected.tokens])], [len(prompt)])
    assert scored.is_likeliest[len(prompt) - 1 :].all()


def test_a_stop_text_ends_a_continuation_and_sampling_has_a_seed(lm: SlmRayLM) -> None:
    (free,) = lm.generate_until([Request(("Once", {"max_gen_toks": 20}))])
    stop = free[4:6]
    (stopped,) = lm.generate_until([Request(("Once", {"max_gen_toks": 20, "until": [stop]}))])
    assert stopped == free[: free.index(stop)]
    options = {"max_gen_toks": 20, "do_sample": True, "temperature": 1.0}
    assert lm.generate_until([Request(("Once", options))]) == lm.generate_until([Request(("Once", options))])


def test_what_is_longer_than_the_context_is_seen_from_its_end(lm: SlmRayLM, texts: list[str]) -> None:
    long = " ".join(texts[:3])
    ((nats, _),) = lm.loglikelihood([Request((long, " The end."))])
    assert math.isfinite(nats) and nats < 0
    (told,) = lm.generate_until([Request((long, {"max_gen_toks": 3}))])
    assert isinstance(told, str)
    ((whole, _),) = lm.loglikelihood([Request(("", long))])
    assert whole == pytest.approx(lm.loglikelihood_rolling([Request((long,))])[0])


def test_the_server_s_backend_gives_the_same(folder: Path, lm: SlmRayLM, texts: list[str]) -> None:
    by_onnx = SlmRayLM(model=str(folder), backend="onnx")
    requests = [Request((text,)) for text in texts[:2]]
    assert by_onnx.loglikelihood_rolling(requests) == pytest.approx(lm.loglikelihood_rolling(requests), rel=1e-6)
    assert torch.get_num_threads() == 1


TASK = """
task: own_stories
dataset_path: json
dataset_kwargs: {{data_files: {{test: {stories}}}}}
output_type: loglikelihood_rolling
test_split: test
doc_to_text: ""
doc_to_target: "{{{{text}}}}"
metric_list: [{{metric: bits_per_byte, aggregation: bits_per_byte, higher_is_better: false}}]
metadata: {{version: 1}}
"""


@pytest.mark.slow
def test_the_harness_itself_runs_a_task_of_our_stories(
    folder: Path, lm: SlmRayLM, texts: list[str], tmp_path: Path
) -> None:
    stories = tmp_path / "stories.jsonl"
    stories.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    (tmp_path / "own.yaml").write_text(TASK.format(stories=stories))
    options = f"run --model slm_ray --model_args model={folder} --tasks own_stories --include_path {tmp_path}"
    command = [sys.executable, "-m", "slm_ray.evaluation.harness", *options.split(), "--output_path", tmp_path / "out"]
    offline = dict(os.environ) | {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "hub")}
    done = subprocess.run(command, cwd=ROOT, env=offline, capture_output=True, text=True, check=False, timeout=500)
    assert done.returncode == 0, done.stderr
    (written,) = (tmp_path / "out").rglob("results_*.json")
    by_harness = json.loads(written.read_text())["results"]["own_stories"]["bits_per_byte,none"]
    nats = -sum(lm.loglikelihood_rolling([Request((text,)) for text in texts]))
    assert by_harness == pytest.approx(nats / math.log(2) / sum(len(text.encode()) for text in texts), rel=1e-6)
