"""One worker process of a run: the training loop with Ray's ranks, watched, with rank 0's tracker.

In: the config, the MLflow run and the driver's lease, as plain values. Out: what `loop.fit` leaves in the run's folder.
`workers.py` starts these.
"""

import contextlib
import dataclasses
import faulthandler
import functools
import os
import sys
from collections.abc import Mapping
from typing import Any

import ray
import torch

from slm_ray.config.files import from_dict
from slm_ray.config.schema import TrainConfig
from slm_ray.distributed.reporting import attempt, tracked
from slm_ray.distributed.watchdog import Watchdog
from slm_ray.errors import UserError
from slm_ray.limits import core_count
from slm_ray.locks.lease import LeaseLostError
from slm_ray.model.decoder import parameter_count
from slm_ray.runs.outcome import has_refusal, write_refusal
from slm_ray.runs.remote_run import open_run
from slm_ray.runs.verification import UnreadableCheckpointError
from slm_ray.tracking.tracker import NullTracker
from slm_ray.training import hardware, loop
from slm_ray.training.context import DDP_OPTIONS, TrainContext
from slm_ray.training.inputs import TrainInputs, load_inputs

EXIT_HUNG = 75


def run_worker(given: dict[str, Any]) -> None:
    """What each worker process runs.

    A mistake of the user's is left in the run's folder, and the workers that Ray starts in place of these see it and
    leave: it is not tried again `max_failures` times.
    """
    config = from_dict(TrainConfig, given["config"], "the driver's config")
    run = open_run(config.output, config.name, given["lease"])
    run.check_lease()
    if has_refusal(run):
        return
    try:
        _train(config, given)
    except (UnreadableCheckpointError, LeaseLostError):  # the disk may give it at the next try; the run is another's
        raise
    except UserError as error:
        write_refusal(run, str(error))
        raise


def _train(config: TrainConfig, given: Mapping[str, Any]) -> None:
    ranks, device = ray.train.get_context(), ray.train.torch.get_device()
    if device.type == "cpu":
        torch.set_num_threads(config.threads or max(1, core_count() // ranks.get_local_world_size()))
    inputs = dataclasses.replace(load_inputs(config, NullTracker(), given["lease"]), pause_at=given["pause_at"])
    watchdog = Watchdog(config.hang_timeout_s)

    def report(metrics: Mapping[str, Any]) -> None:
        with watchdog.paused():
            ray.train.report(dict(metrics))

    context = TrainContext(
        rank=ranks.get_world_rank(),
        world_size=ranks.get_world_size(),
        device=device,
        wrap=functools.partial(ray.train.torch.prepare_model, parallel_strategy_kwargs=dict(DDP_OPTIONS)),
        all_reduce_sum=_all_reduce_sum,
        report=report,
        is_stop_requested=inputs.folder.is_stop_requested,
        heartbeat=watchdog.heartbeat,
    )
    precision, is_compiled = _arithmetic(inputs, context)
    with (
        tracked(inputs, given["run_id"], given["tracking_uri"]) as tracked_inputs,
        attempt(inputs, context, given["run_id"], given["tracking_uri"]),
        watchdog.watching(lambda: _exit_hung_worker(inputs, context)),
    ):
        loop.fit(tracked_inputs, context, precision=precision, is_compiled=is_compiled)


def _arithmetic(inputs: TrainInputs, context: TrainContext) -> tuple[str, bool]:
    """Precision, and whether to compile, as rank 0 chooses: machines may differ, and the ranks must not."""
    config, device = inputs.config, context.device
    is_compiled = hardware.resolve_compile(config, device, parameter_count(config.model), inputs.max_steps)
    precision = hardware.resolve_precision(config.precision, device)
    own = [float(hardware.PRECISIONS.index(precision)), float(is_compiled)]
    chosen = context.all_reduce_sum(torch.tensor(own if context.is_main else [0.0, 0.0], device=device)).tolist()
    return hardware.PRECISIONS[int(chosen[0])], bool(chosen[1])


def _exit_hung_worker(inputs: TrainInputs, context: TrainContext) -> None:
    """End this process in the middle of whatever it waits for, and log where: its group is started again."""
    message = f"no progress for {inputs.config.hang_timeout_s:g} s: the workers start again from the last checkpoint"
    if context.is_main:
        inputs.history.message(message)
    sys.stderr.write(message + "\n")
    with contextlib.suppress(Exception):  # it must not keep this process
        faulthandler.dump_traceback(sys.__stderr__ or 2)
    os._exit(EXIT_HUNG)


def _all_reduce_sum(values: torch.Tensor) -> torch.Tensor:
    if torch.distributed.is_initialized():
        torch.distributed.all_reduce(values)
    return values
