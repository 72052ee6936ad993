"""Evaluations of registered versions, as runs of MLflow below the run that made the version.

In: a version, what was measured on which data set. Out: a run of the kind `evaluation` with the data set as its input,
and the figures as tags of the version. A store that fails costs a warning: the figures are on the terminal.
"""

import logging
from collections.abc import Mapping
from typing import Any

from slm_ray.dataset.manifest import Manifest
from slm_ray.errors import one_line
from slm_ray.tracking import run_inputs
from slm_ray.tracking.mlflow_runs import KIND, PARENT, client, resolve_uri
from slm_ray.tracking.registry import RegistryError, ResolvedModel
from slm_ray.tracking.store_faults import store_errors

LOGGER = logging.getLogger(__name__)
EVALUATION = "evaluation"


def record_evaluation(uri: str, model: ResolvedModel, figures: Mapping[str, Any], manifest: Manifest, data: str) -> str:
    """Keep an evaluation on a data set or mixture; returns its run, or an empty text where the store does not take it.

    figures: numbers become metrics, texts parameters; all of them tags `evaluation.NAME` of the version.
    """
    try:
        return _record(uri, model, figures, manifest, data)
    except Exception as error:  # whatever a store's client raises, the figures are known
        LOGGER.warning("MLflow does not take the evaluation: %s", one_line(error))
        return ""


def _record(uri: str, model: ResolvedModel, figures: Mapping[str, Any], manifest: Manifest, data: str) -> str:
    from mlflow.entities import Metric, Param

    store = client(uri)
    home = store.get_run(model.run_id).info.experiment_id
    reference = f"models:/{model.name}/{model.version}"
    tags = {PARENT: model.run_id, KIND: EVALUATION, "model_version": reference}
    run_id = str(
        store.create_run(home, run_name=f"{EVALUATION} of {model.name} {model.version}", tags=tags).info.run_id
    )
    numbers = {name: float(value) for name, value in figures.items() if isinstance(value, int | float)}
    texts = {name: str(value) for name, value in figures.items() if name not in numbers}
    store.log_batch(
        run_id,
        metrics=[Metric(name, value, 0, model.step) for name, value in numbers.items()],
        params=[Param(name, value) for name, value in texts.items()],
    )
    run_inputs.log_data_sets(uri, run_id, data, manifest, context=EVALUATION)
    store.set_terminated(run_id)
    for name, value in {**figures, "run": run_id}.items():
        store.set_model_version_tag(model.name, model.version, f"{EVALUATION}.{name}", str(value))
    return run_id


def recorded_evaluation(name: str, version: str, tracking_uri: str = "") -> dict[str, str]:
    """What `record_evaluation` kept of a registered version, by its names; empty where it was never evaluated.

    Raises:
        RegistryError: the store does not answer.
    """
    uri = resolve_uri(tracking_uri)
    try:
        tags: Mapping[str, str] = client(uri).get_model_version(name, version).tags
    except store_errors() as error:
        raise RegistryError(f"{name} {version} is not available from {uri}: {one_line(error)}") from error
    prefix = f"{EVALUATION}."
    return {tag.removeprefix(prefix): value for tag, value in sorted(tags.items()) if tag.startswith(prefix)}
