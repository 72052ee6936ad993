"""The trials of a sweep through Ray Tune: each a run of its own, of one worker in Tune's process or several of Train's.

In: the training config of each point, by the trial's name. Out: `SWEEP/trials/NAME/`, a run's folder each. A trial
that was interrupted or paused continues from its last checkpoint; why one failed stands in `SWEEP/trials/NAME.log`, and
how long each start of one took in `SWEEP/trials/NAME.times`.
"""

import contextlib
import dataclasses
import os
import sys
import time
import uuid
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import ray
from ray import cloudpickle, tune
from ray.exceptions import RayError, RayTaskError
from ray.tune.integration.ray_train import TuneReportCallback

from slm_ray import storage
from slm_ray.config.files import from_dict
from slm_ray.config.schema import TrainConfig
from slm_ray.distributed.driver import PausedError, run_training
from slm_ray.errors import UserError, one_line, without_secrets
from slm_ray.locks import folder_lock
from slm_ray.runs.outcome import RunStatus, has_summary, read_summary
from slm_ray.runs.remote_identity import MLFLOW_ID
from slm_ray.runs.remote_run import open_run
from slm_ray.runs.run_folder import RunFolder
from slm_ray.storage import StoragePath
from slm_ray.tracking import mlflow_runs
from slm_ray.tracking.attempts import end_lost_run
from tune.shown.view import Lines, View

LOOK_S = "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S"
"""Between two looks of Train's at its workers: by default two seconds, in which a trial may be over."""
DRIVER_CPUS = 0.01  # of each trial's own driver; Tune refuses 0, and a whole CPU would leave none for the workers
AWAY_S = 5.0
"""After so long, the first trial whose MLflow run cannot be ended is the last that is tried."""
ORPHAN_TIMEOUT_S = 60.0
"""How long the processes of a sweep whose driver was killed may take to notice."""


def run_folder(config: TrainConfig) -> RunFolder:
    """Where a trial is kept."""
    return open_run(config.output, config.name)


def log_path(config: TrainConfig) -> StoragePath:
    """Where the whole of what a trial failed with is kept: beside its folder."""
    return storage.storage_path(config.output) / f"{config.name}.log"


def times_path(config: TrainConfig) -> StoragePath:
    """Where each start of a trial leaves how long it took, a number a line."""
    return storage.storage_path(config.output) / f"{config.name}.times"


def wall_seconds(config: TrainConfig) -> float:
    """Time spent on a trial, in all its starts but those that were killed."""
    total, text = 0.0, ""
    with contextlib.suppress(Exception):  # each store has errors of its own
        text = storage.read(times_path(config)).decode("utf-8")
    for line in text.splitlines():
        with contextlib.suppress(ValueError):
            total += float(line)
    return total


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrialRunner:
    """Runs trials of one sweep."""

    folder: RunFolder  # the sweep's
    at_once: int
    parent_run_id: str
    origin_sha256: str  # of the weights that each trial begins with; empty of random ones
    teacher_sha256: tuple[str, ...]  # of those that each learns from
    tracking_uri: str  # resolved
    view: View

    def run(self, configs: Mapping[str, TrainConfig], until: int) -> dict[str, str]:
        """Train the given trials up to the step `until`. Returns why each that failed did.

        The others go on. What Ray says of a failure goes to the trial's log, not to the terminal.
        """
        plain = {name: dataclasses.asdict(config) for name, config in configs.items()}
        cloudpickle.register_pickle_by_value(sys.modules[__name__])  # this folder is not installed on the workers
        fixed = self.parent_run_id, self.tracking_uri, until, self.origin_sha256, self.teacher_sha256

        def train_point(point: dict[str, Any]) -> None:
            train_trial(plain[point["trial"]], *fixed)

        for config in configs.values():
            storage.remove(log_path(config))
        state, file_system = self.folder.ray_storage()
        tuner = tune.Tuner(
            tune.with_resources(train_point, _resources(configs.values())),
            param_space={"trial": tune.grid_search(list(configs))},
            tune_config=tune.TuneConfig(max_concurrent_trials=self.at_once, reuse_actors=True),
            run_config=tune.RunConfig(
                name=uuid.uuid4().hex,  # a new name each time: Tune must not restore by itself
                storage_path=state,
                storage_filesystem=file_system,
                verbose=0,
                callbacks=[TrialEvents(self.view)],
            ),
        )
        try:
            results = tuner.fit()
        except KeyboardInterrupt:  # the processes of the trials end with this one
            self._end_lost_runs(configs.values(), "KILLED")
            raise
        finally:
            with contextlib.suppress(Exception):  # Ray may still be writing to it
                self.folder.clear_requests()
        errors = {str(result.config["trial"]): result.error for result in results if result.config and result.error}
        # a process that lived to say why it failed has ended its run itself, or the run is another driver's
        self._end_lost_runs([configs[name] for name, error in errors.items() if _is_killed(error)], "FAILED")
        return {name: _keep_failure(configs[name], error) for name, error in errors.items()}

    def _end_lost_runs(self, configs: Iterable[TrainConfig], status: str) -> None:
        """End the MLflow runs of trials whose process is gone: with one worker, nobody else is there to say so."""
        if self.tracking_uri == mlflow_runs.OFF:
            return
        began = time.monotonic()
        for config in configs:
            path = storage.storage_path(config.output) / config.name / MLFLOW_ID
            with contextlib.suppress(Exception):  # it had none yet, or the store is away
                end_lost_run(self.tracking_uri, storage.read(path).decode("utf-8").strip(), status)
                continue
            if time.monotonic() - began > AWAY_S:  # who pressed Ctrl-C does not wait so long for each trial
                return


def _is_killed(error: Exception) -> bool:
    """Whether a trial's process could not say why it failed: Ray does, of one out of memory by another name."""
    return isinstance(error, RayError) and not isinstance(error, RayTaskError)


def _keep_failure(config: TrainConfig, error: Exception) -> str:
    """Why a trial failed, in one line that names its log, which is written here."""
    cause = error.cause if isinstance(error, RayTaskError) else error
    reason = f"its process was killed ({type(error).__name__})" if _is_killed(error) else one_line(cause)
    with contextlib.suppress(Exception):  # a full disk may be the reason, or a store that is away
        storage.make_folder(log_path(config).parent)
        log_path(config).write_text(without_secrets(str(error)) + "\n", encoding="utf-8")
        reason += f" (all of it in {log_path(config)})"
    return reason


def train_trial(
    plain: Mapping[str, Any],
    parent_run_id: str,
    tracking_uri: str,
    until: int,
    origin_sha256: str,
    teacher_sha256: Sequence[str] = (),
) -> None:
    """One trial, in a process of Tune's: a run of its own, continued where it stopped, up to a step.

    A run of one worker is trained by this very process, which the next trial finds ready; more are Ray Train's.

    What the sweep's address means is settled where the sweep runs; a trial's config does not keep it. One that diverges
    has a result, and has not failed.
    """
    os.environ["MLFLOW_TRACKING_URI"] = tracking_uri
    os.environ.setdefault(LOOK_S, "0.25")
    config = from_dict(TrainConfig, plain, "the sweep's config")
    resumed = dataclasses.replace(config, tracking_uri="", resume=True)
    pause_at = until if until < config.max_steps else 0
    run = run_folder(config)
    _wait_for_orphans(run.path)
    with _timed(config):
        try:
            run_training(
                resumed,
                parent_run_id=parent_run_id,
                is_quiet=True,
                **_reporting(config),
                pause_at=pause_at,
                origin_sha256=origin_sha256,
                teacher_sha256=teacher_sha256,
            )
        except PausedError:
            return
        except UserError:
            if has_summary(run) and read_summary(run).status == RunStatus.DIVERGED:
                return
            raise


def is_alone(config: TrainConfig) -> bool:
    """Whether a trial is trained by Tune's own process: with one worker, there is nothing for Ray Train to do."""
    return config.worker_range == (1, 1)


def _reporting(config: TrainConfig) -> dict[str, Any]:
    """How a trial tells Tune of its validations."""
    return (
        {"alone": lambda metrics: tune.report(dict(metrics))}
        if is_alone(config)
        else {"callbacks": [TuneReportCallback()]}
    )


def _resources(configs: Iterable[TrainConfig]) -> dict[str, float]:
    """What the process of each trial is given; the workers of Ray Train ask for their own."""
    one = next(iter(configs))
    if not is_alone(one):
        return {"CPU": DRIVER_CPUS}
    gpus = {"GPU": 1.0} if ray.cluster_resources().get("GPU", 0) else {}
    return {"CPU": one.cpus_per_worker} | gpus


def _wait_for_orphans(folder: Path) -> None:
    """Wait for a process that still writes to a trial, of a sweep whose driver was killed a moment ago."""
    deadline = time.monotonic() + ORPHAN_TIMEOUT_S
    while time.monotonic() < deadline:
        try:
            with folder_lock.locked(folder, "orphan"):
                return
        except UserError as error:
            if not str(error).startswith("orphan"):
                return  # which the run says itself
        time.sleep(0.5)


@contextlib.contextmanager
def _timed(config: TrainConfig) -> Iterator[None]:
    began = time.monotonic()
    try:
        yield
    finally:
        with contextlib.suppress(Exception):  # a full disk, or a store that is away
            path, took = times_path(config), f"{time.monotonic() - began:.1f}\n"
            storage.replace_file(path, storage.read_if_there(path) + took.encode())


class TrialEvents(tune.Callback):  # type: ignore[misc]  # Ray is not typed
    """Shows each validation and end of a trial."""

    def __init__(self, view: View) -> None:
        self.view = view

    def __reduce__(self) -> tuple[Any, ...]:
        """Tune keeps its callbacks for a restart of its own, which there is not; a terminal cannot be kept."""
        return TrialEvents, (Lines(0),)

    def on_trial_start(self, *, trial: Any, **_: Any) -> None:
        """A trial that has its place."""
        self.view.started(trial.config["trial"])

    def on_trial_result(self, *, trial: Any, result: dict[str, Any], **_: Any) -> None:
        """A validation of a trial."""
        self.view.validated(trial.config["trial"], result)
