"""A sweep before it starts: what is varied, what each trial is, and whether all that can run.

In: a `SweepConfig`, and the record of a sweep that goes on. Out: a `Plan`. What the user can get wrong is refused
before a Ray starts; what only the cluster can tell, before the first trial.
"""

import dataclasses
import datetime
import uuid
from pathlib import Path
from typing import Any

import ray

from slm_ray import storage
from slm_ray.config.places import absolute_data
from slm_ray.config.schema import TrainConfig
from slm_ray.dataset.manifest import load_manifest
from slm_ray.distributed import cluster
from slm_ray.distributed.cluster import default_workers
from slm_ray.errors import UserError
from slm_ray.limits import core_count
from slm_ray.runs.remote_run import open_run
from slm_ray.runs.run_folder import RunFolder
from slm_ray.storage import StoragePath
from slm_ray.tracking import mlflow_runs
from slm_ray.tracking.besides.tensorboard_tracker import require_tensorboard
from slm_ray.tracking.besides.wandb_tracker import require_wandb
from slm_ray.tracking.registry import RegistryError
from slm_ray.training.besides.teachers import check_shapes, check_teachers, pinned_teachers
from slm_ray.training.inputs import check_files, check_length, n_steps
from slm_ray.training.preflight import resolve
from slm_ray.training.starting_point import check_origin, pinned_origin
from tune.config import MODEL_NAME, SweepConfig, run_config
from tune.halving import first_rung, rung_steps
from tune.origin import held_origin, held_teachers
from tune.record import read_record, space_to_sweep
from tune.results import trial_name
from tune.search import Searcher
from tune.space import Point, Space, n_points
from tune.trials import DRIVER_CPUS

THIRDS = 3
"""Validations of a trial without early stopping."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
    """A sweep whose open fields are settled."""

    sweep: SweepConfig
    space: Space
    rungs: tuple[int, ...]  # steps, the last of them the end of a trial
    eval_interval: int
    origin_sha256: str  # of the weights that every trial begins with; empty of random ones
    teacher_sha256: tuple[str, ...]  # of those that every trial learns from

    @property
    def folder(self) -> StoragePath:
        """Where the sweep is kept."""
        return storage.storage_path(self.sweep.output) / self.sweep.name

    @property
    def run_folder(self) -> RunFolder:
        """The same, with a work folder of this machine where it is kept in an object store."""
        return open_run(self.sweep.output, self.sweep.name)

    @property
    def init_from(self) -> str:
        """Where the weights that every trial begins with lie: in the sweep's folder, once they are held there."""
        return held_origin(self.folder) or self.sweep.init_from

    @property
    def teacher(self) -> tuple[str, ...]:
        """The same of the weights that every trial learns from."""
        return held_teachers(self.folder, self.sweep.teacher)

    @property
    def searcher(self) -> Searcher:
        """What suggests the points."""
        sweep = self.sweep
        return Searcher(
            space=self.space,
            kind=sweep.search,
            n_trials=sweep.num_trials,
            batch=sweep.batch_trials,
            seed=sweep.seed,
            refusal=self.refusal,
        )

    @property
    def n_trials(self) -> int:
        """How many there will be."""
        return self.sweep.num_trials or int(n_points(self.space))

    @property
    def some_point(self) -> Point:
        """One point; all need the same resources."""
        return next(iter(self.searcher.next_points([])))

    def refusal(self, point: Point) -> str:
        """Why no trial can have these values; empty where one can."""
        try:
            config = run_config(self.sweep, point, workers=self.sweep.trial_workers, register="")
            resolved = resolve(config, default_workers)
            if resolved.init_from:
                check_origin(resolved)
            check_shapes(resolved)
        except (ValueError, UserError) as error:
            return str(error)
        return ""

    def trial_config(self, point: Point, threads: int = 0) -> TrainConfig:
        """The training run of a trial."""
        sweep = self.sweep
        changes: dict[str, Any] = {
            "output": str(self.folder / "trials"),
            "name": trial_name(point),
            "workers": sweep.trial_workers,
            "max_steps": self.rungs[-1],
            "eval_interval_steps": self.eval_interval,
            "sample_prompt": "",
            "profile": False,
            "threads": threads or sweep.threads,
            "cpus_per_worker": cpus_of_trial_worker(sweep),
            "register": "",
            "init_from": self.init_from,
            "teacher": self.teacher,
        }
        return run_config(sweep, point, **changes)

    def concurrent_trials(self) -> int:
        """As many as the cluster has room for; all of their workers' CPUs and GPUs count."""
        resources, sweep = ray.cluster_resources(), self.sweep
        room = int(resources.get("CPU", 1) / (sweep.trial_workers * sweep.cpus_per_worker))
        if gpus := resources.get("GPU", 0):
            room = min(room, int(gpus) // sweep.trial_workers)
        return max(1, room)

    def threads(self, at_once: int) -> int:
        """Of each worker. The same for all trials and in every start: sums depend on it in the last digit."""
        batch = self.sweep.batch_trials if self.sweep.search == "optuna" else self.n_trials
        running = min(at_once, batch) * self.sweep.trial_workers
        return self.sweep.threads or max(1, core_count() // running)


def plan_sweep(sweep: SweepConfig) -> Plan:
    """Settle what is open, without a Ray: also which weights `init_from` and `teacher` mean, by an alias or the link
    `best`.

    Raises:
        UserError: the sweep, its space or the data set does not allow it.
    """
    manifest = load_manifest(sweep.data)  # what a trial could not begin with is refused before anything starts
    check_length(sweep, manifest)
    check_files(sweep, manifest)
    if sweep.tensorboard:
        require_tensorboard()
    if sweep.wandb:
        require_wandb()
    name = sweep.name or f"sweep-{datetime.datetime.now().astimezone():%Y%m%d-%H%M%S}-{uuid.uuid4().hex[:4]}"
    init_from, origin_sha256 = _pinned_origin(sweep)
    teacher, teacher_sha256 = pinned_teachers(sweep)
    sweep = dataclasses.replace(
        sweep,
        name=name,
        init_from=init_from,
        teacher=teacher,
        data=absolute_data(sweep.data),
        output=str(storage.storage_path(sweep.output)),
        space=str(Path(sweep.space).absolute()) if sweep.space else "",
        register=registered_name(sweep.register, mlflow_runs.resolve_uri(sweep.tracking_uri)),
    )
    record = read_record(storage.storage_path(sweep.output) / name) if sweep.resume else None
    plan = _with_rungs(sweep, space_to_sweep(sweep, record), origin_sha256, teacher_sha256)
    if unknown := set(sweep.heat_map) - plan.space.keys():
        raise UserError(f"heat_map: {min(unknown)} is not varied: {', '.join(plan.space)} are")
    if sweep.validation == "windows" and "model.seq_len" in plan.space:
        raise UserError(
            "model.seq_len is varied, and losses by windows of several lengths are not comparable: take --validation "
            "stories, or leave it out"
        )
    plan.searcher.check()
    check_teachers(run_config(plan.sweep, plan.some_point))
    return plan


def _pinned_origin(sweep: SweepConfig) -> tuple[str, str]:
    """As `pinned_origin`; of a sweep that goes on, with what to do where its weights are not found.

    Raises:
        UserError: there is no such model.
    """
    try:
        return pinned_origin(sweep)
    except RegistryError as error:
        if not sweep.resume:
            raise
        raise UserError(
            f"{error}: a sweep goes on with the weights that it began with; where they were moved, or removed by the "
            "run that they came from, give a place that has them to --init-from, or take another --name"
        ) from error


def _with_rungs(sweep: SweepConfig, space: Space, origin_sha256: str, teacher_sha256: tuple[str, ...]) -> Plan:
    steps = sweep.trial_steps or max(1, min(200, n_steps(sweep, load_manifest(sweep.data)) // 5))
    rungs: tuple[int, ...] = (steps,)
    interval = sweep.eval_interval_steps or -(-steps // THIRDS)
    if sweep.scheduler == "asha":
        first = first_rung(steps, sweep.reduction_factor, sweep.eval_interval_steps)
        rungs, interval = rung_steps(steps, first, sweep.reduction_factor), sweep.eval_interval_steps or first
    return Plan(
        sweep=sweep,
        space=space,
        rungs=rungs,
        eval_interval=interval,
        origin_sha256=origin_sha256,
        teacher_sha256=teacher_sha256,
    )


def check_cluster(plan: Plan) -> None:
    """Connect to Ray, and refuse what it has no room for. Raises: UserError."""
    sweep = plan.sweep
    final = run_config(sweep, plan.some_point) if sweep.final else None
    cpus = max(sweep.trial_workers * sweep.cpus_per_worker, cluster.least_cpus(final) if final else 0)
    cluster.connect(with_dashboard=True, cpus=cpus)  # with what Train asks about lost trials
    cluster.check_resources(plan.trial_config(plan.some_point))
    if final:
        cluster.check_resources(resolve(final, default_workers))


def cpus_of_trial_worker(sweep: SweepConfig) -> float:
    """What a worker is given, less what its trial's driver takes."""
    return max(sweep.cpus_per_worker - DRIVER_CPUS, sweep.cpus_per_worker / 2)


def registered_name(register: str, tracking_uri: str) -> str:
    """The name for the registry, if there is one: without a store the default name means none.

    Raises:
        UserError: a name of the user's own, and no store.
    """
    if tracking_uri != mlflow_runs.OFF:
        return register
    if register not in ("", MODEL_NAME):
        raise UserError(f"register ({register}) needs an MLflow store, and tracking_uri is {mlflow_runs.OFF}")
    return ""
