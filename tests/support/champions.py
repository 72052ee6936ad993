"""A champion without a comparison, for tests of those who only follow the alias."""

from pathlib import Path

from slm_ray.tracking import mlflow_runs, registration


def register_champion(uri: str, name: str, folder: Path, run_id: str) -> str:
    """Register a checkpoint and point `champion` to it; returns the version."""
    version = registration.register(uri, name, folder, run_id)
    mlflow_runs.client(uri).set_registered_model_alias(name, "champion", version)
    return version
