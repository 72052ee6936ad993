"""When a run is saved and where it continues: checkpoints written beside the steps, the best one, patience.

In: a `Trainer`, and its evaluations. Out: checkpoints in the run's folder, written by rank 0 in a thread of its own; on
every rank, which evaluation is the best and for how many none was better.
"""

import dataclasses
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import Any

import torch
from torch import Tensor

from slm_ray import storage
from slm_ray.config.places import typed_config
from slm_ray.config.schema import TrainConfig
from slm_ray.runs import checkpoint
from slm_ray.runs.checkpoint import Checkpoint, Snapshot
from slm_ray.runs.code_version import code_version
from slm_ray.runs.ownership import mark
from slm_ray.runs.run_folder import repair_links
from slm_ray.runs.train_state import Attempt, Evaluation, Origin, TrainState
from slm_ray.training.besides.weight_path import with_path
from slm_ray.training.run_log import RunLog
from slm_ray.training.trainer import Trainer

POLL_S = 0.5
"""Between two heartbeats while a checkpoint is waited for."""


class Checkpointer:
    """The checkpoints of one run."""

    def __init__(self, trainer: Trainer, log: RunLog) -> None:
        self._trainer, self._log = trainer, log
        self._inputs, self._context = trainer.inputs, trainer.context
        self._writer = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")  # the process waits for it at its end
        self._written: Future[None] | None = None
        self._writing: TrainState | None = None
        self._saved_best: Evaluation | None = None  # the best one on the disk; rank 0's alone
        self.best: Evaluation | None = None
        self.n_stale_validations = 0  # since the best one
        self.restored: Checkpoint | None = None
        self._code_version = code_version() if self._context.is_main else None  # of now: files may change meanwhile

    def restore(self, latest: Checkpoint | None) -> None:
        """Let the trainer continue from a verified checkpoint; without one it is at its start."""
        if latest is None:
            return
        state = latest.state
        self._trainer.restore(state, latest.model().state_dict(), latest.optimizer())
        self.restored = latest
        if self._has_same_data(state):  # on other stories, which need force, the best is judged anew
            self.best = self._saved_best = state.best
            self.n_stale_validations = state.n_stale_validations

    def tidy_up(self) -> None:
        """On rank 0: finish what a kill left undone; a second time, it changes nothing."""
        folder, latest = self._inputs.folder, self.restored
        mark(folder.path)
        folder.remove_partial(self._trainer.step)
        if latest is not None and self._has_same_data(latest.state):
            self._saved_best = repair_links(folder, latest)

    def save(self, evaluation: Evaluation | None) -> None:
        """Write a checkpoint beside the coming steps, then move `latest`, and `best` where it is the best one.

        Without an evaluation of this step the run is being stopped. Called by every rank; rank 0 writes.
        """
        if evaluation is not None:
            is_better = evaluation.is_better_than(self.best)
            self.best = evaluation if is_better else self.best
            self.n_stale_validations = 0 if is_better else self.n_stale_validations + 1
        pending = self._trainer.pending_losses()
        self.wait_together()
        if not self._context.is_main:
            return
        is_best = evaluation is not None and evaluation.is_better_than(self._saved_best)
        self._writing = self._state(evaluation, evaluation if is_best else self._saved_best, pending)
        state = with_path(self._trainer.optimizer.state_dict(), self._trainer.path)
        content = checkpoint.snapshot(self._trainer.model, state)
        self._written = self._writer.submit(self._write, content, self._writing, is_best)

    def wait_together(self) -> OSError | None:
        """Let every rank wait for the checkpoint in flight, with heartbeats: a slow disk is no hang.

        Returns and raises what `finish_write` does.
        """
        while self._context.all_reduce_sum(self._is_writing()).item() > 0:
            self._context.heartbeat()
        return self.finish_write()

    def _is_writing(self) -> Tensor:
        """One while a checkpoint is in flight, after a moment of waiting for it."""
        is_writing = self._written is not None and bool(wait([self._written], timeout=POLL_S).not_done)
        return torch.tensor([float(is_writing)], device=self._context.device)

    def finish_write(self) -> OSError | None:
        """Wait for the checkpoint in flight. Returns what the disk refused, which is logged; the last good one stays.

        Raises:
            Exception: anything else that the writing met.
        """
        if self._written is None or self._writing is None:
            return None
        while self._is_writing().item() > 0:
            self._context.heartbeat()
        error, state = self._written.exception(), self._writing
        self._written = self._writing = None
        if state.best is not None and self._inputs.folder.best_step() == state.best.step:
            self._saved_best = state.best  # a mirror may refuse what the disk has taken
        if error is not None and not isinstance(error, OSError):
            raise error
        if error is not None:
            self._log.message(
                f"step {state.step:,}: its checkpoint could not be written ({error.strerror or error}), "
                "the one before it is kept"
            )
        return error

    @property
    def saved_best(self) -> Evaluation | None:
        """Evaluation of the checkpoint that `best` points to; on rank 0, once nothing is in flight."""
        return self._saved_best

    def _has_same_data(self, state: TrainState) -> bool:
        return state.data_fingerprint == self._inputs.data_fingerprint

    def _state(self, evaluation: Evaluation | None, best: Evaluation | None, pending: list[float]) -> TrainState:
        trainer, fingerprint = self._trainer, self._inputs.data_fingerprint
        return TrainState(
            step=trainer.step,
            samples_seen=trainer.samples_seen,
            tokens_seen=trainer.tokens_seen,
            seed=trainer.config.seed,
            world_size=self._context.world_size,
            data_fingerprint=fingerprint,
            config=config_for_others(trainer.config),
            metrics=evaluation,
            best=best,
            n_stale_validations=self.n_stale_validations,
            run_id=self._inputs.tracker.run_id,
            scaler=trainer.scaler.state_dict(),
            pending_losses=pending,
            pending_steps=trainer.loss_steps,
            lineage=self.restored.state.lineage_with(fingerprint) if self.restored else [(fingerprint, 0)],
            mixtures=(self.restored.state.mixtures if self.restored else {}) | self._inputs.mixture_shares,
            attempts=[*(self._begun.known_attempts if self._begun else []), self._attempt()],
            origin=self.restored.state.origin if self.restored else None,
            teachers=self._teachers,
        )

    @property
    def _teachers(self) -> list[Origin]:
        """As they were when the run learned from them first."""
        known, now = self.restored.state.teachers if self.restored else [], self._trainer.teachers
        return known or list(now.origins if now else ())

    @property
    def _begun(self) -> TrainState | None:
        """The state that was restored, if any step had been made then: given weights are no attempt."""
        return self.restored.state if self.restored and self.restored.state.step else None

    def _attempt(self) -> Attempt:
        """What this process adds to the run."""
        return Attempt(
            step=self.restored.state.step if self.restored else 0,
            data_fingerprint=self._inputs.data_fingerprint,
            seed=self._trainer.config.seed,
            batch_size=self._trainer.config.batch_size,
            world_size=self._context.world_size,
            code_version=self._code_version,
        )

    def _write(self, content: Snapshot, state: TrainState, is_best: bool) -> None:
        """In the writer's thread: nothing is read here that a step changes."""
        config, inputs, folder = self._trainer.config, self._inputs, self._inputs.folder
        folder.check_lease()
        checkpoint.write(folder.checkpoint_path(state.step), content, inputs.tokenizer, state, inputs.chat_template)
        folder.publish(state.step, is_best=is_best, keep=config.keep_checkpoints, keep_best=config.keep_best)


def config_for_others(config: TrainConfig) -> dict[str, Any]:
    """The fields of a config; of a run in an object store, places below the working folder as seen from there."""
    fields = dataclasses.asdict(config)
    return typed_config(fields) if storage.is_remote(config.output) else fields


def is_out_of_patience(config: TrainConfig, n_stale_validations: int) -> bool:
    """Whether so many validations without a better one are too many."""
    return 0 < config.patience <= n_stale_validations
