"""Where a worker stands among the others of its run.

In: Ray Train's context of this process, or nothing where the run's one worker is this process. Out: a `Place`.
"""

import dataclasses

import ray
import torch


@dataclasses.dataclass(frozen=True, kw_only=True)
class Place:
    """Ranks and device of a worker. The defaults are a worker alone."""

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    local_world_size: int = 1
    node_rank: int = 0
    device: torch.device = dataclasses.field(default_factory=lambda: torch.device("cpu"))


def place_in_train() -> Place:
    """That of this process among the workers of Ray Train."""
    ranks = ray.train.get_context()
    return Place(
        rank=ranks.get_world_rank(),
        world_size=ranks.get_world_size(),
        local_rank=ranks.get_local_rank(),
        local_world_size=ranks.get_local_world_size(),
        node_rank=ranks.get_node_rank(),
        device=ray.train.torch.get_device(),
    )


def place_alone() -> Place:
    """That of a process of Ray's which is the run's one worker: on its GPU, where it was given one."""
    return Place(device=torch.device("cuda", 0) if ray.get_gpu_ids() else torch.device("cpu"))
