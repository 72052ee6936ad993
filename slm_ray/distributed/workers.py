"""The workers of a run: started, started again after a loss, watched, and asked to leave.

In: a `RunPlan`, from the driver. Out: `runs/NAME/`, written by rank 0. Every worker runs `loop.fit` and continues from
the latest valid checkpoint; so a group that lost a worker, hangs, or changes its size is just started again.
"""

import contextlib
import dataclasses
import logging
import os
import threading
import traceback
import uuid
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import ray
from ray.train import FailureConfig, RunConfig, ScalingConfig, TrainingFailedError, UserCallback
from ray.train.torch import TorchTrainer

from slm_ray.cli.signals import Signals, StoppedError
from slm_ray.config.schema import TrainConfig
from slm_ray.distributed import cluster
from slm_ray.distributed.ray_metrics import FailureCounter
from slm_ray.distributed.worker_process import Report, run_here, run_worker
from slm_ray.errors import UserError, reason, without_secrets
from slm_ray.limits import core_count
from slm_ray.locks.lease import LeaseLostError
from slm_ray.runs.outcome import ERROR, clear_outcome, read_refusal
from slm_ray.runs.run_folder import RunFolder
from slm_ray.runs.verification import UnreadableCheckpointError
from slm_ray.tracking import mlflow_runs
from slm_ray.training import hardware
from slm_ray.training.inputs import RunPlan

LOGGER = logging.getLogger(__name__)
POLL_S = 0.2
RESIZE_CHECK_S = 30.0
"""Between two looks for room for more elastic workers."""
HEALTH_TIMEOUT = "RAY_TRAIN_WORKER_HEALTH_CHECK_TIMEOUT_S"
UNUSED_CALLBACK = "DatasetsCallback"
"""Starts a process for Ray Data, which reads nothing here."""
CLEANER_CALLBACK = "PlacementGroupCleanerCallback"
"""Starts a process that frees the CPUs of a run whose controller is lost; not needed where Ray ends with the run."""


class LeanTorchTrainer(TorchTrainer):  # type: ignore[misc]  # Ray is not typed
    """Without those of Ray's helper processes that have nothing to do here: each wakes a hundred times a second.

    Ray has no option for it. Where another version names them otherwise, or makes them elsewhere, they are started.
    """

    def _create_default_callbacks(self, *given: Any, **named: Any) -> list[Any]:
        left_out = {UNUSED_CALLBACK} | ({CLEANER_CALLBACK} if cluster.is_started_here() else set())
        made = super()._create_default_callbacks(*given, **named)
        return [callback for callback in made if type(callback).__name__ not in left_out]


def run_alone(plan: RunPlan, run_id: str, report: Report) -> None:
    """Run the loop in this process, a process of Ray's, as the run's one worker. Nobody starts it again.

    Raises:
        UserError: as `run_workers`, and whatever the loop raises.
    """
    folder = plan.folder
    _make_ready(folder)
    still_ours = folder.lease.raise_if_lost if folder.lease else lambda: None
    with _tidied(folder):
        run_here(_given(plan, run_id), report, still_ours)


def run_workers(plan: RunPlan, run_id: str, callbacks: Sequence[UserCallback]) -> None:
    """Run the loop on every rank; Ray starts the group again, up to max_failures times, when a worker is lost.

    SIGTERM and Ctrl-C ask the workers to save and leave.

    Raises:
        StoppedError: a signal came before the workers had begun, or a second one.
        UserError: the workers were lost too often, or one of them met a mistake of the user's, or the run's place
            cannot be written to before they start or read when they are done.
        LeaseLostError: another driver has taken the run over.
    """
    folder = plan.folder
    _make_ready(folder)
    trainer = _trainer(plan, run_id, callbacks)
    with _tidied(folder):
        try:
            with _health_timeout(plan.config.hang_timeout_s):
                _fit_interruptibly(trainer.fit, folder, _has_begun(plan))
        except TrainingFailedError as error:
            with contextlib.suppress(OSError):
                folder.check_lease()  # a worker may have seen before this process that the run is another driver's
            raise UserError(read_refusal(folder) or _failure(error, folder)) from error
    if refusal := read_refusal(folder):
        raise UserError(refusal)


def _make_ready(folder: RunFolder) -> None:
    """Forget what an earlier start left. Raises: UserError when the run's place cannot be written to."""
    try:
        folder.clear_requests()
        clear_outcome(folder)
    except OSError as error:
        raise UserError(f"cannot write to {folder.address}: {reason(error)}") from error


@contextlib.contextmanager
def _tidied(folder: RunFolder) -> Iterator[None]:
    """Clear up behind the workers, and bring here what they left on other machines.

    How the block ended is not hidden by a store that does not answer afterwards. Of a run that another driver has,
    nothing is touched.

    Raises:
        UserError: the block ended well, and what the workers left cannot be read.
    """
    try:
        yield
    except LeaseLostError:
        raise
    except BaseException:
        with contextlib.suppress(OSError, LeaseLostError):
            folder.clear_requests()
        try:
            folder.fetch()
        except UserError as error:
            LOGGER.warning("%s is not brought up to date here: %s", folder.path, error)
        raise
    with contextlib.suppress(OSError):  # Ray may still be writing to it
        folder.clear_requests()
    try:
        folder.fetch()
    except UnreadableCheckpointError as error:
        raise UserError(f"the workers are done, and {error}: --resume goes on from what they left there") from error


def _trainer(plan: RunPlan, run_id: str, callbacks: Sequence[UserCallback]) -> TorchTrainer:
    config, folder = plan.config, plan.folder
    uses_gpu = ray.cluster_resources().get("GPU", 0) > 0
    storage_path, storage_filesystem = folder.ray_storage()
    return LeanTorchTrainer(
        run_worker,
        train_loop_config=_given(plan, run_id),
        scaling_config=ScalingConfig(
            num_workers=config.worker_range if config.is_elastic else config.worker_range[0],
            use_gpu=uses_gpu,
            resources_per_worker={"CPU": config.cpus_per_worker} | ({"GPU": 1} if uses_gpu else {}),
            elastic_resize_monitor_interval_s=RESIZE_CHECK_S,
        ),
        run_config=RunConfig(
            name=uuid.uuid4().hex,  # a new one each time: Ray must not restore by itself
            storage_path=storage_path,
            storage_filesystem=storage_filesystem,
            failure_config=FailureConfig(max_failures=config.max_failures),
            callbacks=[FailureCounter(config.name), *callbacks],
            worker_runtime_env={"env_vars": _environment(config)},
        ),
    )


def _given(plan: RunPlan, run_id: str) -> dict[str, Any]:
    """What a worker is told, as plain values."""
    return {
        "config": dataclasses.asdict(plan.config),
        "run_id": run_id,
        "pause_at": plan.pause_at,
        "tracking_uri": mlflow_runs.resolve_uri(plan.config.tracking_uri),  # as seen from the driver
        "lease": plan.folder.lease.token if plan.folder.lease else "",
    }


def _environment(config: TrainConfig) -> dict[str, str]:
    return hardware.memory_settings(config.threads or core_count() // max(config.worker_range[1], 1))


@contextlib.contextmanager
def _health_timeout(timeout_s: float) -> Iterator[None]:
    """Let Ray take a worker for dead that does not answer for so long: one that was stopped cannot end itself."""
    if timeout_s == 0 or HEALTH_TIMEOUT in os.environ:
        yield
        return
    os.environ[HEALTH_TIMEOUT] = str(timeout_s)  # read when the controller starts
    try:
        yield
    finally:
        del os.environ[HEALTH_TIMEOUT]


def _has_begun(plan: RunPlan) -> Callable[[], bool]:
    """Tells whether the workers have written to the run's record since this was made; where it cannot be seen, yes."""
    if not plan.folder.is_watched:
        return lambda: True

    def changed_ns() -> int:
        path = plan.history.path
        return path.stat().st_mtime_ns if path.exists() else 0

    before = changed_ns()
    return lambda: changed_ns() != before


def _fit_interruptibly(fit: Callable[[], Any], folder: RunFolder, has_begun: Callable[[], bool]) -> None:
    """Fit in a thread: on the main one, Ray would take Ctrl-C for itself and end the process with a code of its own."""
    errors: list[BaseException] = []

    def run() -> None:
        try:
            fit()
        except BaseException as error:  # handed over to this thread
            errors.append(error)

    with Signals(folder.request_stop).catching() as signals:
        thread = threading.Thread(target=run, daemon=True)
        thread.start()
        while thread.is_alive():
            thread.join(POLL_S)
            if folder.lease is not None:
                folder.lease.raise_if_lost()
            if signals.received and not has_begun():
                raise StoppedError("stopped before the first step", signals.received)
    if errors:
        raise errors[0]
    if signals.received:
        raise StoppedError("", signals.received)


def _failure(error: TrainingFailedError, folder: RunFolder) -> str:
    """One line on why Ray gave up; its whole report is left in the run's folder."""
    causes = list(getattr(error, "worker_failures", {}).values())
    for cause in causes:
        if isinstance(cause, UserError):
            return str(cause)
    path = folder.path / ERROR
    with contextlib.suppress(OSError):  # a full disk may be the reason
        path.write_text(without_secrets("".join(traceback.format_exception(error))), encoding="utf-8")
    last = next(
        (line for line in reversed(str(causes[0] if causes else error).splitlines()) if line.strip()), "unknown"
    )
    latest = folder.latest_valid()
    kept = f"--resume continues from {latest.path.name}" if latest else "no checkpoint was written"
    return f"the workers failed too often: {last.strip()} (all of it in {path}); {kept}"
