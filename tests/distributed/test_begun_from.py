"""`train.py --init-from` through Ray Train."""

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml

from slm_ray.config.schema import TrainConfig
from slm_ray.distributed.driver import run_training
from slm_ray.errors import UserError
from slm_ray.lineage.explain import explanation
from slm_ray.runs import checkpoint
from slm_ray.runs.run_folder import RunFolder
from slm_ray.tokenization.tokenizer import Tokenizer
from slm_ray.tracking import mlflow_runs
from slm_ray.train import parse_config
from tests.support.saved_models import save_talkative

pytestmark = pytest.mark.ray


@pytest.mark.slow
def test_two_workers_begin_with_given_weights_and_it_is_told(
    tiny_config: TrainConfig, tiny_tokenizer: Tokenizer, local_ray: Any, tmp_path: Path
) -> None:
    origin, uri = save_talkative(tmp_path / "given", tiny_tokenizer), tiny_config.tracking_uri
    fields = dataclasses.asdict(dataclasses.replace(tiny_config, workers=2, max_steps=4, register="begun"))
    del fields["model"]
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(fields))
    words = ["--config", str(tmp_path / "run.yaml"), "--init-from", str(origin)]
    with pytest.raises(UserError, match="8 workers need 8 CPUs"):
        run_training(parse_config([*words, "--workers", "8", "--batch-size", "8"]), is_quiet=True)
    config = parse_config([*words, "--model.seq-len", "32"])
    assert (config.model.d_ff, config.model.seq_len) == (64, 32)
    result = run_training(config, is_quiet=True)
    folder = RunFolder(Path(config.output) / config.name)
    digest = json.loads((origin / "complete.json").read_text())["files"]["model/model.safetensors"]
    state = checkpoint.load_state(folder.latest)
    assert state.step == 4 and state.origin is not None and state.origin.weights_sha256 == digest
    version = mlflow_runs.client(uri).get_model_version("begun", result.version)
    assert version.tags["origin"] == f"given {digest}"
    shutil.rmtree(origin)
    again = parse_config(["--output", config.output, "--name", config.name, "--resume", "--max-steps", "6"])
    assert (again.model, again.max_steps) == (dataclasses.replace(config.model, vocab_size=512), 6)
    told = json.loads(str(explanation(["--explain", "models:/begun/1", "--tracking-uri", uri, "--json"])))
    assert (told["origin"]["reference"], told["origin"]["weights_sha256"]) == ("given", digest)
    assert "begun from given at step 12, weights of sha256" in " ".join(
        str(explanation(["--explain", str(folder.latest)])).split()
    )
