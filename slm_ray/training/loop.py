"""The training loop: plain torch, with its surroundings given as an argument.

In: a `TrainInputs` (resolved config, token streams, folder, tracker) and `TrainContext` (rank, device, how to sum over
ranks, where to report). Out: checkpoints in the run's folder, lines in its history, metrics at the tracker. Every rank
runs `fit`; rank 0 writes. A run that is resumed from a checkpoint goes on as if nothing had happened.
"""

import time
from collections.abc import Iterator, Mapping
from typing import Any

import torch

from slm_ray.config.schema import TrainConfig
from slm_ray.errors import UserError
from slm_ray.runs.outcome import DIVERGED, FINISHED, STOPPED, UNSAVED
from slm_ray.training.context import TrainContext
from slm_ray.training.inputs import TrainInputs
from slm_ray.training.optim import learning_rate
from slm_ray.training.profiling import step_profile
from slm_ray.training.trainer import DivergedError, Trainer

LONG_INTERVAL_STEPS = 100
"""Between validations: then half a second more at one, to measure the machine again, is little."""


def fit(
    task: TrainInputs, around: TrainContext, *, precision: str = "fp32", is_compiled: bool = False
) -> dict[str, Any]:
    """Train from the run's newest whole checkpoint, or from the start, to the last step.

    Returns a summary: `status`, the last and the best validation. The status is "finished" (also when `patience`
    ended the run), "diverged" (the loss or its gradient ceased to be a number or exploded: the last good checkpoint
    is kept), "stopped" (as asked, with a checkpoint of that step), or "unsaved" (the disk refused the last
    checkpoint). Whichever way it ends, no checkpoint is left half-written by it.
    """
    trainer = Trainer(task, around, precision, is_compiled)
    _agree_on_step(trainer)
    if around.is_main:
        task.folder.path.mkdir(parents=True, exist_ok=True)
        task.folder.sweep_leftovers(trainer.step)
        task.history.rewind(trainer.step)
        task.history.append({"message": _opening(trainer, precision, is_compiled)})
        _complete_restored(trainer)
    what_mfu_is = trainer.meter.measure_peak()
    if around.is_main:
        task.history.append({"message": what_mfu_is})
    trainer.profile = step_profile(task, around, trainer.step)
    try:
        return _run(trainer)
    finally:
        trainer.profile.close()
        trainer.finish_saving()


def _run(trainer: Trainer) -> dict[str, Any]:
    metrics = dict(trainer.restored.metrics) if trainer.restored else {}
    status, reason = FINISHED, ""
    try:
        for interval in _intervals(trainer):
            if _train_interval(trainer, interval):
                status = STOPPED
                trainer.save({})
                break
            metrics = trainer.validate()
            if trainer.task.eval_interval >= LONG_INTERVAL_STEPS:
                trainer.meter.measure_peak_again()
            trainer.refuse_explosion(metrics["val_loss"])
            trainer.save(metrics)
            _report(trainer, metrics)
    except DivergedError as error:
        status, reason = DIVERGED, str(error)
    if trainer.finish_saving() is not None and status != DIVERGED:
        status = UNSAVED
    return _summary(trainer, status, metrics, reason)


def _agree_on_step(trainer: Trainer) -> None:
    """A shared disk that lags may show the ranks different checkpoints: then the group has to start again."""
    around = trainer.around
    total = around.all_reduce_sum(torch.tensor([float(trainer.step)], device=around.device)).item()
    if total != trainer.step * around.world_size:
        raise RuntimeError(f"rank {around.rank} restored step {trainer.step}, and other ranks another one")


def _complete_restored(trainer: Trainer) -> None:
    """Do what a kill between writing a checkpoint and speaking of it left undone; a second time, it changes nothing."""
    task, state = trainer.task, trainer.restored
    if state is None:
        return
    if state.data_fingerprint == task.data_fingerprint:
        trainer.saved_best = task.folder.relink(state.step, trainer.saved_best)
    if state.metrics and state.step not in task.history.series("val_loss")[0]:
        task.history.append({"step": state.step, **state.metrics})
        task.tracker.log_metrics(state.metrics, state.step)


def _intervals(trainer: Trainer) -> Iterator[int]:
    """Steps at which the run validates, the last step included, until it is out of patience.

    A run that was stopped at one of them before it had validated does so first.
    """
    task, state = trainer.task, trainer.restored
    validated = trainer.step if state is None or state.metrics else trainer.step - 1
    while validated < task.max_steps and not is_out_of_patience(task.config, trainer.n_stale_validations):
        validated = min((validated // task.eval_interval + 1) * task.eval_interval, task.max_steps)
        yield validated


def is_out_of_patience(config: TrainConfig, n_stale_validations: int) -> bool:
    """Whether so many validations without a better one are too many."""
    return 0 < config.patience <= n_stale_validations


def _train_interval(trainer: Trainer, until: int) -> bool:
    """Train up to a step; gives whether it was broken off there, as all ranks agreed."""
    task, around = trainer.task, trainer.around
    trainer.module.train()
    started, first = time.perf_counter(), trainer.step
    while trainer.step < until:
        _, norm = trainer.train_step()
        if trainer.step % task.config.log_interval_steps == 0 or trainer.step == until:
            mean = trainer.take_mean_loss()
            tokens = (trainer.step - first) * task.config.batch_size * task.config.model.seq_len
            elapsed = time.perf_counter() - started
            figures = {"train_loss": mean, "grad_norm": float(norm), "tokens_per_s": tokens / elapsed}
            _log_step(trainer, figures | trainer.meter.figures(tokens / elapsed, elapsed))
            started, first = time.perf_counter(), trainer.step
        if _is_stopped(around):
            return True
    return False


def _is_stopped(around: TrainContext) -> bool:
    """Rank 0 knows; all ranks leave after the same step."""
    wanted = float(around.is_main and around.is_stop_requested())
    return around.all_reduce_sum(torch.tensor([wanted], device=around.device)).item() > 0


def _log_step(trainer: Trainer, metrics: dict[str, float]) -> None:
    if not trainer.around.is_main:
        return
    task, config = trainer.task, trainer.config
    metrics["lr"] = learning_rate(trainer.step - 1, task.max_steps, config.optim)
    metrics["tokens"] = float(trainer.samples_seen * config.model.seq_len)
    task.history.append({"step": trainer.step, **metrics})
    task.tracker.log_metrics(metrics, trainer.step)


def _report(trainer: Trainer, metrics: dict[str, float]) -> None:
    task = trainer.task
    if trainer.around.is_main:
        line: dict[str, Any] = {"step": trainer.step, **metrics}
        task.tracker.log_metrics(metrics, trainer.step)
        if trainer.config.sample_prompt:
            line |= _sample(trainer)
        task.history.append(line)
    trainer.around.report({"step": trainer.step, **metrics})


def _sample(trainer: Trainer) -> dict[str, str]:
    """A story, also sent to the tracker; without one where the prompt cannot be continued; that is said."""
    try:
        story = trainer.sample()
    except UserError as error:
        trainer.task.history.append({"message": f"no sample of text: sample_prompt: {error}"})
        return {}
    trainer.task.tracker.log_text(story, f"samples/step-{trainer.step:08d}.txt")
    return {"sample": story}


def _summary(trainer: Trainer, status: str, metrics: Mapping[str, float], reason: str) -> dict[str, Any]:
    summary = {
        "status": status,
        "reason": reason,
        "step": trainer.step,
        "max_steps": trainer.task.max_steps,
        "metrics": dict(metrics),
        "best": trainer.saved_best,
        "run_id": trainer.task.tracker.run_id,
    }
    if trainer.around.is_main:
        trainer.task.folder.write_summary(summary)
    return summary


def _opening(trainer: Trainer, precision: str, is_compiled: bool) -> str:
    start = f"resumed at step {trainer.step:,}" if trainer.step else "training from the start"
    how = f"{precision}, {'compiled (the first steps wait for the compiler)' if is_compiled else 'eager'}"
    return f"{start}: {trainer.around.world_size} worker(s), {trainer.task.max_steps:,} steps, {how}"
