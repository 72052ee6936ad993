"""One rank's part of a run: the model, its optimizer, and what happens in a step and in a validation.

In: `TrainInputs` and a `TrainContext`. Out: losses, and a model that learns. Step s sees the samples that `batches`
names, and its random numbers come from (seed, step, rank). `loop.fit` decides when each of these happens; files are
left to `checkpointing`.
"""

import contextlib
import dataclasses
import math
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from slm_ray.config.schema import TrainConfig
from slm_ray.dataset.batches import Batch, TrainBatches
from slm_ray.generation.engine import Engine
from slm_ray.generation.sampling import SamplingParams
from slm_ray.generation.torch_backend import TorchBackend
from slm_ray.model.decoder import Decoder
from slm_ray.runs.train_state import Evaluation, TrainState
from slm_ray.training.besides.further_tokens import mtp_shares
from slm_ray.training.besides.teachers import Teachers, load_teachers, refuse_others
from slm_ray.training.besides.weight_path import WeightPath, parted
from slm_ray.training.context import TrainContext
from slm_ray.training.evaluation import EVALUATIONS
from slm_ray.training.gpu_traffic import LateReading, to_device
from slm_ray.training.inputs import TrainInputs
from slm_ray.training.metrics import TrainMetrics
from slm_ray.training.optim import learning_rate, make_optimizer, restore_optimizer, set_learning_rate
from slm_ray.training.profiling.parts import part

AUTOCAST = {"bf16": torch.bfloat16, "fp16": torch.float16}
DIVERGENCE_FACTOR = 3.0
"""A loss of this many times ln(vocab_size), the loss of knowing nothing, is no learning any more."""


def compiled(model: Decoder, device: torch.device) -> nn.Module:
    """The model with compiled steps.

    On a CPU the numbers of dropout come from torch's own kernel, so that a compiled step drops what an eager one drops:
    the compiler would draw them one by one in the midst of its vector loops, which doubled the time of a step.
    """
    drops_on_cpu = model.config.dropout > 0 and device.type == "cpu"
    options: dict[str, Any] | None = {"fallback_random": True} if drops_on_cpu else None
    return torch.compile(model, dynamic=False, options=options)  # type: ignore[return-value]


class DivergedError(Exception):
    """The loss or its gradient ceased to be a number, or grew beyond reason; the message names which."""


class Trainer:
    """The model of one rank between its first and last step."""

    def __init__(self, inputs: TrainInputs, context: TrainContext, precision: str, is_compiled: bool) -> None:
        self.inputs, self.context, self.config = inputs, context, inputs.config
        self.autocast = AUTOCAST.get(precision)
        self.scaler = torch.amp.GradScaler(context.device.type, enabled=precision == "fp16")
        torch.manual_seed(self.config.seed)
        self.model = Decoder(self.config.model).to(context.device)
        in_bf16, on_gpu = precision == "bf16", context.device.type == "cuda"
        self.optimizer = make_optimizer(
            self.model, self.config.optim, context, in_bf16=in_bf16, is_compiled=is_compiled and on_gpu
        )
        self.path = WeightPath(self.model.parameters(), self.config.optim, inputs.max_steps)
        self.step = 0
        self.samples_seen = self.tokens_seen = 0
        self.losses = torch.zeros((), device=context.device)  # of this rank, since the last line of metrics
        self.loss_steps = 0
        self._norms = LateReading(on_gpu)
        module: nn.Module = compiled(self.model, context.device) if is_compiled else self.model
        self.module = context.wrap(module)
        self.teachers = load_teachers(self.config, inputs.tokenizer, context.device)
        self.metrics = TrainMetrics(self.config, context, precision)
        self.batches = TrainBatches(
            samples=inputs.samples(),
            batch_size=self.config.batch_size,
            rank=context.rank,
            world_size=context.world_size,
        )

    def restore(self, state: TrainState, weights: Mapping[str, Tensor], optimizer: dict[str, Any]) -> None:
        """Continue where a checkpoint was written, by however many workers.

        Raises:
            UserError: the optimizer's state is that of another optimizer or model, or a teacher has other weights.
        """
        if self.teachers is not None:
            refuse_others(self.teachers.origins, [one.weights_sha256 for one in state.teachers], self.config.teacher)
        self.model.load_state_dict(weights)
        of_optimizer, of_path = parted(optimizer)
        restore_optimizer(self.optimizer, of_optimizer)
        self.path.load_state_dict(of_path, state.step)
        if state.scaler:  # empty where the run was in another precision
            self.scaler.load_state_dict(state.scaler)
        self.step, self.samples_seen, self.loss_steps = state.step, state.samples_seen, state.pending_steps
        full = state.samples_seen * self.config.model.seq_len
        self.tokens_seen = full if state.tokens_seen is None else state.tokens_seen
        self.losses += _own_loss(state.pending_losses, self.context)

    def train_step(self) -> tuple[Tensor, Tensor]:
        """One optimizer step. Returns the rank's mean loss (nats a token) and the global gradient norm.

        Raises:
            DivergedError: the gradient is no number; the weights are those of the step before. On a GPU it is noticed
                at the next step, or by `refuse_bad_gradient`, and the weights are no numbers either.
        """
        config, context = self.config, self.context
        torch.manual_seed(_step_seed(config.seed, self.step, context.rank))
        set_learning_rate(self.optimizer, learning_rate(self.step, self.inputs.max_steps, config.optim))
        with part("data"), self.metrics.timing_data():
            batch = self.batches.at(self.step)
        n_targets = batch.n_targets / context.world_size  # the gradients' mean over ranks is that over all targets
        further = mtp_shares(self.step, self.inputs.max_steps, config, context.device)
        total: Tensor | None = None
        for is_last_part, tensors in _parts(batch, config, context.device):
            with _synced_only_if(is_last_part, self.module):
                with part("forward"), self._precision():
                    objective, loss = _summed_loss(self.module, self.teachers, further, *tensors) / n_targets
                with part("backward"):
                    self.scaler.scale(objective).backward()
            total = loss.detach() if total is None else total + loss.detach()
        assert total is not None
        with part("clipping"):
            norm = self._clip()
        self.path.before()
        self.scaler.step(self.optimizer)  # type: ignore[arg-type]  # it asks for step() and param_groups alone
        self.scaler.update()
        self.path.after(self.step)
        self.optimizer.zero_grad(set_to_none=True)
        self.step += 1
        self.samples_seen += config.batch_size
        self.tokens_seen += batch.n_targets
        self.losses += total
        self.loss_steps += 1
        context.heartbeat()
        return total, norm

    def _clip(self) -> Tensor:
        """Clip the gradients, unscaled first, and return the norm they had; it is the same on every rank."""
        self.scaler.unscale_(self.optimizer)  # type: ignore[arg-type]
        norm = nn.utils.clip_grad_norm_(self.model.parameters(), self.config.optim.clip_norm or math.inf)
        if not self.scaler.is_enabled():
            _refuse_gradient(self._norms.next(norm))
        elif self.scaler.get_scale() < 1:  # a step that overflows is left out, and the scale halved
            raise DivergedError("the gradient stays out of the range of fp16")
        return norm

    def refuse_bad_gradient(self) -> None:
        """Raises: DivergedError when the last step's gradient was no number; asked before anything is saved."""
        _refuse_gradient(self._norms.last())

    def take_mean_loss(self) -> float:
        """Mean loss over the ranks and the steps since it was last asked, in nats a token; asked by every rank.

        Raises:
            DivergedError: it is no number, or far above that of a model that knows nothing, or the gradient is none.
        """
        self.refuse_bad_gradient()
        mean = self.context.all_reduce_sum(self.losses / self.loss_steps).item() / self.context.world_size
        self.losses, self.loss_steps = torch.zeros((), device=self.context.device), 0
        self.refuse_divergence(mean)
        return mean

    def pending_losses(self) -> list[float]:
        """Every rank's sum of losses since the last line of metrics; asked by every rank."""
        sums = torch.zeros(self.context.world_size, dtype=torch.float64, device=self.context.device)
        sums[self.context.rank] = self.losses.double()
        return self.context.all_reduce_sum(sums).tolist()

    def refuse_divergence(self, loss: float) -> None:
        """Raises: DivergedError when a loss is no number, or far above that of a model that knows nothing."""
        if not math.isfinite(loss):
            raise DivergedError("the loss ceased to be a number")
        if loss > (limit := DIVERGENCE_FACTOR * math.log(self.config.model.vocab_size)):
            raise DivergedError(
                f"the loss rose to {loss:.3g} nats a token, above {DIVERGENCE_FACTOR:g} x ln(vocab_size) = {limit:.3g}"
            )

    def validate(self) -> Evaluation:
        """Loss on the validation split, by the measure that the config names."""
        measure, seq_len = EVALUATIONS[self.config.validation], self.config.model.seq_len
        with self._precision():
            found = measure(self.model, self.inputs.validation, seq_len=seq_len, context=self.context)
        return dataclasses.replace(found, step=self.step)

    def sample(self) -> str:
        """A story by the model as it is now; the same seed each time, so that one sees what changed.

        Raises:
            UserError: the prompt cannot be continued.
        """
        params = SamplingParams(max_tokens=2 * self.config.model.seq_len, temperature=0.7, top_k=50, seed=0)
        engine = Engine(TorchBackend(self.model), self.inputs.tokenizer)
        return engine.generate([self.config.sample_prompt], [params])[0].text

    def _precision(self) -> contextlib.AbstractContextManager[Any]:
        return torch.autocast(self.context.device.type, dtype=self.autocast, enabled=self.autocast is not None)


def _own_loss(losses: list[float], context: TrainContext) -> float:
    """This rank's of the ranks' losses; of other ranks than now, what counts is their mean."""
    return losses[context.rank] if len(losses) == context.world_size else sum(losses) / max(1, len(losses))


def _parts(batch: Batch, config: TrainConfig, device: torch.device) -> Iterator[tuple[bool, list[Tensor]]]:
    """The parts of a rank's batch, in which it is computed one after another, and whether each is the last.

    A part: inputs, targets and, where attention keeps to a story, places, each (rows, seq_len).
    """
    columns = [batch.inputs, batch.targets]
    if config.attention == "story" and batch.places is not None:
        columns.append(batch.places)
    rows = len(batch.inputs) // config.accumulation_steps
    for number in range(config.accumulation_steps):
        own = slice(number * rows, (number + 1) * rows)
        yield number == config.accumulation_steps - 1, [to_device(column[own], device) for column in columns]


def _synced_only_if(is_last_part: bool, module: nn.Module) -> contextlib.AbstractContextManager[Any]:
    no_sync = getattr(module, "no_sync", None)
    return contextlib.nullcontext() if is_last_part or no_sync is None else no_sync()


def _summed_loss(
    module: nn.Module,
    teachers: Teachers | None,
    further: Tensor | None,
    x: Tensor,
    y: Tensor,
    places: Tensor | None = None,
) -> Tensor:
    """Of a part of a batch, in nats, (2,): what is to become less, and the loss that is told, without further tokens.

    x, y, places: (rows, seq_len), as the model takes them.
    """
    if teachers is not None:
        return teachers.loss(module(x, None, places), x, y, places, further)
    loss: Tensor = module(x, y, places) if further is None else module(x, y, places, further)
    return loss.expand(2) if further is None else loss


def _refuse_gradient(norm: float | None) -> None:
    if norm is not None and not math.isfinite(norm):
        raise DivergedError("the gradient ceased to be a number")


def _step_seed(seed: int, step: int, rank: int) -> int:
    """A seed of its own for every step and rank, so that dropout needs no saved state."""
    return ((seed * 1_000_003 + step) * 65_537 + rank) % 2**63
