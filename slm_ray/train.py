"""Train a model: `python slm_ray/train.py`, alone or through `ray job submit`. Ray Train lives here only.

In: a `TrainConfig` from preset and command line, and a prepared data set. Out: `runs/NAME/` with the checkpoints `best`
and `latest`, an MLflow run, and a summary on the terminal. `run_training` is the whole of it as a function; the sweep
calls it for every trial. The driver checks everything a user can get wrong before any worker starts, then watches the
run's own record for progress; the workers run `loop.fit`.
"""

if __name__ == "__main__":
    from slm_ray.script import run

    run("slm_ray.train")

import dataclasses
import math
import shutil
import threading
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import ray
import torch
from ray.train import FailureConfig, RunConfig, ScalingConfig, UserCallback
from ray.train.torch import TorchTrainer

from slm_ray import checkpoint, cluster, hardware, loop, registry, tracking
from slm_ray.config import TrainConfig, from_dict
from slm_ray.errors import UserError, command
from slm_ray.history import History, plot_loss
from slm_ray.model import Decoder, count_parameters
from slm_ray.preflight import load_task, parse_config, refuse_conflicts, resolve
from slm_ray.progress import watch
from slm_ray.run_folder import RunFolder
from slm_ray.script import quiet_environment
from slm_ray.task import Surroundings, Task
from slm_ray.tracking import Tracker

MAX_CPU_WORKERS = 2
POLL_S = 0.2


@dataclasses.dataclass(frozen=True)
class TrainResult:
    """What a run ended with."""

    name: str
    best: Path
    latest: Path
    metrics: dict[str, float]  # of the best checkpoint: val_loss, val_perplexity, val_bits_per_byte, step
    run_id: str
    version: str  # of the registered model, empty where none was asked for
    tracking_uri: str


def run_training(
    config: TrainConfig, *, parent_run_id: str = "", is_quiet: bool = False, callbacks: Sequence[UserCallback] = ()
) -> TrainResult:
    """Train as the config says, through Ray Train, and give where the result lies.

    `callbacks` are Ray Train's own, called with what each validation reports.
    Starts a local Ray, or joins the cluster that RAY_ADDRESS names, unless Ray is already running in this process.

    Raises:
        UserError: the config, the data set or the run's folder does not allow it, or the loss diverged.
    """
    config = resolve(config, default_workers)
    task = load_task(config, tracking.NullTracker())
    folder = task.folder
    refuse_conflicts(config, folder, task.data_fingerprint)
    cluster.connect()
    _check_resources(config)
    try:
        folder.path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot write to {folder.path}: {error.strerror}") from error
    tracker = _tracker(config, task, parent_run_id)
    status = "FAILED"
    try:
        if not _is_finished(folder, task.max_steps):
            with watch(task.history, task.max_steps, is_quiet=is_quiet):
                _run_workers(config, tracker.run_id, callbacks)
        result = _conclude(config, folder, tracker)
        status = "FINISHED"
        return result
    except KeyboardInterrupt:
        status = "KILLED"
        raise
    finally:
        tracker.finish(status)


def _check_resources(config: TrainConfig) -> None:
    """On a single node, more workers than it has CPUs would wait for ever; a cluster of several may still grow.

    Raises:
        UserError: too many workers, or some would get a GPU and others none.
    """
    resources = ray.cluster_resources()
    cpus, gpus = resources.get("CPU", 0), resources.get("GPU", 0)
    if 0 < gpus < config.workers:
        raise UserError(f"{config.workers} workers and {gpus:g} GPU(s): give --workers {int(gpus) or 1}, one each")
    wanted = config.workers * config.cpus_per_worker
    if len(ray.nodes()) == 1 and wanted > cpus:
        raise UserError(f"{config.workers} workers need {wanted:g} CPUs and this machine has {cpus:g}: lower --workers")


def default_workers() -> int:
    """Every GPU of the cluster or, without one, up to two CPU workers."""
    cluster.connect()
    resources = ray.cluster_resources()
    return int(resources.get("GPU", 0)) or max(1, min(MAX_CPU_WORKERS, int(resources.get("CPU", 1))))


def _tracker(config: TrainConfig, task: Task, parent_run_id: str) -> Tracker:
    newest = task.folder.newest_whole()
    run_id = checkpoint.load_state(newest).run_id if newest is not None else ""
    if tracking.has_run(config.tracking_uri, run_id):
        return tracking.continue_run(config.tracking_uri, run_id)
    tags = {"data_fingerprint": task.data_fingerprint, "slm_ray.folder": str(task.folder.path)}
    params = flatten(dataclasses.asdict(config)) | {"resolved_max_steps": task.max_steps}
    return tracking.start_run(config.tracking_uri, config.experiment, config.name, params, tags, parent_run_id)


def flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested fields by their dotted names: `{"model": {"d_ff": 512}}` -> `{"model.d_ff": 512}`."""
    flat: dict[str, Any] = {}
    for name, value in values.items():
        flat |= flatten(value, f"{prefix}{name}.") if isinstance(value, Mapping) else {f"{prefix}{name}": value}
    return flat


def _run_workers(config: TrainConfig, run_id: str, callbacks: Sequence[UserCallback]) -> None:
    """Run `_worker` on every rank; Ray starts the group again, up to max_failures times, when a worker is lost."""
    uses_gpu = ray.cluster_resources().get("GPU", 0) > 0
    own_state = Path(config.output) / config.name / ".ray"  # a new name each time: Ray must not restore by itself
    trainer = TorchTrainer(
        _worker,
        train_loop_config={"config": dataclasses.asdict(config), "run_id": run_id},
        scaling_config=ScalingConfig(
            num_workers=config.workers,
            use_gpu=uses_gpu,
            resources_per_worker={"CPU": config.cpus_per_worker} | ({"GPU": 1} if uses_gpu else {}),
        ),
        run_config=RunConfig(
            name=uuid.uuid4().hex,
            storage_path=str(own_state),
            failure_config=FailureConfig(max_failures=config.max_failures),
            callbacks=list(callbacks),
        ),
    )
    try:
        _fit_interruptibly(trainer)
    finally:
        shutil.rmtree(own_state, ignore_errors=True)


def _fit_interruptibly(trainer: TorchTrainer) -> None:
    """Fit in a thread: on the main one, Ray would take Ctrl-C for itself and end the process with a code of its own."""
    if threading.current_thread() is not threading.main_thread():
        trainer.fit()
        return
    errors: list[BaseException] = []

    def run() -> None:
        try:
            trainer.fit()
        except BaseException as error:  # handed over to the main thread
            errors.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    while thread.is_alive():
        thread.join(POLL_S)
    if errors:
        raise errors[0]


def _worker(given: dict[str, Any]) -> None:
    """What each worker process runs."""
    config = from_dict(TrainConfig, given["config"], "the driver's config")
    context = ray.train.get_context()
    is_chief = context.get_world_rank() == 0
    tracker = tracking.continue_run(config.tracking_uri, given["run_id"]) if is_chief else tracking.NullTracker()
    device = ray.train.torch.get_device()
    if device.type == "cpu":
        torch.set_num_threads(config.threads or max(1, hardware.cpu_count() // context.get_local_world_size()))
    task = load_task(config, tracker)
    around = Surroundings(
        rank=context.get_world_rank(),
        world_size=context.get_world_size(),
        device=device,
        wrap=ray.train.torch.prepare_model,
        all_sum=_all_sum,
        report=lambda metrics: ray.train.report(dict(metrics)),
    )
    n_parameters = parameter_count(config)
    is_compiled = hardware.resolve_compile(config, device, n_parameters, task.max_steps)
    loop.fit(task, around, precision=hardware.resolve_precision(config.precision, device), is_compiled=is_compiled)


def parameter_count(config: TrainConfig) -> int:
    """Weights of the model, counted without allocating them."""
    with torch.device("meta"):
        return count_parameters(Decoder(config.model))


def _all_sum(values: torch.Tensor) -> torch.Tensor:
    if torch.distributed.is_initialized():
        torch.distributed.all_reduce(values)
    return values


def _is_finished(folder: RunFolder, max_steps: int) -> bool:
    """Whether a resumed run has nothing left to do."""
    newest = folder.newest_whole()
    if newest is None or not folder.has_summary() or not folder.best.exists():
        return False
    summary = folder.read_summary()
    return bool(
        checkpoint.load_state(newest).step >= max_steps and summary["step"] == summary["max_steps"] == max_steps
    )


def _conclude(config: TrainConfig, folder: RunFolder, tracker: Tracker) -> TrainResult:
    """Plot, tags, and the registry, once the workers are done. Raises: UserError when the loss diverged."""
    summary = folder.read_summary()
    if summary["status"] == loop.DIVERGED:
        raise UserError(_diverged(summary, folder))
    plot_loss(History(folder.path / "metrics.jsonl"), folder.path / "loss.png")
    tracker.log_file(folder.path / "loss.png")
    tracker.set_tags({"status": str(summary["status"]), "best_step": str(int(summary["best"]["step"]))})
    version = ""
    if config.register and config.tracking_uri != tracking.OFF:
        version = registry.registered_version(config.tracking_uri, config.register, folder.best, tracker.run_id)
        version = version or registry.register(config.tracking_uri, config.register, folder.best, tracker.run_id)
    return TrainResult(
        name=config.name,
        best=folder.best,
        latest=folder.latest,
        metrics=dict(summary["best"]),
        run_id=tracker.run_id,
        version=version,
        tracking_uri=config.tracking_uri,
    )


def _diverged(summary: Mapping[str, Any], folder: RunFolder) -> str:
    kept = f"the checkpoint before it is {folder.latest}" if folder.latest.exists() else "no checkpoint was written"
    return f"the loss ceased to be a number before step {summary['step']:,}: lower --optim.lr; {kept}"


@command
def main(argv: Sequence[str] | None = None) -> int:
    """Command line: parse, train, say what came out."""
    quiet_environment()
    result = run_training(parse_config(argv))
    print(describe(result))
    return 0


def describe(result: TrainResult) -> str:
    """The last lines of a run: where its checkpoints lie, and how good the best is."""
    metrics = result.metrics
    lines = [
        f"best     {result.best}  (step {int(metrics['step']):,})",
        f"latest   {result.latest}",
        f"loss     {metrics['val_loss']:.4f} nats per token, {metrics['val_bits_per_byte']:.4f} bits per byte, "
        f"perplexity {math.exp(metrics['val_loss']):.2f} on the validation split",
    ]
    if result.run_id:
        lines.append(f"run      {result.run_id}  (to see it: {tracking.ui_command(result.tracking_uri)})")
    if result.version:
        lines.append(f"model    version {result.version} is the champion now")
    return "\n".join(lines)
