"""What a run was made from, as MLflow shows it: its data set as an input, and the environment as tags.

In: a manifest; this process. Out: an input of the run with the data set's fingerprint as its digest, and its report
among the run's artifacts; tags. No path of this machine is among them.
"""

import importlib.metadata
import json
import logging
import platform
from typing import Any

from slm_ray import storage
from slm_ray.dataset.manifest import Manifest, named_sets
from slm_ray.errors import one_line
from slm_ray.storage import StoragePath
from slm_ray.tracking.mlflow_runs import OFF, client

LOGGER = logging.getLogger(__name__)
REPORT = "report"
TRAINING = "training"
WEIGHT = "slm_ray.weight"
"""Tag of an input: the share of the samples that is of it."""
PACKAGES = ("slm-ray", "torch", "ray", "mlflow", "pyarrow", "tokenizers")
_COLUMNS = (("story_id", "string"), ("tokens", "integer"), ("n_bytes", "long"))
_DIGEST_LENGTH = 36
"""What MLflow's database has room for."""


def environment() -> dict[str, str]:
    """Tags: versions of Python, the system and the packages that decide about results."""
    found = {"environment.python": platform.python_version(), "environment.system": platform.platform()}
    for package in PACKAGES:
        try:
            found[f"environment.{package}"] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def log_data_sets(uri: str, run_id: str, data: str, manifest: Manifest, context: str = TRAINING) -> None:
    """Make a data set an input of a run, or each of a mixture, as `log_data_set`. Training knows their weights."""
    for name, its, weight in named_sets(data, manifest):
        log_data_set(uri, run_id, its, name, context, weight if context == TRAINING else 1.0)


def log_data_set(
    uri: str, run_id: str, manifest: Manifest, name: str, context: str = TRAINING, weight: float = 1.0
) -> None:
    """Make a data set an input of a run; name: that of its folder. Nothing but a warning where the store fails.

    weight: its share of the run's samples; below 1 it is a tag of the input.
    """
    if not run_id or uri == OFF:
        return
    from mlflow.entities import DatasetInput, InputTag

    try:
        tags = [InputTag("mlflow.data.context", context)]
        tags += [InputTag(WEIGHT, f"{weight:g}")] if weight < 1 else []
        client(uri).log_inputs(run_id, [DatasetInput(_data_set(manifest, name), tags)])
    except Exception as error:  # whatever a store's client raises, the work goes on
        LOGGER.warning("MLflow does not take the data set as an input: %s", one_line(error))


def _data_set(manifest: Manifest, name: str) -> Any:
    from mlflow.entities import Dataset

    source = {key: manifest.source.get(key) for key in ("used", "revision", "digest")}
    splits = {key: {"stories": split.rows, "tokens": split.tokens} for key, split in manifest.splits.items()}
    profile = {
        **{f"{key}_{what}": value for key, counts in splits.items() for what, value in counts.items()},
        **{key: manifest.counts.get(key) for key in ("read", "kept", "duplicates", "rejected")},
        "vocab_size": manifest.tokenizer["vocab_size"],
        "fingerprint": manifest.fingerprint,
    }
    schema = {"mlflow_colspec": [{"type": kind, "name": column, "required": True} for column, kind in _COLUMNS]}
    return Dataset(
        name=name[:500],
        digest=manifest.fingerprint[:_DIGEST_LENGTH],
        source_type="code",
        source=json.dumps({"tags": source}),
        schema=json.dumps(schema),
        profile=json.dumps(profile),
    )


def log_report(uri: str, run_id: str, data: StoragePath) -> None:
    """Keep the report of a data set among the artifacts of a run; nothing where it has none or the store fails."""
    page = data / REPORT / "report.html"
    if not run_id or uri == OFF:
        return
    try:
        if storage.exists(page):
            client(uri).log_text(run_id, page.read_text(encoding="utf-8"), "data/report.html")
    except Exception as error:  # whatever a store's client raises, the work goes on
        LOGGER.warning("MLflow does not take the data set's report: %s", one_line(error))
