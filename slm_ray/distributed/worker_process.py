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
from collections.abc import Callable, Mapping
from typing import Any

import ray
import torch
from torch import nn

from slm_ray.config.files import from_dict
from slm_ray.config.schema import TrainConfig
from slm_ray.distributed.place import Place, place_alone, place_in_train
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
from slm_ray.training.metrics import forget_peaks

EXIT_HUNG = 75


Report = Callable[[Mapping[str, Any]], None]
"""Is told what each validation found."""


def run_worker(given: dict[str, Any]) -> None:
    """What each worker process of Ray Train runs."""
    wrap = functools.partial(ray.train.torch.prepare_model, parallel_strategy_kwargs=dict(DDP_OPTIONS))
    _run(given, place_in_train(), lambda metrics: ray.train.report(dict(metrics)), wrap=wrap)


def run_here(given: dict[str, Any], report: Report, still_ours: Callable[[], None]) -> None:
    """The same in this process, as the run's one worker. Other runs may have been here before.

    `still_ours` is called after every piece of work, and raises where the run has become another driver's.
    """
    torch.compiler.reset()  # what was compiled for other runs would count against the compiler's limit
    place = place_alone()
    forget_peaks(place.device)
    hardware.keep_memory(int(given["config"]["threads"]) or core_count())
    _run(given, place, report, still_ours=still_ours)


def _run(
    given: Mapping[str, Any],
    place: Place,
    report: Report,
    *,
    wrap: Callable[[nn.Module], nn.Module] = lambda module: module,
    still_ours: Callable[[], None] = lambda: None,
) -> None:
    """Train, from the latest checkpoint on.

    A mistake of the user's is left in the run's folder, and the workers that Ray starts in place of these see it and
    leave: it is not tried again `max_failures` times.
    """
    config = from_dict(TrainConfig, given["config"], "the driver's config")
    run = open_run(config.output, config.name, given["lease"])
    run.check_lease()
    if has_refusal(run):
        return
    watchdog = Watchdog(config.hang_timeout_s)

    def heartbeat() -> None:
        watchdog.heartbeat()
        still_ours()

    def report_unwatched(metrics: Mapping[str, Any]) -> None:
        with watchdog.paused():
            report(metrics)

    context = TrainContext(
        rank=place.rank,
        world_size=place.world_size,
        device=place.device,
        wrap=wrap,
        all_reduce_sum=_all_reduce_sum,
        report=report_unwatched,
        is_stop_requested=run.is_stop_requested,
        heartbeat=heartbeat,
    )
    try:
        _train(config, given, place, context, watchdog)
    except (UnreadableCheckpointError, LeaseLostError):  # the disk may give it at the next try; the run is another's
        raise
    except UserError as error:
        write_refusal(run, str(error))
        raise


def _train(
    config: TrainConfig, given: Mapping[str, Any], place: Place, context: TrainContext, watchdog: Watchdog
) -> None:
    if place.device.type == "cpu":
        torch.set_num_threads(config.threads or max(1, core_count() // place.local_world_size))
    inputs = dataclasses.replace(load_inputs(config, NullTracker(), given["lease"]), pause_at=given["pause_at"])
    precision, is_compiled = _arithmetic(inputs, context)
    with (
        tracked(inputs, place, given["run_id"], given["tracking_uri"]) as tracked_inputs,
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
