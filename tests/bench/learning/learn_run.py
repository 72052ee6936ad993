"""One try of the bench of learning: trained step by step, on a GPU as a CUDA graph that is replayed; then measured.

In: the config of a try and its extras. Out: `Run`, with figures at its end. All batches of the run lie on the device
before it begins, and all that changes from step to step is a table there: so a step on a GPU needs nothing of Python,
and several runs of one process go through its streams at once.
"""

import contextlib
import dataclasses
import math
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from learn_extras import Extras, Rates
from learn_stories import written
from learn_tries import MAX_PARAMETERS
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from slm_ray.config.schema import TrainConfig
from slm_ray.dataset.manifest import load_manifest
from slm_ray.errors import UserError
from slm_ray.evaluation.losses import measure_stories
from slm_ray.evaluation.scoring import Scorer
from slm_ray.evaluation.stories import read_stories
from slm_ray.model.decoder import parameter_count
from slm_ray.tracking.tracker import NullTracker
from slm_ray.training.context import TrainContext
from slm_ray.training.evaluation import evaluate_windows
from slm_ray.training.hardware import resolve_compile
from slm_ray.training.inputs import load_inputs
from slm_ray.training.preflight import resolve
from slm_ray.training.trainer import AUTOCAST, Trainer

WARM_STEPS = 3
"""Made one by one before the graph is captured: the optimizer's state has to be there."""
LOST = 12.0
"""Nats a token, in place of no number."""


class Run:
    """A try in training."""

    def __init__(
        self, name: str, config: TrainConfig, extras: Mapping[str, Any], *, device: torch.device, precision: str
    ) -> None:
        config = resolve(
            dataclasses.replace(config, output=str(Path(tempfile.gettempdir()) / "slm-ray-bench")), lambda _: 1
        )
        self.name, self.config, self.device, self.began = name, config, device, time.perf_counter()
        inputs = load_inputs(config, NullTracker())
        n_parameters = parameter_count(config.model)
        if n_parameters > MAX_PARAMETERS:
            raise UserError(f"{n_parameters:,} parameters, and at most {MAX_PARAMETERS:,.0f} are allowed")
        is_compiled = device.type == "cpu" and resolve_compile(config, device, n_parameters, inputs.max_steps)
        self.trainer = Trainer(inputs, TrainContext(device=device), precision, is_compiled)
        self.autocast = AUTOCAST.get(precision)
        self.max_steps, self.n_parameters = inputs.max_steps, n_parameters
        self.optimizer = Extras(self.trainer, extras)
        self.extras = extras
        self.step, self.captured_until, self.trouble = 0, 0, ""
        self.graph: torch.cuda.CUDAGraph | None = None
        self.last_loss = torch.zeros((), device=device)
        self.stream = torch.cuda.Stream() if device.type == "cuda" else None
        if self.stream is not None:
            self._prepare()

    # --- on a GPU ---

    def _prepare(self) -> None:
        """Bring everything onto the device, make the first steps, and capture the others."""
        steps = [self._arrays(step) for step in range(self.max_steps)]
        self.columns = [
            torch.from_numpy(np.stack(column)).to(self.device) for column in zip(*[arrays for arrays, _ in steps])
        ]  # inputs, targets and, where stories are apart, places: (max_steps, B, T) each
        self.counts = torch.tensor([float(count) for _, count in steps], device=self.device)  # (max_steps,)
        table = [self.optimizer.rates(step).numbers() for step in range(self.max_steps)]
        self.table = torch.tensor(table, dtype=torch.float32, device=self.device)
        self.at = torch.zeros(1, dtype=torch.long, device=self.device)
        for group in self.trainer.optimizer.param_groups:
            if "capturable" in group:
                group["capturable"] = True
        self.trainer.model.train()
        torch.cuda.synchronize()
        self._capture()

    def _capture(self) -> None:
        """Make a few steps of the coming length of context one by one, then have the graph of one."""
        assert self.stream is not None
        length, until = self._segment()
        with torch.cuda.stream(self.stream):
            for _ in range(min(WARM_STEPS, until - self.step)):
                self._device_step(length)
                self.step += 1
        self.stream.synchronize()
        self.captured_until = until
        if self.trouble:
            return
        try:
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, stream=self.stream):
                self._device_step(length)
            self.graph = graph
        except RuntimeError as error:  # then every step is made one by one
            self.graph, self.trouble = None, str(error).splitlines()[0][:200]
            torch.cuda.synchronize()
            self.at.fill_(self.step)

    def _segment(self) -> tuple[int, int]:
        """Length of the context at this step, and the step up to which it stays: `grow` is ((share, length), ...)."""
        for share, length in self.extras.get("grow", ()):
            if self.step < (until := round(share * self.max_steps)):
                return length, until
        return self.config.model.seq_len, self.max_steps

    def _device_step(self, length: int) -> None:
        """A step whose number stands on the device, and moves on."""
        parts = [column.index_select(0, self.at)[0].view(-1, length) for column in self.columns]  # (B, T)
        rates = Rates.of_numbers(self.table.index_select(0, self.at)[0].unbind(), len(self.config.mtp_weights))
        self._one_step(parts, self.counts.index_select(0, self.at)[0], rates)
        self.at += 1

    def advance(self, steps: int) -> None:
        """Queue so many further steps, at most to the end."""
        assert self.stream is not None
        if self.step == self.captured_until < self.max_steps:
            self._capture()
        length, until = self._segment()
        with torch.cuda.stream(self.stream):
            for _ in range(min(steps, until - self.step)):
                if self.graph is not None:
                    self.graph.replay()
                else:
                    self._device_step(length)
                self.step += 1
                if self.optimizer.interval:
                    self.optimizer.between(self.step)

    # --- on a CPU ---

    def advance_on_cpu(self, until: int) -> None:
        """Train up to a step."""
        self.trainer.model.train()
        while self.step < until:
            arrays, count = self._arrays(self.step)
            parts = [torch.from_numpy(array).reshape(-1, self._segment()[0]) for array in arrays]
            self._one_step(parts, count, self.optimizer.rates(self.step))
            self.step += 1
            if self.optimizer.interval:
                self.optimizer.between(self.step)

    # --- on both ---

    def _arrays(self, step: int) -> tuple[list[np.ndarray[Any, np.dtype[np.int64]]], int]:
        """Inputs and targets of a step, places where stories are apart, (B, T) each; how many targets count."""
        batch = self.trainer.batches.at(step)
        arrays = [batch.inputs, batch.targets]
        return arrays + ([batch.places] if self.config.attention == "story" else []), batch.n_targets

    def _one_step(self, parts: list[Tensor], count: Tensor | int, rates: Rates) -> None:
        trainer = self.trainer
        trainer.optimizer.zero_grad(set_to_none=True)
        with self._precision():
            objective, loss = self._losses(parts, count, rates)
        objective.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(trainer.model.parameters(), self.config.optim.clip_norm or math.inf)
        self.optimizer.step(rates)
        self.last_loss.lerp_(loss.detach().to(self.last_loss.dtype), 0.02)

    def _losses(self, parts: list[Tensor], count: Tensor | int, rates: Rates) -> tuple[Tensor, Tensor]:
        """What is to become less, and the mean loss of the next token."""
        if z_loss := self.extras.get("z_loss"):
            assert not rates.further, "z-loss is not built with further tokens"
            logits = self.trainer.model(parts[0]).float()
            loss = F.cross_entropy(logits.flatten(0, 1), parts[1].flatten())
            return loss + z_loss * logits.logsumexp(-1).square().mean(), loss
        if not rates.further:
            return (loss := self.trainer.module(*parts) / count), loss
        shares = torch.stack([torch.as_tensor(weight, dtype=torch.float32) for weight in rates.further])
        objective, loss = self.trainer.module(*parts[:2], parts[2] if len(parts) > 2 else None, shares) / count
        return objective, loss

    def _precision(self) -> contextlib.AbstractContextManager[Any]:
        return torch.autocast(
            self.device.type, dtype=self.autocast, enabled=self.autocast is not None, cache_enabled=False
        )

    def windows(self) -> float:
        """Bits per byte of the validation split in windows that do not overlap."""
        inputs, seq_len = self.trainer.inputs, self.config.model.seq_len
        context = self.trainer.context
        found = evaluate_windows(self.trainer.model, inputs.validation, seq_len=seq_len, context=context)
        return found.val_bits_per_byte if math.isfinite(found.val_loss) else LOST

    def figures(self) -> dict[str, Any]:
        """What the try gave, measured in fp32: windows, and the fair measure."""
        if self.stream is not None:
            self.stream.synchronize()
        rough = torch.get_float32_matmul_precision()
        torch.set_float32_matmul_precision("highest")
        try:
            return self._measured()
        finally:
            torch.set_float32_matmul_precision(rough)

    def _measured(self) -> dict[str, Any]:
        line: dict[str, Any] = {
            "try": self.name,
            "seed": self.config.seed,
            "parameters": self.n_parameters,
            "steps": self.step,
            "train_loss": self.last_loss.item(),
            "windows": self.windows(),
            "seconds": round(time.perf_counter() - self.began, 1),
            "how": f"{self.device.type}, {'graph' if self.graph else 'step by step'} {self.trouble}".strip(),
        }
        if count := self.extras.get("stories"):
            inputs = self.trainer.inputs
            line |= written(self.trainer.model, inputs.tokenizer, self.config.data, count)
        return line | self._fair()

    def _fair(self) -> dict[str, Any]:
        model, inputs = self.trainer.model, self.trainer.inputs
        scorer = Scorer.of_model(model)
        if self.device.type == "cuda":
            scorer = dataclasses.replace(scorer, threads=1)
        stories = read_stories(self.config.data, "validation", load_manifest(self.config.data))
        try:
            found = measure_stories(scorer, stories, inputs.tokenizer.eos_id)
        except UserError as error:
            return {"fair": LOST, "trouble": str(error)[:200]}
        places = [[row["from"], round(float(row["loss"] or 0), 4)] for row in found.by_position]
        return {"fair": found.losses.bits_per_byte, "nats": found.losses.loss, "by_position": places}
