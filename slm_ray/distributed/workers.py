"""The workers of a run: started, started again after a loss, watched, and asked to leave.

In: a `RunPlan`, from the driver. Out: `runs/NAME/`, written by rank 0. Every worker runs `loop.fit` and continues from
the latest valid checkpoint; so a group that lost a worker, hangs, or changes its size is just started again.
"""

import contextlib
import dataclasses
import faulthandler
import os
import sys
import threading
import traceback
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import ray
import torch
from ray.train import FailureConfig, RunConfig, ScalingConfig, TrainingFailedError, UserCallback
from ray.train.torch import TorchTrainer

from slm_ray.cli.signals import Signals, StoppedError
from slm_ray.config.files import from_dict
from slm_ray.config.schema import TrainConfig
from slm_ray.distributed import cluster
from slm_ray.distributed.watchdog import Watchdog
from slm_ray.errors import UserError, without_secrets
from slm_ray.model.decoder import parameter_count
from slm_ray.runs.outcome import ERROR, clear_outcome, has_refusal, read_refusal, write_refusal
from slm_ray.runs.remote_run import open_run
from slm_ray.runs.run_folder import RunFolder
from slm_ray.runs.verification import UnreadableCheckpointError
from slm_ray.tracking import mlflow_runs, system_metrics, tensorboard_tracker
from slm_ray.tracking.tracker import CompositeTracker, NullTracker, Tracker
from slm_ray.training import hardware, loop
from slm_ray.training.context import TrainContext
from slm_ray.training.inputs import RunPlan, TrainInputs, load_inputs

POLL_S = 0.2
RESIZE_CHECK_S = 30.0
"""Between two looks for room for more elastic workers."""
EXIT_HUNG = 75
HEALTH_TIMEOUT = "RAY_TRAIN_WORKER_HEALTH_CHECK_TIMEOUT_S"
UNUSED_CALLBACK = "DatasetsCallback"
"""Starts a process for Ray Data, which reads nothing here."""
CLEANER_CALLBACK = "PlacementGroupCleanerCallback"
"""Starts a process that frees the CPUs of a run whose controller is lost; not needed where Ray ends with the run."""


class LeanTorchTrainer(TorchTrainer):  # type: ignore[misc]  # Ray is not typed
    """Without those of Ray's helper processes that have nothing to do here: each wakes a hundred times a second.

    Ray has no option for it. Where another version names them otherwise, they are started.
    """

    def _create_default_callbacks(self) -> list[Any]:
        left_out = {UNUSED_CALLBACK} | ({CLEANER_CALLBACK} if cluster.is_started_here() else set())
        made = super()._create_default_callbacks()
        return [callback for callback in made if type(callback).__name__ not in left_out]


def run_workers(plan: RunPlan, run_id: str, callbacks: Sequence[UserCallback]) -> None:
    """Run the loop on every rank; Ray starts the group again, up to max_failures times, when a worker is lost.

    SIGTERM and Ctrl-C ask the workers to save and leave.

    Raises:
        StoppedError: a signal came before the workers had begun, or a second one.
        UserError: the workers were lost too often, or one of them met a mistake of the user's.
    """
    folder = plan.folder
    folder.clear_requests()
    clear_outcome(folder)
    trainer = _trainer(plan, run_id, callbacks)
    try:
        with _health_timeout(plan.config.hang_timeout_s):
            _fit_interruptibly(trainer.fit, folder, _has_begun(plan))
    except TrainingFailedError as error:
        raise UserError(read_refusal(folder) or _failure(error, folder)) from error
    finally:
        with contextlib.suppress(OSError):  # Ray may still be writing to it
            folder.clear_requests()
        folder.fetch()  # the workers may have been on other machines
    if refusal := read_refusal(folder):
        raise UserError(refusal)


def _trainer(plan: RunPlan, run_id: str, callbacks: Sequence[UserCallback]) -> TorchTrainer:
    config = plan.config
    uses_gpu = ray.cluster_resources().get("GPU", 0) > 0
    storage_path, storage_filesystem = plan.folder.ray_storage()
    return LeanTorchTrainer(
        _worker,
        train_loop_config={
            "config": dataclasses.asdict(config),
            "run_id": run_id,
            "pause_at": plan.pause_at,
            "tracking_uri": mlflow_runs.resolve_uri(config.tracking_uri),  # as seen from the driver
        },
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
            callbacks=list(callbacks),
            worker_runtime_env={"env_vars": _environment(config)},
        ),
    )


def _environment(config: TrainConfig) -> dict[str, str]:
    """`KEEP_MEMORY` for workers of one thread, which it helped on every machine tried; with two it cost a third."""
    workers_here = max(config.worker_range[1], 1)
    threads = config.threads or hardware.cpu_count() // workers_here
    if threads > 1:
        return {}
    return {name: value for name, value in hardware.KEEP_MEMORY.items() if name not in os.environ}


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


def _worker(given: dict[str, Any]) -> None:
    """What each worker process runs.

    A mistake of the user's is left in the run's folder, and the workers that Ray starts in place of these see it and
    leave: it is not tried again `max_failures` times.
    """
    config = from_dict(TrainConfig, given["config"], "the driver's config")
    if has_refusal(run := open_run(config.output, config.name)):
        return
    try:
        _train(config, given["run_id"], given["tracking_uri"], given["pause_at"])
    except UnreadableCheckpointError:  # the disk may give it at the next try
        raise
    except UserError as error:
        write_refusal(run, str(error))
        raise


def _train(config: TrainConfig, run_id: str, tracking_uri: str, pause_at: int) -> None:
    ranks, device = ray.train.get_context(), ray.train.torch.get_device()
    if device.type == "cpu":
        torch.set_num_threads(config.threads or max(1, hardware.cpu_count() // ranks.get_local_world_size()))
    inputs = dataclasses.replace(load_inputs(config, NullTracker()), pause_at=pause_at)
    watchdog = Watchdog(config.hang_timeout_s)

    def report(metrics: Mapping[str, Any]) -> None:
        with watchdog.paused():
            ray.train.report(dict(metrics))

    context = TrainContext(
        rank=ranks.get_world_rank(),
        world_size=ranks.get_world_size(),
        device=device,
        wrap=ray.train.torch.prepare_model,
        all_reduce_sum=_all_reduce_sum,
        report=report,
        is_stop_requested=inputs.folder.is_stop_requested,
        heartbeat=watchdog.heartbeat,
    )
    precision, is_compiled = _arithmetic(inputs, context)
    with (
        _tracked(inputs, run_id, tracking_uri) as tracked,
        watchdog.watching(lambda: _exit_hung_worker(inputs, context)),
    ):
        loop.fit(tracked, context, precision=precision, is_compiled=is_compiled)


def _arithmetic(inputs: TrainInputs, context: TrainContext) -> tuple[str, bool]:
    """Precision, and whether to compile, as rank 0 chooses: machines may differ, and the ranks must not."""
    config, device = inputs.config, context.device
    is_compiled = hardware.resolve_compile(config, device, parameter_count(config.model), inputs.max_steps)
    precision = hardware.resolve_precision(config.precision, device)
    own = [float(hardware.PRECISIONS.index(precision)), float(is_compiled)]
    chosen = context.all_reduce_sum(torch.tensor(own if context.is_main else [0.0, 0.0], device=device)).tolist()
    return hardware.PRECISIONS[int(chosen[0])], bool(chosen[1])


@contextlib.contextmanager
def _tracked(inputs: TrainInputs, run_id: str, tracking_uri: str) -> Iterator[TrainInputs]:
    """The inputs with rank 0's tracker, while the first worker of each node logs what its machine does.

    What goes wrong with either is a message in the run's record, which the driver shows.
    """
    ranks, config = ray.train.get_context(), inputs.config

    def warn(text: str) -> None:
        inputs.history.append({"message": text})

    machine = mlflow_runs.continue_run(tracking_uri, run_id if ranks.get_local_rank() == 0 else "", warn)
    tracker: Tracker = machine if ranks.get_world_rank() == 0 else NullTracker()
    if config.tensorboard and ranks.get_world_rank() == 0:
        folder = inputs.folder.path / tensorboard_tracker.FOLDER
        tracker = CompositeTracker(machine, tensorboard_tracker.TensorBoardTracker(folder, warn))
    node = f"node-{ranks.get_node_rank()}" if ranks.get_node_rank() else ""
    try:
        with system_metrics.logged(machine, node=node):
            yield dataclasses.replace(inputs, tracker=tracker)
    finally:
        tracker.close()
        machine.close()


def _exit_hung_worker(inputs: TrainInputs, context: TrainContext) -> None:
    """End this process in the middle of whatever it waits for, and log where: its group is started again."""
    message = f"no progress for {inputs.config.hang_timeout_s:g} s: the workers start again from the last checkpoint"
    if context.is_main:
        inputs.history.append({"message": message})
    sys.stderr.write(message + "\n")
    with contextlib.suppress(Exception):  # it must not keep this process
        faulthandler.dump_traceback(sys.__stderr__ or 2)
    os._exit(EXIT_HUNG)


def _all_reduce_sum(values: torch.Tensor) -> torch.Tensor:
    if torch.distributed.is_initialized():
        torch.distributed.all_reduce(values)
    return values
