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
from slm_ray.config.places import origin_name, place_of
from slm_ray.config.resuming import FORCED, KEPT, differences
from slm_ray.config.schema import TrainConfig
from slm_ray.dataset.manifest import TOKENIZER, load_manifest
from slm_ray.errors import UserError
from slm_ray.runs.checkpoint import MODEL, OPTIMIZER, Checkpoint
from slm_ray.runs.run_folder import refuse_corrupt
from slm_ray.tokenization.tokenizer import Tokenizer
from slm_ray.tracking import mlflow_runs
from slm_ray.training.inputs import RunPlan, check_length


def resolve(config: TrainConfig, default_workers: Callable[[TrainConfig], int]) -> TrainConfig:
    """Replace open fields by their defaults and relative paths by absolute ones, before the config leaves this process.

    `default_workers` is asked where the config leaves the number of workers open.

    Raises:
        UserError: no data set or too little text, another vocabulary, or a batch that the workers cannot share out.
    """
    data = storage.storage_path(config.data)
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
        data=str(data),
        output=str(storage.storage_path(config.output)),
        init_from=place_of(config.init_from),
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


def _refuse_other_options(plan: RunPlan, latest: Checkpoint) -> None:
    was = from_dict(TrainConfig, latest.state.config, str(latest.path))
    kept = [name for name in KEPT if not (plan.config.force and name in FORCED)]
    changed = differences(dataclasses.asdict(was), dataclasses.asdict(plan.config), kept)
    before, now = origin_name(was.init_from), origin_name(plan.config.init_from)
    if before != now:
        changed["init_from"] = f"init_from was {before or 'not given'} and is now {now or 'not given'}"
    if not changed:
        return
    keeps = f"a resumed run keeps {'it' if len(changed) == 1 else 'them'}"
    if set(changed) <= set(FORCED):
        how = "--force changes it all the same, and then it does not see each sample once"
    else:
        how = "leave it out, or take another --name"
    raise UserError(f"{plan.folder.address}: {', '.join(changed.values())}: {keeps}; {how}")


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
