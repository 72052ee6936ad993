"""The training loop: plain torch, with what it knows of the other ranks as an argument.

In: `TrainInputs` (resolved config, token streams, folder, tracker) and a `TrainContext` (rank, device, how to sum over
ranks, where to report). Out: checkpoints in the run's folder, lines in its history, metrics at the tracker. Every rank
runs `fit`; rank 0 writes. A run that is resumed from a checkpoint continues as if nothing had happened.
"""

import dataclasses
import time
from collections.abc import Iterator

import numpy as np
import torch

from slm_ray.errors import UserError
from slm_ray.runs.checkpoint import Checkpoint
from slm_ray.runs.outcome import RunStatus, RunSummary, write_summary
from slm_ray.runs.run_folder import refuse_corrupt
from slm_ray.runs.train_state import Evaluation
from slm_ray.training.checkpointing import Checkpointer, is_out_of_patience
from slm_ray.training.context import TrainContext
from slm_ray.training.gpu_traffic import LateReading, to_device
from slm_ray.training.inputs import TrainInputs
from slm_ray.training.optim import learning_rate
from slm_ray.training.profiling.recording import StepProfile, step_profile
from slm_ray.training.run_log import MainRunLog, RunLog
from slm_ray.training.trainer import DivergedError, Trainer

LONG_INTERVAL_STEPS = 100
"""Between validations: then half a second more at one, to measure the machine again, is little."""


@dataclasses.dataclass(frozen=True)
class Run:
    """What `fit` works with."""

    trainer: Trainer
    checkpointer: Checkpointer
    log: RunLog
    profile: StepProfile


def fit(
    inputs: TrainInputs, context: TrainContext, *, precision: str = "fp32", is_compiled: bool = False
) -> RunSummary:
    """Train from the run's latest valid checkpoint, or from the start, to the last step.

    Returns how the run ended, which rank 0 leaves in its folder too. Whichever way it ends, no checkpoint is left
    half-written by it, and the last good one is kept.
    """
    trainer = Trainer(inputs, context, precision, is_compiled)
    log = MainRunLog(inputs.history, inputs.tracker) if context.is_main else RunLog()
    checkpointer = Checkpointer(trainer, log)
    latest = inputs.folder.latest_valid()
    if latest is None:
        refuse_corrupt(inputs.folder)
    checkpointer.restore(latest)
    _agree_on_step(trainer, context)
    if context.is_main:
        checkpointer.tidy_up()
    log.rewind(trainer.step)
    log.message(_opening(trainer, precision, is_compiled, checkpointer.restored))
    for text in (*inputs.notes, trainer.batches.samples.describe()):
        log.message(text)
    if checkpointer.restored is not None and (evaluation := checkpointer.restored.state.metrics):
        log.repeat(evaluation)
    log.message(trainer.metrics.measure_peak())
    profile = step_profile(inputs, context, trainer.step, trainer.metrics)
    try:
        return _run(Run(trainer, checkpointer, log, profile))
    finally:
        profile.close()
        checkpointer.finish_write()


def _agree_on_step(trainer: Trainer, context: TrainContext) -> None:
    """A shared disk that lags may show the ranks different checkpoints: then the group has to start again."""
    total = context.all_reduce_sum(torch.tensor([float(trainer.step)], device=context.device)).item()
    if total != trainer.step * context.world_size:
        raise RuntimeError(f"rank {context.rank} restored step {trainer.step}, and other ranks another one")


def _run(run: Run) -> RunSummary:
    trainer, checkpointer = run.trainer, run.checkpointer
    evaluation = checkpointer.restored.state.metrics if checkpointer.restored else None
    status, reason = RunStatus.FINISHED, ""
    try:
        for interval in _intervals(run):
            if _train_interval(run, interval):
                status = RunStatus.STOPPED
                checkpointer.save(None)
                break
            evaluation = trainer.validate()
            if trainer.inputs.eval_interval >= LONG_INTERVAL_STEPS:
                trainer.metrics.measure_peak_again()
            trainer.refuse_divergence(evaluation.val_loss)
            checkpointer.save(evaluation)
            _report(run, evaluation)
        if trainer.step < trainer.inputs.max_steps and trainer.step == trainer.inputs.pause_at:
            status = RunStatus.STOPPED
    except DivergedError as error:
        status, reason = RunStatus.DIVERGED, str(error)
    if checkpointer.wait_together() is not None and status != RunStatus.DIVERGED:
        status = RunStatus.UNSAVED
    if status == RunStatus.FINISHED and trainer.step < trainer.inputs.max_steps and trainer.config.optim.tail_average:
        run.log.message(
            "ended early, by patience: the mean of the last weights (optim.tail_average) was not blended in"
        )
    return _conclude(run, status, reason, evaluation)


def _intervals(run: Run) -> Iterator[int]:
    """Steps at which the run validates, the last step included, until it is out of patience.

    A run that was stopped at one of them before it had validated does so first.
    """
    inputs, checkpointer = run.trainer.inputs, run.checkpointer
    restored = checkpointer.restored
    is_validated = restored is None or restored.state.metrics is not None
    validated = run.trainer.step if is_validated else run.trainer.step - 1
    while validated < inputs.last_step and not is_out_of_patience(inputs.config, checkpointer.n_stale_validations):
        validated = min((validated // inputs.eval_interval + 1) * inputs.eval_interval, inputs.last_step)
        yield validated


def _train_interval(run: Run, until: int) -> bool:
    """Train up to a step; returns whether it was broken off there, as all ranks agreed."""
    trainer, config = run.trainer, run.trainer.config
    stops = LateReading(trainer.context.device.type == "cuda")
    trainer.module.train()
    started, first = time.perf_counter(), trainer.tokens_seen
    while trainer.step < until:
        _, norm = trainer.train_step()
        run.profile.after_step(trainer.step)
        if trainer.step % config.log_interval_steps == 0 or trainer.step == until:
            mean, elapsed = trainer.take_mean_loss(), time.perf_counter() - started
            tokens_per_s = (trainer.tokens_seen - first) / elapsed
            figures = {"train_loss": mean, "grad_norm": float(norm), "tokens_per_s": tokens_per_s}
            figures |= trainer.metrics.figures(tokens_per_s, elapsed)
            figures["lr"] = learning_rate(trainer.step - 1, trainer.inputs.max_steps, config.optim)
            figures["tokens"] = float(trainer.tokens_seen)
            run.log.step(trainer.step, figures)
            started, first = time.perf_counter(), trainer.tokens_seen
        if _is_stopped(trainer.context, stops):
            break
    else:
        if not stops.last():  # the word that came with the last step
            return False
    trainer.refuse_bad_gradient()
    return True


def _is_stopped(context: TrainContext, stops: LateReading) -> bool:
    """Rank 0 knows; all ranks leave after the same step, several on GPUs after the next one."""
    wanted = context.is_main and context.is_stop_requested()
    if context.world_size == 1:
        return wanted
    return bool(stops.next(context.all_reduce_sum(to_device(np.array([wanted], np.float32), context.device))))


def _report(run: Run, evaluation: Evaluation) -> None:
    """Log the evaluation, with a story where one is wanted, and report it: a barrier."""
    trainer, sample = run.trainer, None
    if trainer.context.is_main and trainer.config.sample_prompt:
        try:
            sample = trainer.sample()
        except UserError as error:
            run.log.message(f"step {evaluation.step:,}: no sample of text: sample_prompt: {error}")
    run.log.evaluation(evaluation, sample)
    trainer.context.report({"step": evaluation.step, **evaluation.metrics})


def _conclude(run: Run, status: RunStatus, reason: str, evaluation: Evaluation | None) -> RunSummary:
    trainer = run.trainer
    summary = RunSummary(
        status=status,
        reason=reason,
        step=trainer.step,
        max_steps=trainer.inputs.max_steps,
        metrics=evaluation,
        best=run.checkpointer.saved_best,
        run_id=trainer.inputs.tracker.run_id,
    )
    if trainer.context.is_main:
        write_summary(trainer.inputs.folder, summary)
    return summary


def _opening(trainer: Trainer, precision: str, is_compiled: bool, restored: Checkpoint | None) -> str:
    start = f"resumed at step {trainer.step:,}" if trainer.step else "training from the start"
    if not trainer.step and restored is not None and (origin := restored.state.origin):
        start = "; ".join([f"training from the weights of {origin.reference}", *origin.changes])
    how = f"{precision}, {'compiled (the first steps wait for the compiler)' if is_compiled else 'eager'}"
    workers = f"{trainer.context.world_size} worker(s)"
    return f"{start}: {workers}, {trainer.inputs.max_steps:,} steps, {how}"
