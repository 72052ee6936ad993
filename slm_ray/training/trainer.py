"""One rank's part of a run: the model, its optimizer, and what happens in a step, a validation and a save.

In: a `TrainInputs` and its `TrainContext`. Out: losses, and checkpoints in the run's folder. Step s sees the samples
that `batches` names, and its random numbers come from (seed, step, rank). `loop.fit` says when each of these happens.
"""

import contextlib
import dataclasses
import math
from typing import Any

import torch
from torch import Tensor, nn

from slm_ray.dataset.batches import TrainBatches
from slm_ray.generation.engine import Engine
from slm_ray.generation.sampling import SamplingParams
from slm_ray.generation.torch_backend import TorchBackend
from slm_ray.model.decoder import Decoder
from slm_ray.runs import checkpoint
from slm_ray.runs.checkpoint import Snapshot, TrainState
from slm_ray.training.checkpointing import Saver
from slm_ray.training.context import TrainContext
from slm_ray.training.evaluation import evaluate
from slm_ray.training.inputs import TrainInputs
from slm_ray.training.metrics import TrainMetrics
from slm_ray.training.optim import learning_rate, make_optimizer, restore_optimizer, set_learning_rate
from slm_ray.training.profiling import NoProfile, StepProfile

AUTOCAST = {"bf16": torch.bfloat16, "fp16": torch.float16}
DIVERGENCE_FACTOR = 3.0
"""A loss of this many times ln(vocab_size), the loss of knowing nothing, is no learning any more."""


class DivergedError(Exception):
    """The loss or its gradient ceased to be a number, or grew beyond reason; the message says which."""


class Trainer:
    """State of one run on one rank, between its first and last step."""

    def __init__(self, task: TrainInputs, around: TrainContext, precision: str, is_compiled: bool) -> None:
        self.task, self.around, self.config = task, around, task.config
        self.autocast = AUTOCAST.get(precision)
        self.scaler = torch.amp.GradScaler(around.device.type, enabled=precision == "fp16")
        self.saver = Saver()
        torch.manual_seed(self.config.seed)
        self.model = Decoder(self.config.model).to(around.device)
        self.optimizer = make_optimizer(self.model, self.config.optim, around)
        self.step = 0
        self.best: dict[str, float] = {}  # the best validation so far: its step and metrics
        self.n_stale_validations = 0  # validations since the best one
        self.saved_best: dict[str, float] = {}  # the best one on the disk; rank 0's alone
        self.losses = torch.zeros((), device=around.device)  # of this rank, since the last line of metrics
        self.loss_steps = 0
        self.restored: TrainState | None = None
        self._restore()
        module: nn.Module = torch.compile(self.model, dynamic=False) if is_compiled else self.model  # type: ignore[assignment]
        self.module = around.wrap(module)
        self.meter = TrainMetrics(self.config, around, precision)
        self.profile: StepProfile = NoProfile()
        self.batches = TrainBatches.of_stream(
            task.train,
            seq_len=self.config.model.seq_len,
            batch_size=self.config.batch_size,
            seed=self.config.seed,
            rank=around.rank,
            world_size=around.world_size,
        )

    def _restore(self) -> None:
        path = self.task.folder.latest_valid()
        if path is None:
            return
        state = checkpoint.load_state(path)
        model, _ = checkpoint.load_model(path)
        self.model.load_state_dict(model.state_dict())
        restore_optimizer(self.optimizer, checkpoint.load_optimizer(path))
        self.step, self.restored = state.step, state
        if state.data_fingerprint == self.task.data_fingerprint:  # forced onto other stories: judged anew
            self.best, self.saved_best, self.n_stale_validations = state.best, state.best, state.n_stale_validations
        if state.scaler:  # empty where the run was in another precision
            self.scaler.load_state_dict(state.scaler)
        self._restore_losses(state)

    def _restore_losses(self, state: TrainState) -> None:
        ranks = self.around.world_size
        losses = state.pending_losses
        if len(losses) != ranks:  # other workers than then: what counts is their mean
            losses = [sum(losses) / max(1, len(losses))] * ranks
        self.losses += losses[self.around.rank]
        self.loss_steps = state.pending_steps

    def train_step(self) -> tuple[Tensor, Tensor]:
        """One optimizer step. Returns the rank's mean loss (nats a token) and the global gradient norm.

        Raises:
            DivergedError: the gradient is no number; the weights are those of the step before.
        """
        config, around = self.config, self.around
        torch.manual_seed(_step_seed(config.seed, self.step, around.rank))
        set_learning_rate(self.optimizer, learning_rate(self.step, self.task.max_steps, config.optim))
        with self.meter.reading():
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
                self.scaler.scale(loss).backward()
            total += loss.detach()
        norm = self._clip()
        self.scaler.step(self.optimizer)  # type: ignore[arg-type]  # it asks for step() and param_groups alone
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        self.step += 1
        self.losses += total
        self.loss_steps += 1
        self.profile.after_step(self.step)
        around.heartbeat()
        return total, norm

    def _clip(self) -> Tensor:
        """Clip the gradients, unscaled first, and give the norm they had; it is the same on every rank."""
        self.scaler.unscale_(self.optimizer)  # type: ignore[arg-type]
        norm = nn.utils.clip_grad_norm_(self.model.parameters(), self.config.optim.clip_norm or math.inf)
        if not self.scaler.is_enabled():
            if not math.isfinite(norm):
                raise DivergedError("the gradient ceased to be a number")
        elif self.scaler.get_scale() < 1:  # a step that overflows is left out, and the scale halved
            raise DivergedError("the gradient stays out of the range of fp16")
        return norm

    def take_mean_loss(self) -> float:
        """Mean loss over the ranks and the steps since it was last asked, in nats a token; asked by every rank.

        Raises:
            DivergedError: it is no number, or far above that of a model that knows nothing.
        """
        mean = self.around.all_reduce_sum(self.losses / self.loss_steps).item() / self.around.world_size
        self.losses, self.loss_steps = torch.zeros((), device=self.around.device), 0
        self.refuse_explosion(mean)
        return mean

    def refuse_explosion(self, loss: float) -> None:
        """Raises: DivergedError when a loss is no number, or far above that of a model that knows nothing."""
        if not math.isfinite(loss):
            raise DivergedError("the loss ceased to be a number")
        if loss > (limit := DIVERGENCE_FACTOR * math.log(self.config.model.vocab_size)):
            raise DivergedError(
                f"the loss rose to {loss:.3g} nats a token, above {DIVERGENCE_FACTOR:g} x ln(vocab_size) = {limit:.3g}"
            )

    def validate(self) -> dict[str, float]:
        """Loss on the validation split."""
        with self._precision():
            return evaluate(self.model, self.task.validation, seq_len=self.config.model.seq_len, around=self.around)

    def save(self, metrics: dict[str, float]) -> None:
        """Write a checkpoint beside the coming steps, then move `latest`, and `best` where it is the best one.

        `metrics` are those of a validation at this step; without one they are empty, and the run is being stopped.
        """
        if metrics and metrics["val_loss"] < self.best.get("val_loss", math.inf):
            self.best, self.n_stale_validations = {"step": self.step, **metrics}, 0
        elif metrics:
            self.n_stale_validations += 1
        pending = self._pending_losses()
        if not self.around.is_main:
            return
        self.finish_saving()
        is_best = bool(metrics) and metrics["val_loss"] < self.saved_best.get("val_loss", math.inf)
        best = {"step": float(self.step), **metrics} if is_best else self.saved_best
        state = TrainState(
            step=self.step,
            samples_seen=self.samples_seen,
            seed=self.config.seed,
            world_size=self.around.world_size,
            data_fingerprint=self.task.data_fingerprint,
            config=dataclasses.asdict(self.config),
            metrics=metrics,
            best=best,
            n_stale_validations=self.n_stale_validations,
            run_id=self.task.tracker.run_id,
            scaler=self.scaler.state_dict(),
            pending_losses=pending,
            pending_steps=self.loss_steps,
        )
        content = checkpoint.snapshot(self.model, self.optimizer.state_dict())
        self.saver.start(lambda: self._write(content, state, is_best=is_best))

    def _write(self, content: Snapshot, state: TrainState, *, is_best: bool) -> None:
        """In the saver's thread: nothing of the trainer is read here that a step changes."""
        config, folder = self.config, self.task.folder
        checkpoint.write(folder.checkpoint_path(state.step), content, self.task.tokenizer, state)
        try:
            folder.publish(state.step, is_best=is_best, keep=config.keep_checkpoints, keep_best=config.keep_best)
        finally:
            if folder.best_step() == state.best.get("step"):  # a store may refuse what the disk has taken
                self.saved_best = state.best

    def finish_saving(self) -> OSError | None:
        """Wait for the checkpoint in flight. One that the disk refused is said in one line; the last good one stays."""
        error = self.saver.wait()
        if error is not None:
            message = f"a checkpoint could not be written ({error.strerror or error}): the one before it is kept"
            self.task.history.append({"message": message})
        return error

    @property
    def samples_seen(self) -> int:
        """Training samples up to now, at whatever batch size they were seen."""
        if self.restored is None:
            return self.step * self.config.batch_size
        return self.restored.samples_seen + (self.step - self.restored.step) * self.config.batch_size

    def _pending_losses(self) -> list[float]:
        """Every rank's sum of losses since the last line of metrics; asked by every rank."""
        sums = torch.zeros(self.around.world_size, dtype=torch.float64, device=self.around.device)
        sums[self.around.rank] = self.losses.double()
        return self.around.all_reduce_sum(sums).tolist()

    def sample(self) -> str:
        """A story by the model as it is now; the same seed each time, so that one sees what changed."""
        params = SamplingParams(max_tokens=2 * self.config.model.seq_len, temperature=0.7, top_k=50, seed=0)
        return (
            Engine(TorchBackend(self.model), self.task.tokenizer)
            .generate([self.config.sample_prompt], [params])[0]
            .text
        )

    def _precision(self) -> contextlib.AbstractContextManager[Any]:
        return torch.autocast(self.around.device.type, dtype=self.autocast, enabled=self.autocast is not None)

    def _synced_only_if(self, is_last_part: bool) -> contextlib.AbstractContextManager[Any]:
        no_sync = getattr(self.module, "no_sync", None)
        return contextlib.nullcontext() if is_last_part or no_sync is None else no_sync()


def _step_seed(seed: int, step: int, rank: int) -> int:
    """A seed of its own for every step and rank, so that dropout needs no saved state."""
    return ((seed * 1_000_003 + step) * 65_537 + rank) % 2**63
