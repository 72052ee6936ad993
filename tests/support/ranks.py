"""Ranks without Ray: `loop.fit` in processes of their own, joined by gloo on loopback.

Each rank leaves the samples that every step saw in `samples-WORLD-RANK.jsonl`, so that a test can count them.
"""

import dataclasses
import json
import os
import subprocess
import sys
import uuid
from collections import Counter
from pathlib import Path
from typing import Any

import torch
import torch.distributed
from torch.nn.parallel import DistributedDataParallel

from slm_ray.config.files import from_dict
from slm_ray.config.schema import TrainConfig
from slm_ray.dataset.batches import Batch, TrainBatches
from slm_ray.runs.run_folder import RunFolder
from slm_ray.tracking.tracker import NullTracker
from slm_ray.training.context import DDP_OPTIONS, TrainContext
from slm_ray.training.inputs import load_inputs
from slm_ray.training.loop import fit
from slm_ray.training.preflight import resolve
from tests.support.paths import ROOT


def fit_in_ranks(config: TrainConfig, world_size: int, *, stop_at: int = 0) -> None:
    """Run or resume until the end, or until the run has been asked to stop after step `stop_at`.

    Precision and compiler are those that the config names; what it leaves to the machine is fp32 and eager.
    """
    meeting = Path(config.output) / f"meeting-{uuid.uuid4().hex}"
    meeting.parent.mkdir(parents=True, exist_ok=True)
    given = {"config": dataclasses.asdict(config), "world_size": world_size, "stop_at": stop_at}
    environment = dict(os.environ) | {"PYTHONPATH": str(ROOT), "GLOO_SOCKET_IFNAME": "lo"}
    command = [sys.executable, "-m", "tests.support.ranks", json.dumps(given), str(meeting)]
    ranks = [subprocess.Popen([*command, str(rank)], env=environment, cwd=ROOT) for rank in range(world_size)]
    try:
        assert [rank.wait(300) for rank in ranks] == [0] * world_size
    finally:
        for rank in ranks:
            rank.kill()
            rank.wait()
        meeting.unlink(missing_ok=True)


def samples_by_step(folder: RunFolder) -> dict[int, Counter[str]]:
    """What each step of a run saw, over all ranks; of a step that was done twice, the last time."""
    parts: dict[tuple[int, int], list[str]] = {}
    for path in sorted(folder.path.glob("samples-*.jsonl")):
        for line in path.read_text(encoding="utf-8").splitlines():
            seen = json.loads(line)
            parts[seen["step"], path.name] = seen["samples"]
    steps: dict[int, Counter[str]] = {}
    for (step, _), samples in parts.items():
        steps.setdefault(step, Counter()).update(samples)
    return steps


def _all_reduce_sum(values: torch.Tensor) -> torch.Tensor:
    torch.distributed.all_reduce(values)
    return values


def _recording(path: Path) -> None:
    at = TrainBatches.at

    def recorded(self: TrainBatches, step: int) -> Batch:
        batch = at(self, step)
        with path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"step": step, "samples": [row.tobytes().hex() for row in batch.inputs]}) + "\n")
        return batch

    TrainBatches.at = recorded  # type: ignore[method-assign]


def main(given: dict[str, Any], meeting: str, rank: int) -> None:
    """One rank."""
    config, world_size = from_dict(TrainConfig, given["config"], "the test's config"), given["world_size"]
    torch.set_num_threads(1)
    inputs = load_inputs(resolve(config, lambda _: world_size), NullTracker())
    inputs.folder.path.mkdir(parents=True, exist_ok=True)
    _recording(inputs.folder.path / f"samples-{world_size}-{rank}.jsonl")
    latest = inputs.folder.latest_state()
    steps = iter(range(latest.step + 1 if latest else 1, 10**9))
    torch.distributed.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=world_size)
    context = TrainContext(
        rank=rank,
        world_size=world_size,
        wrap=lambda module: DistributedDataParallel(module, **DDP_OPTIONS) if world_size > 1 else module,
        all_reduce_sum=_all_reduce_sum,
        is_stop_requested=lambda: next(steps) == given["stop_at"],
    )
    precision = "fp32" if config.precision == "auto" else config.precision
    fit(inputs, context, precision=precision, is_compiled=config.compile == "on")
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(json.loads(sys.argv[1]), sys.argv[2], int(sys.argv[3]))
