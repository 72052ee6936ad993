"""The training loop: plain torch, with its surroundings given as an argument.

In: a `Task` (resolved config, token streams, folder, tracker) and `Surroundings` (rank, device, how to sum over ranks,
where to report). Out: checkpoints in the run's folder, lines in its history, metrics at the tracker. Every rank runs
`fit`; rank 0 writes. A run that is resumed from a checkpoint goes on as if nothing had happened.
"""

import math
import time
from collections.abc import Iterator, Mapping
from typing import Any

import torch

from slm_ray.optim import learning_rate
from slm_ray.task import Surroundings, Task
from slm_ray.trainer import Trainer

DIVERGED = "diverged"


def fit(task: Task, around: Surroundings, *, precision: str = "fp32", is_compiled: bool = False) -> dict[str, Any]:
    """Train from the run's newest whole checkpoint, or from the start, to the last step.

    Returns a summary: `status` ("finished", or "diverged" when the loss ceased to be a number: the last good
    checkpoint is kept), the last and the best validation.
    """
    trainer = Trainer(task, around, precision, is_compiled)
    if around.is_chief:
        task.folder.path.mkdir(parents=True, exist_ok=True)
        task.folder.sweep_leftovers()
        task.history.rewind(trainer.step)
        task.history.append({"message": _opening(trainer, precision, is_compiled)})
    _agree_on_step(trainer)
    _complete_restored(trainer)
    metrics = dict(trainer.restored.metrics) if trainer.restored else {}
    for interval in _intervals(trainer):
        _train_interval(trainer, interval)
        metrics = trainer.validate()
        if not math.isfinite(metrics["val_loss"]):
            return _summary(trainer, DIVERGED, metrics)
        trainer.save(metrics)
        _report(trainer, metrics)
    return _summary(trainer, "finished", metrics)


def _agree_on_step(trainer: Trainer) -> None:
    """A shared disk that lags may show the ranks different checkpoints: then the group has to start again."""
    around = trainer.around
    total = around.all_sum(torch.tensor([float(trainer.step)], device=around.device)).item()
    if total != trainer.step * around.world_size:
        raise RuntimeError(f"rank {around.rank} restored step {trainer.step}, and other ranks another one")


def _complete_restored(trainer: Trainer) -> None:
    """Do what a kill between writing a checkpoint and speaking of it left undone; a second time, it changes nothing."""
    task, state = trainer.task, trainer.restored
    if state is None or not trainer.around.is_chief:
        return
    trainer.best = task.folder.relink(state.step, trainer.best)
    if state.step not in task.history.series("val_loss")[0]:
        task.history.append({"step": state.step, **state.metrics})
        task.tracker.log_metrics(state.metrics, state.step)


def _intervals(trainer: Trainer) -> Iterator[int]:
    """Steps at which the run validates, after `trainer.step`, the last step included."""
    task = trainer.task
    while trainer.step < task.max_steps:
        yield min((trainer.step // task.eval_interval + 1) * task.eval_interval, task.max_steps)


def _train_interval(trainer: Trainer, until: int) -> None:
    task, around = trainer.task, trainer.around
    trainer.module.train()
    started, first = time.perf_counter(), trainer.step
    losses = torch.zeros((), device=around.device)
    while trainer.step < until:
        loss, norm = trainer.train_step()
        losses += loss
        if trainer.step % task.config.log_interval_steps == 0 or trainer.step == until:
            steps = trainer.step - first
            mean = around.all_sum(losses / steps).item() / around.world_size
            tokens = steps * task.config.batch_size * task.config.model.seq_len
            speed = tokens / (time.perf_counter() - started)
            _log_step(trainer, {"train_loss": mean, "grad_norm": float(norm), "tokens_per_s": speed})
            if not math.isfinite(mean):
                return
            started, first, losses = time.perf_counter(), trainer.step, torch.zeros((), device=around.device)


def _log_step(trainer: Trainer, metrics: dict[str, float]) -> None:
    if not trainer.around.is_chief:
        return
    task, config = trainer.task, trainer.config
    metrics["lr"] = learning_rate(trainer.step - 1, task.max_steps, config.optim)
    metrics["tokens"] = float(trainer.step * config.batch_size * config.model.seq_len)
    task.history.append({"step": trainer.step, **metrics})
    task.tracker.log_metrics(metrics, trainer.step)


def _report(trainer: Trainer, metrics: dict[str, float]) -> None:
    task = trainer.task
    if trainer.around.is_chief:
        line: dict[str, Any] = {"step": trainer.step, **metrics}
        task.tracker.log_metrics(metrics, trainer.step)
        if trainer.config.sample_prompt:
            line["sample"] = trainer.sample()
            task.tracker.log_text(line["sample"], f"samples/step-{trainer.step:08d}.txt")
        task.history.append(line)
    trainer.around.report({"step": trainer.step, **metrics})


def _summary(trainer: Trainer, status: str, metrics: Mapping[str, float]) -> dict[str, Any]:
    summary = {
        "status": status,
        "step": trainer.step,
        "max_steps": trainer.task.max_steps,
        "metrics": dict(metrics),
        "best": trainer.best,
        "run_id": trainer.task.tracker.run_id,
    }
    if trainer.around.is_chief:
        trainer.task.folder.write_summary(summary)
    return summary


def _opening(trainer: Trainer, precision: str, is_compiled: bool) -> str:
    start = f"resumed at step {trainer.step:,}" if trainer.step else "training from the start"
    how = f"{precision}, {'compiled (the first steps wait for the compiler)' if is_compiled else 'eager'}"
    return f"{start}: {trainer.around.world_size} worker(s), {trainer.task.max_steps:,} steps, {how}"
