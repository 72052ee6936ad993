"""One rank's part of a run: the model, its optimizer, and what happens in a step, a validation and a save.

In: a `Task` and its `Surroundings`. Out: losses, and checkpoints in the run's folder. Step s sees the samples that
`batches` names, and its random numbers come from (seed, step, rank). `loop.fit` says when each of these happens.
"""

import contextlib
import dataclasses
import math
from typing import Any

import torch
from torch import Tensor, nn

from slm_ray import checkpoint
from slm_ray.batches import TokenStream, TrainBatches, evaluation_batches
from slm_ray.checkpoint import TrainState
from slm_ray.engine import Engine
from slm_ray.model import IGNORED_TARGET, Decoder
from slm_ray.optim import learning_rate, make_optimizer, restore_optimizer, set_learning_rate
from slm_ray.sampling import SamplingParams
from slm_ray.task import Surroundings, Task


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


def _step_seed(seed: int, step: int, rank: int) -> int:
    """A seed of its own for every step and rank, so that dropout needs no saved state."""
    return ((seed * 1_000_003 + step) * 65_537 + rank) % 2**63
