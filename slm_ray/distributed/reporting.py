"""What a worker tells the tracker: metrics of the run and of its machine, and its start and end as an attempt.

In: a run's inputs, on each worker. Out: the same with rank 0's tracker, for the length of a block.
"""

import contextlib
import dataclasses
import socket
from collections.abc import Callable, Iterator

from slm_ray.distributed.place import Place
from slm_ray.distributed.ray_metrics import RayMetricsTracker
from slm_ray.errors import UserError
from slm_ray.tracking import mlflow_runs, system_metrics
from slm_ray.tracking.attempts import Attempt
from slm_ray.tracking.besides import tensorboard_tracker, wandb_tracker
from slm_ray.tracking.tracker import CompositeTracker, NullTracker, Tracker
from slm_ray.training.context import TrainContext
from slm_ray.training.inputs import TrainInputs


@contextlib.contextmanager
def tracked(inputs: TrainInputs, place: Place, run_id: str, tracking_uri: str) -> Iterator[TrainInputs]:
    """The inputs with rank 0's tracker, while the first worker of each node logs what its machine does.

    What goes wrong with either is a message in the run's record, which the driver shows.
    """

    def warn(text: str) -> None:
        inputs.history.message(text)

    is_main = place.rank == 0
    record = inputs.history if is_main else None
    machine = mlflow_runs.continue_run(tracking_uri, run_id if place.local_rank == 0 else "", warn, record)
    besides = list(_besides(inputs, warn)) if is_main else []
    metrics = RayMetricsTracker(inputs.config.name, inputs.max_steps, place.world_size)
    tracker: Tracker = CompositeTracker(machine, metrics, *besides) if is_main else NullTracker()
    node = f"node-{place.node_rank}" if place.node_rank else ""
    try:
        has_gpu = place.device.type == "cuda"
        with (
            metrics.shown() if is_main else contextlib.nullcontext(),
            system_metrics.logged(machine, node=node, has_gpu=has_gpu, warn=warn),
        ):
            yield dataclasses.replace(inputs, tracker=tracker)
    except BaseException:
        for one in besides:  # the driver ends the run at MLflow
            one.finish("FAILED")
        raise
    finally:
        tracker.close()
        machine.close()


def _besides(inputs: TrainInputs, warn: Callable[[str], None]) -> Iterator[Tracker]:
    """The trackers that the config asks for besides MLflow."""
    config, folder = inputs.config, inputs.folder.path
    if config.tensorboard:
        yield tensorboard_tracker.TensorBoardTracker(folder / tensorboard_tracker.FOLDER, warn)
    if config.wandb:
        fields = dataclasses.asdict(config)
        yield wandb_tracker.WandbTracker(folder / wandb_tracker.FOLDER, config.name, fields, warn)


@contextlib.contextmanager
def attempt(inputs: TrainInputs, context: TrainContext, run_id: str, tracking_uri: str) -> Iterator[None]:
    """A child of the run for this start of its workers, on rank 0."""
    if not context.is_main:
        yield
        return
    facts = {"from_step": _step(inputs), "workers": context.world_size, "host": socket.gethostname()}
    child = Attempt(tracking_uri, run_id, facts)
    status = "FAILED"
    try:
        yield
        status = "FINISHED"
    finally:
        child.end(status, {"last_checkpoint_step": _step(inputs)})


def _step(inputs: TrainInputs) -> int | None:
    """That of the newest checkpoint, 0 without one; unknown where the disk does not give it now."""
    try:
        state = inputs.folder.latest_state()
    except (UserError, OSError):
        return None
    return state.step if state else 0
