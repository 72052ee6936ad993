"""The training loop: plain torch, with its surroundings given as an argument.

In: a resolved `TrainConfig`, the token streams, and `Surroundings` (rank, device, how to sum over ranks, where to
report). Out: checkpoints in the run's folder, lines in its history, metrics at the tracker. Every rank runs `fit`;
rank 0 writes. Step s sees the samples that `batches` names, and its random numbers come from (seed, step, rank), so a
run that is resumed from a checkpoint goes on as if nothing had happened.
"""

import contextlib
import dataclasses
import logging
import math
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from slm_ray import checkpoint
from slm_ray.batches import TokenStream, TrainBatches, evaluation_batches
from slm_ray.checkpoint import TrainState
from slm_ray.config import TrainConfig
from slm_ray.engine import Engine
from slm_ray.history import History
from slm_ray.model import IGNORED_TARGET, Decoder
from slm_ray.optim import learning_rate, make_optimizer, restore_optimizer, set_learning_rate
from slm_ray.run_folder import RunFolder
from slm_ray.sampling import SamplingParams
from slm_ray.tokenizer import Tokenizer
from slm_ray.tracking import Tracker

LOGGER = logging.getLogger(__name__)
DIVERGED = "diverged"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Surroundings:
    """What the loop needs to know of the world. The defaults are one process alone."""

    rank: int = 0
    world_size: int = 1
    device: torch.device = dataclasses.field(default_factory=lambda: torch.device("cpu"))
    wrap: Callable[[nn.Module], nn.Module] = lambda module: module
    """Makes the gradients of all ranks one (DDP)."""
    all_sum: Callable[[Tensor], Tensor] = lambda values: values
    """Sums a tensor over the ranks."""
    report: Callable[[Mapping[str, Any]], None] = lambda _metrics: None
    """Called by every rank after each validation; a barrier."""

    @property
    def is_chief(self) -> bool:
        """Rank 0 writes and speaks."""
        return self.rank == 0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Task:
    """One run's input: all that `fit` works on."""

    config: TrainConfig
    max_steps: int
    data_fingerprint: str
    train: TokenStream
    validation: TokenStream
    tokenizer: Tokenizer
    folder: RunFolder
    tracker: Tracker

    @property
    def history(self) -> History:
        """The run's own record."""
        return History(self.folder.path / "metrics.jsonl")

    @property
    def eval_interval(self) -> int:
        """Steps between validations, resolved."""
        return self.config.eval_interval_steps or min(500, -(-self.max_steps // 8))


def evaluate(model: nn.Module, stream: TokenStream, *, seq_len: int, around: Surroundings) -> dict[str, float]:
    """Loss of a model over a stream, each target once, in the caller's autocast and summed over the ranks.

    Windows of seq_len targets do not overlap. Returns `val_loss` in nats per token, `val_perplexity`, and
    `val_bits_per_byte`: nats / ln 2 / UTF-8 bytes of the stories.
    """
    sums = torch.zeros(2, dtype=torch.float64, device=around.device)
    windows = evaluation_batches(stream, seq_len=seq_len, batch_size=32, rank=around.rank, world_size=around.world_size)
    was_training = model.training
    model.eval()
    with torch.no_grad():
        for inputs, targets in windows:
            x, y = torch.from_numpy(inputs).to(around.device), torch.from_numpy(targets).to(around.device)
            sums += torch.stack([model(x, y).double(), (y != IGNORED_TARGET).sum().double()])
    model.train(was_training)
    nats, tokens = around.all_sum(sums).tolist()
    loss = nats / tokens
    return {
        "val_loss": loss,
        "val_perplexity": math.exp(min(loss, 700.0)),
        "val_bits_per_byte": nats / math.log(2) / stream.n_bytes,
    }


class Trainer:
    """State of one run on one rank, between its first and last step."""

    def __init__(self, task: Task, around: Surroundings, precision: str, is_compiled: bool) -> None:
        self.task, self.around, self.config = task, around, task.config
        self.autocast = precision == "bf16"
        torch.manual_seed(self.config.seed)
        self.model = Decoder(self.config.model).to(around.device)
        self.optimizer = make_optimizer(self.model, self.config.optim)
        self.step = 0
        self.best: dict[str, float] = {}
        self.restored: TrainState | None = None
        self._restore()
        module: nn.Module = torch.compile(self.model, dynamic=False) if is_compiled else self.model  # type: ignore[assignment]
        self.module = around.wrap(module)
        self.batches = TrainBatches.of_stream(
            task.train,
            seq_len=self.config.model.seq_len,
            batch_size=self.config.batch_size,
            seed=self.config.seed,
            rank=around.rank,
            world_size=around.world_size,
        )

    def _restore(self) -> None:
        path = self.task.folder.newest_whole()
        if path is None:
            return
        state = checkpoint.load_state(path)
        model, _ = checkpoint.load_model(path)
        self.model.load_state_dict(model.state_dict())
        restore_optimizer(self.optimizer, checkpoint.load_optimizer(path))
        self.step, self.best, self.restored = state.step, state.best, state

    def train_step(self) -> tuple[Tensor, Tensor]:
        """One optimizer step. Returns the rank's mean loss (nats a token) and the global gradient norm."""
        config, around = self.config, self.around
        torch.manual_seed(_step_seed(config.seed, self.step, around.rank))
        set_learning_rate(self.optimizer, learning_rate(self.step, self.task.max_steps, config.optim))
        inputs, targets = self.batches.at(self.step)
        parts = range(config.accumulation_steps)
        rows = len(inputs) // len(parts)
        total = torch.zeros((), device=around.device)
        for part in parts:
            x = torch.from_numpy(inputs[part * rows : (part + 1) * rows]).to(around.device)  # (rows, seq_len)
            y = torch.from_numpy(targets[part * rows : (part + 1) * rows]).to(around.device)
            with self._synced_only_if(part == parts[-1]):
                with self._precision():
                    loss = self.module(x, y) / targets.size
                loss.backward()
            total += loss.detach()
        limit = config.optim.clip_norm or math.inf
        norm = nn.utils.clip_grad_norm_(self.model.parameters(), limit)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.step += 1
        return total, norm

    def validate(self) -> dict[str, float]:
        """Loss on the validation split."""
        with self._precision():
            return evaluate(self.model, self.task.validation, seq_len=self.config.model.seq_len, around=self.around)

    def save(self, metrics: dict[str, float]) -> None:
        """Write a checkpoint and move `latest`, and `best` where this is the lowest validation loss."""
        config, folder = self.config, self.task.folder
        is_best = metrics["val_loss"] < self.best.get("val_loss", math.inf)
        if is_best:
            self.best = {"step": self.step, **metrics}
        if not self.around.is_chief:
            return
        state = TrainState(
            step=self.step,
            samples_seen=self.step * config.batch_size,
            seed=config.seed,
            world_size=self.around.world_size,
            data_fingerprint=self.task.data_fingerprint,
            config=dataclasses.asdict(config),
            metrics=metrics,
            best=self.best,
            run_id=self.task.tracker.run_id,
        )
        path = folder.checkpoint_path(self.step)
        checkpoint.save(path, self.model, self.task.tokenizer, state, self.optimizer.state_dict())
        folder.publish(self.step, is_best=is_best, keep=config.keep_checkpoints)

    def sample(self) -> str:
        """A story by the model as it is now; the same seed each time, so that one sees what changed."""
        params = SamplingParams(max_tokens=2 * self.config.model.seq_len, temperature=0.7, top_k=50, seed=0)
        return Engine(self.model, self.task.tokenizer).generate([self.config.sample_prompt], [params])[0].text

    def _precision(self) -> contextlib.AbstractContextManager[Any]:
        return torch.autocast(self.around.device.type, dtype=torch.bfloat16, enabled=self.autocast)

    def _synced_only_if(self, is_last_part: bool) -> contextlib.AbstractContextManager[Any]:
        no_sync = getattr(self.module, "no_sync", None)
        return contextlib.nullcontext() if is_last_part or no_sync is None else no_sync()


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


def _step_seed(seed: int, step: int, rank: int) -> int:
    """A seed of its own for every step and rank, so that dropout needs no saved state."""
    return ((seed * 1_000_003 + step) * 65_537 + rank) % 2**63
