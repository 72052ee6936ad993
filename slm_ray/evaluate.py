"""Measure a model on a split: `python slm_ray/evaluate.py`.

In: a model reference and a prepared data set. Out: nats per token, bits per byte and perplexity, as one JSON line.
"""

if __name__ == "__main__":
    import sys
    from pathlib import Path

    sys.path[0] = str(Path(__file__).resolve().parents[1])  # the checkout, in place of this folder
    from slm_ray.cli.script import run

    run("slm_ray.evaluate")

import dataclasses
import json
import math
from collections.abc import Sequence
from typing import Literal

from slm_ray.cli.command import command
from slm_ray.cli.script import set_default_environment
from slm_ray.config.options import parse
from slm_ray.dataset.batches import TokenStream
from slm_ray.dataset.manifest import load_manifest
from slm_ray.dataset.shards import read_split
from slm_ray.errors import UserError
from slm_ray.evaluation.explain import explanation
from slm_ray.generation.backend_choice import BackendName, make_backend
from slm_ray.model.decoder import Decoder
from slm_ray.runs.checkpoint import load_model
from slm_ray.tracking.registry import resolved_model
from slm_ray.training.context import TrainContext
from slm_ray.training.evaluation import bits_per_byte, evaluate


@dataclasses.dataclass(frozen=True, kw_only=True)
class EvaluateConfig:
    """Measure a model on a split of a data set, each token once."""

    model: str = "models:/tinystories@champion"
    """Registered model (models:/NAME@ALIAS or models:/NAME/VERSION) or folder of a checkpoint."""
    data: str = "data/tinystories"
    """Folder of the data set; it must have been prepared with the model's tokenizer."""
    split: Literal["train", "validation", "test"] = "validation"
    """Which split."""
    backend: BackendName = "torch"
    """What computes: torch in fp32, or a backend of the server, to see what its numbers lose."""
    tracking_uri: str = ""
    """MLflow store of registered models; MLFLOW_TRACKING_URI or sqlite:///mlflow.db when not given."""
    explain: str = ""
    """Measure nothing: say where this model comes from; `--explain MODEL --help` lists the options, --step for one."""


def evaluate_model(config: EvaluateConfig) -> dict[str, float | str]:
    """Loss of the model over the whole split, with the model's and the data's names beside it.

    Raises:
        UserError: no such model or data set, another tokenizer, or an empty split.
    """
    manifest = load_manifest(config.data)
    with resolved_model(config.model, config.tracking_uri) as resolved:
        model, tokenizer = load_model(resolved.path)
    if tokenizer.sha256 != manifest.tokenizer["sha256"]:
        raise UserError(f"{config.data} was prepared with another tokenizer than {config.model}'s: pass its own data")
    tokens, n_bytes = read_split(config.data, config.split, manifest=manifest)
    if not len(tokens):
        raise UserError(f"{config.data} has no stories in its {config.split} split")
    stream = TokenStream.of_split(tokens, n_bytes, tokenizer.eos_id)
    metrics = _measure(model, stream, config.backend)
    return {
        "model": f"{resolved.name} {resolved.version}",
        "split": config.split,
        "backend": config.backend,
        "tokens": stream.n_targets,
        "data_fingerprint": manifest.fingerprint,
        **metrics,
    }


def _measure(model: Decoder, stream: TokenStream, backend: BackendName) -> dict[str, float]:
    if backend == "torch":
        found = evaluate(model, stream, seq_len=model.config.seq_len, context=TrainContext())
        return {name.removeprefix("val_"): value for name, value in found.metrics.items()}
    bits = bits_per_byte(make_backend(model, 1, backend), stream)
    loss = bits * math.log(2) * stream.n_bytes / stream.n_targets
    return {"loss": loss, "perplexity": math.exp(min(loss, 700.0)), "bits_per_byte": bits}


@command
def main(argv: Sequence[str] | None = None) -> int:
    """Command line: parse, measure, print."""
    set_default_environment()
    if (explained := explanation(argv)) is not None:
        print(explained)
        return 0
    about = (EvaluateConfig.__doc__ or "").splitlines()[0]
    config = parse(EvaluateConfig, argv, prog="evaluate.py", about=about, default=EvaluateConfig())
    print(json.dumps(evaluate_model(config)))
    return 0
