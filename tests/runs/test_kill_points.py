"""Killed at any moment of publishing a checkpoint, a run has a whole one, and the next writer tidies up.

Python tells a hook of each file that is opened, renamed or removed, before it happens: the process is killed there, at
one after the other.
"""

import os
import shutil
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from slm_ray.config.schema import ModelConfig
from slm_ray.model.decoder import Decoder
from slm_ray.runs import checkpoint, verification
from slm_ray.runs.checkpoint import Checkpoint, Snapshot
from slm_ray.runs.run_folder import RunFolder, repair_links
from slm_ray.runs.train_state import Evaluation, TrainState
from slm_ray.tokenization.tokenizer import Tokenizer
from slm_ray.training.optim import OptimConfig, make_optimizer

EVENTS = {"open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.symlink", "os.link", "os.truncate"}
LOSSES = {1: 1.0, 2: 3.0, 3: 0.5}  # the third is the best: it takes the place of both


def state(step: int, best: int) -> TrainState:
    found = {
        at: Evaluation(val_loss=loss, val_perplexity=2.7, val_bits_per_byte=0.8, step=at) for at, loss in LOSSES.items()
    }
    return TrainState(
        step=step, samples_seen=8 * step, seed=0, world_size=1, data_fingerprint="f" * 64, config={},
        metrics=found[step], best=found[best],
    )  # fmt: skip


@pytest.fixture(scope="module")
def content(tiny_tokenizer: Tokenizer) -> Snapshot:
    config = ModelConfig(vocab_size=tiny_tokenizer.vocab_size, seq_len=32, n_layers=1, d_model=16, n_heads=2, d_ff=32)
    torch.manual_seed(0)
    model = Decoder(config)
    return checkpoint.snapshot(model, make_optimizer(model, OptimConfig()).state_dict())


class Run:
    """A run of given checkpoints."""

    def __init__(self, path: Path, content: Snapshot, tokenizer: Tokenizer) -> None:
        self.folder, self._content, self._tokenizer = RunFolder(path), content, tokenizer
        (path / "checkpoints").mkdir(parents=True, exist_ok=True)

    def publish(self, step: int, best: int, keep: int) -> None:
        """What the writer's thread does."""
        path = self.folder.checkpoint_path(step)
        checkpoint.write(path, self._content, self._tokenizer, state(step, best))
        self.folder.publish(step, is_best=best == step, keep=keep, keep_best=1)


def killed_at(number: int, root: Path, work: Callable[[], None]) -> bool:
    """Do the work in a process that is killed before its event `number` below a folder; whether it came to that."""
    child = os.fork()
    if child == 0:
        seen = 0

        def hook(event: str, args: tuple[Any, ...]) -> None:
            nonlocal seen
            if event in EVENTS and any(str(root) in str(arg) for arg in args):
                seen += 1
                if seen == number:
                    os.kill(os.getpid(), signal.SIGKILL)

        sys.addaudithook(hook)
        try:
            work()
        finally:
            os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL


def names(run: Run) -> set[str]:
    return {path.name for path in (run.folder.path / "checkpoints").iterdir()}


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # that a process of several threads is forked
@pytest.mark.parametrize(
    ("steps", "keep", "left"),
    [
        pytest.param((), 1, {3}, id="the first one"),
        pytest.param((1, 2), 1, {3}, id="in the place of two"),
        pytest.param((1, 2, 3), 3, {1, 2, 3}, id="the same step again"),
    ],
)
def test_a_kill_at_any_moment_of_publishing_leaves_a_whole_checkpoint(
    content: Snapshot, tiny_tokenizer: Tokenizer, tmp_path: Path, steps: tuple[int, ...], keep: int, left: set[int]
) -> None:
    number, before = 0, Run(tmp_path / "before", content, tiny_tokenizer)
    for step in steps:
        before.publish(step, min(steps[: steps.index(step) + 1], key=LOSSES.__getitem__), keep=3)
    while True:
        number += 1
        root = shutil.copytree(before.folder.path, tmp_path / str(number), symlinks=True)
        run = Run(root, content, tiny_tokenizer)
        was_killed = killed_at(number, root, lambda run=run: run.publish(3, 3, keep))  # type: ignore[misc]
        # 1. What a reader finds, whoever it is: the one before or this one, whole, behind links that lead somewhere.
        latest = run.folder.latest_valid()
        assert latest is not None or not steps, number
        if latest is not None:
            assert latest.state.step in {3, max(steps, default=3)} or (steps == (1, 2, 3) and latest.state.step == 2)
        assert all(verification.is_valid(path) for path in run.folder.checkpoints()), number
        if steps != (1, 2, 3):  # where the step was there, a link to it may lead nowhere for a moment
            for link in (run.folder.latest, run.folder.best):
                assert link.exists() or not steps or not was_killed, number
                assert verification.is_valid(link) or not link.exists(), number
        # 2. What the next start makes of it: no rest, and the same end.
        run.folder.remove_partial(latest.state.step if latest else 0)
        if latest is not None:
            repair_links(run.folder, latest)
        assert names(run) == {path.name for path in run.folder.checkpoints()}, number
        assert {path.name for path in root.iterdir()} <= {"checkpoints", "latest", "best"}, number
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(checkpoint, "_sync", lambda _: None)  # which takes its time, and no part in this
            run.publish(3, 3, keep)
        assert names(run) == {run.folder.checkpoint_path(step).name for step in left}, number
        assert {Checkpoint.open(link.resolve()).state.step for link in (run.folder.latest, run.folder.best)} == {3}
        if not was_killed:
            break
    assert number > 20  # files, links, renames: each was a moment


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("is_there", [False, True])
def test_a_kill_while_a_copy_for_serving_is_made_leaves_a_whole_one_or_none(
    content: Snapshot, tiny_tokenizer: Tokenizer, tmp_path: Path, is_there: bool
) -> None:
    source, number, killed = tmp_path / "source", 0, True
    checkpoint.write(source, content, tiny_tokenizer, state(3, 3))
    first = tmp_path / "first"
    checkpoint.copy_for_serving(source, first)
    while killed:
        number += 1
        target = tmp_path / str(number) / "copy"
        target.parent.mkdir()
        if is_there:
            shutil.copytree(first, target)
        killed = killed_at(number, target.parent, lambda target=target: checkpoint.copy_for_serving(source, target))  # type: ignore[misc]
        assert verification.is_valid(target) or not target.exists(), number
        checkpoint.copy_for_serving(source, target)
        assert [path.name for path in target.parent.iterdir()] == ["copy"], number
        assert verification.is_valid(target)
    assert number > 15
