"""What is settled before a worker starts: the defaults, and what cannot go together.

In: a `TrainConfig` with open fields; a plan and the run that is there. Out: a resolved `TrainConfig`; or a `UserError`,
while nothing has been started or written.
"""

import dataclasses
import datetime
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

from slm_ray import storage
from slm_ray.config.files import from_dict
from slm_ray.config.places import absolute_data, place_of
from slm_ray.config.resuming import FORCED, KEPT, differences
from slm_ray.config.schema import TrainConfig
from slm_ray.dataset.manifest import TOKENIZER, load_manifest
from slm_ray.errors import UserError, without_secrets
from slm_ray.hub_reference import PREFIX
from slm_ray.runs.checkpoint import MODEL, OPTIMIZER, Checkpoint
from slm_ray.runs.run_folder import refuse_corrupt
from slm_ray.tokenization.tokenizer import Tokenizer
from slm_ray.tracking import mlflow_runs
from slm_ray.tracking.registry import REGISTERED, resolved_model, weights_digest
from slm_ray.training.inputs import RunPlan, check_length


def resolve(config: TrainConfig, default_workers: Callable[[TrainConfig], int]) -> TrainConfig:
    """Replace open fields by their defaults and relative paths by absolute ones, before the config leaves this process.

    `default_workers` is asked where the config leaves the number of workers open.

    Raises:
        UserError: no data set or too little text, another vocabulary, or a batch that the workers cannot share out.
    """
    data = absolute_data(config.data)
    manifest = load_manifest(data)
    check_length(config, manifest)
    vocab_size = int(manifest.tokenizer["vocab_size"])
    if config.model.vocab_size not in (0, vocab_size):
        raise UserError(f"model.vocab_size ({config.model.vocab_size}) must be the data set's, {vocab_size}")
    if config.register and mlflow_runs.resolve_uri(config.tracking_uri) == mlflow_runs.OFF:
        raise UserError(f"register ({config.register}) needs an MLflow store, and tracking_uri is {mlflow_runs.OFF}")
    workers = config.workers or default_workers(config)  # which may start a Ray
    config.check_batch(workers)
    return dataclasses.replace(
        config,
        data=data,
        output=str(storage.storage_path(config.output)),
        init_from=place_of(config.init_from),
        teacher=tuple(map(place_of, config.teacher)),
        name=config.name or f"run-{datetime.datetime.now().astimezone():%Y%m%d-%H%M%S}-{uuid.uuid4().hex[:4]}",
        workers=workers,
        model=dataclasses.replace(config.model, vocab_size=vocab_size),
    )


def refuse_conflicts(plan: RunPlan, latest: Checkpoint | None) -> None:
    """Refuse to write over a run, and to resume one as something else than it was.

    `latest` is the run's latest valid checkpoint; without one the run begins, unless there are others. What a resumed
    run keeps stands in `config/resuming.py`; `force` allows other stories too, never another tokenizer.

    Raises:
        UserError: with what stands in the way.
    """
    config, folder = plan.config, plan.folder
    if latest is None:
        refuse_corrupt(folder)
        return
    if not config.resume:
        raise UserError(f"{folder.path} holds a run already: add --resume to continue it, or take another --name")
    if plan.max_steps < latest.state.step:
        raise UserError(
            f"{folder.path} is at step {latest.state.step:,} already, and was asked to end at {plan.max_steps:,}"
        )
    _refuse_other_options(plan, latest)
    _refuse_other_state(plan, latest)


def with_its_origin(plan: RunPlan, latest: Checkpoint) -> RunPlan:
    """The plan of a resumed run with the `init_from` that the run began with: what was given now, once
    `refuse_conflicts` found it to be the same weights, may not be where `origin` says that they come from."""
    was = str(latest.state.config.get("init_from", ""))
    return dataclasses.replace(plan, config=dataclasses.replace(plan.config, init_from=was))


def names_its_teachers(config: TrainConfig, latest: Checkpoint) -> bool:
    """Whether the config names the teachers by the places that the run had for them, which need not be there now."""
    was = latest.state.config.get("teacher", ())
    return [_place(one) for one in config.teacher] == [_place(str(one)) for one in was]


def _refuse_other_options(plan: RunPlan, latest: Checkpoint) -> None:
    was = from_dict(TrainConfig, latest.state.config, str(latest.path))
    kept = [name for name in KEPT if not (plan.config.force and name in FORCED)]
    changed = differences(_options(was), _options(plan.config), kept)
    if len(plan.config.teacher) == len(latest.state.teachers):  # told apart by their weights, once they are read
        changed.pop("teacher", None)
    if other := _other_origin(was.init_from, latest, plan.config):
        changed["init_from"] = other
    if not changed:
        return
    keeps = f"a resumed run keeps {'it' if len(changed) == 1 else 'them'}"
    if set(changed) <= set(FORCED):
        how = "--force changes it all the same, and then it does not see each sample once"
    else:
        how = "leave it out, or take another --name"
    raise UserError(f"{plan.folder.address}: {', '.join(changed.values())}: {keeps}; {how}")


def _options(config: TrainConfig) -> dict[str, Any]:
    """The fields, with a shape or place that is spelled in another way as one."""
    teacher = tuple(map(place_of, config.teacher))
    return dataclasses.asdict(dataclasses.replace(config, model=config.model.resolved, teacher=teacher))


def _other_origin(was: str, latest: Checkpoint, config: TrainConfig) -> str:
    """How a run would begin with other weights than it did; empty where `init_from` is the place that it was, at which
    nothing is looked, or leads to the same weights."""
    now, origin = config.init_from, latest.state.origin
    if _place(now) == _place(was):
        return ""
    said = f"init_from was {was or 'not given'} and is now {without_secrets(now) or 'not given'}"
    if not now or origin is None:
        return said
    try:
        with resolved_model(now, config.tracking_uri) as found:
            digest = weights_digest(found)
    except UserError as error:
        return f"{said}, whose weights cannot be compared ({error})"
    return "" if digest == origin.weights_sha256 else f"{said}, which has other weights"


def _place(reference: str) -> str:
    """A reference, or the absolute path of a folder, also of one that is there no more."""
    is_path = bool(reference) and not reference.startswith((REGISTERED, PREFIX))
    return str(Path(without_secrets(reference)).absolute()) if is_path else reference


def _refuse_other_state(plan: RunPlan, latest: Checkpoint) -> None:
    config, path, state = plan.config, plan.folder.path, latest.state
    if not (latest.path / OPTIMIZER).is_file():
        raise UserError(f"{latest.path} has no {OPTIMIZER}: it was made for serving and cannot be resumed")
    tokenizer = Tokenizer.load(latest.path / MODEL / TOKENIZER)
    if tokenizer.sha256 != load_manifest(config.data).tokenizer["sha256"]:
        raise UserError(f"{config.data} has another tokenizer than {path}: its tokens mean something else")
    if state.data_fingerprint != plan.data_fingerprint and not config.force:
        raise UserError(
            f"{path} was trained on data set {state.data_fingerprint[:12]}, and {config.data} is "
            f"{plan.data_fingerprint[:12]}: a run is resumed on its own data, or with --force on other stories"
        )
