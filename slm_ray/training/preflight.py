"""What is settled before a worker starts: the defaults, and what cannot go together.

In: a `TrainConfig` with open fields; a plan and the run that is there. Out: a resolved `TrainConfig`; or a `UserError`,
while nothing has been started or written.
"""

import dataclasses
import datetime
import uuid
from collections.abc import Callable

from slm_ray import storage
from slm_ray.config.files import from_dict
from slm_ray.config.schema import ModelConfig, TrainConfig
from slm_ray.dataset.manifest import TOKENIZER, load_manifest
from slm_ray.errors import UserError
from slm_ray.runs.checkpoint import MODEL, Checkpoint
from slm_ray.runs.run_folder import refuse_corrupt
from slm_ray.tokenization.tokenizer import Tokenizer
from slm_ray.tracking import mlflow_runs
from slm_ray.training.inputs import RunPlan


def resolve(config: TrainConfig, default_workers: Callable[[TrainConfig], int]) -> TrainConfig:
    """Replace open fields by their defaults and relative paths by absolute ones, before the config leaves this process.

    `default_workers` is asked where the config leaves the number of workers open.

    Raises:
        UserError: no data set, another vocabulary, or a batch that the workers cannot share out.
    """
    data = storage.storage_path(config.data)
    vocab_size = int(load_manifest(data).tokenizer["vocab_size"])
    if config.model.vocab_size not in (0, vocab_size):
        raise UserError(f"model.vocab_size ({config.model.vocab_size}) must be the data set's, {vocab_size}")
    workers = config.workers or default_workers(config)
    config.check_batch(workers)
    if config.register and mlflow_runs.resolve_uri(config.tracking_uri) == mlflow_runs.OFF:
        raise UserError(f"register ({config.register}) needs an MLflow store, and tracking_uri is {mlflow_runs.OFF}")
    return dataclasses.replace(
        config,
        data=str(data),
        output=str(storage.storage_path(config.output)),
        name=config.name or f"run-{datetime.datetime.now().astimezone():%Y%m%d-%H%M%S}-{uuid.uuid4().hex[:4]}",
        workers=workers,
        model=dataclasses.replace(config.model, vocab_size=vocab_size),
    )


def refuse_conflicts(plan: RunPlan, latest: Checkpoint | None) -> None:
    """Refuse to write over a run, and to resume one as something else than it was.

    `latest` is the run's latest valid checkpoint. `force` allows other stories, another batch size and another seed;
    never another shape or tokenizer.

    Raises:
        UserError: with what stands in the way.
    """
    config, folder = plan.config, plan.folder
    if latest is None:
        if config.resume:
            raise UserError(f"nothing to resume: no complete checkpoint in {folder.path}")
        refuse_corrupt(folder)
        return
    if not config.resume:
        raise UserError(f"{folder.path} holds a run already: add --resume to continue it, or take another --name")
    _refuse_other_shape(plan, latest)
    if not config.force:
        _refuse_other_samples(plan, latest)


def _refuse_other_shape(plan: RunPlan, latest: Checkpoint) -> None:
    config, path, state = plan.config, plan.folder.path, latest.state
    if plan.max_steps < state.step:
        raise UserError(f"{path} is at step {state.step:,} already, and was asked to end at {plan.max_steps:,}")
    was = from_dict(TrainConfig, state.config, str(latest.path))
    if config.model != was.model:
        raise UserError(f"model was {_difference(was.model, config.model)}: a resumed run keeps its shape")
    tokenizer = Tokenizer.load(latest.path / MODEL / TOKENIZER)
    if tokenizer.sha256 != load_manifest(config.data).tokenizer["sha256"]:
        raise UserError(f"{config.data} has another tokenizer than {path}: its tokens mean something else")
    if config.optim.name != was.optim.name:
        raise UserError(f"optim.name was {was.optim.name} and is now {config.optim.name}: a resumed run keeps it")


def _refuse_other_samples(plan: RunPlan, latest: Checkpoint) -> None:
    config, state = plan.config, latest.state
    if state.data_fingerprint != plan.data_fingerprint:
        raise UserError(
            f"{plan.folder.path} was trained on data set {state.data_fingerprint[:12]}, and {config.data} is "
            f"{plan.data_fingerprint[:12]}: a run is resumed on its own data, or with --force on other stories"
        )
    was = from_dict(TrainConfig, state.config, str(latest.path))
    for field in ("batch_size", "seed"):
        if getattr(config, field) != getattr(was, field):
            raise UserError(
                f"{field} was {getattr(was, field)} and is now {getattr(config, field)}: a resumed run keeps it, so "
                "that it sees each sample once; --force changes it all the same"
            )


def _difference(was: ModelConfig, now: ModelConfig) -> str:
    """`n_layers 4 and is now 2` for the first field that differs."""
    before, after = dataclasses.asdict(was), dataclasses.asdict(now)
    name = next(name for name in before if before[name] != after[name])
    return f"{name} {before[name]} and is now {after[name]}"
