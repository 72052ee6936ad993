"""GPUs for the replicas: whether each gets one of the cluster's.

In: options, and what the cluster has and what of it is free. Out: the device of all replicas. `deployment.py` asks
before it starts them: a replica whose GPU is never free is waited for, for ever and without a word.
"""

import sys

import ray

from serve.options import AppConfig
from serve.replica_actors import replica_actors
from slm_ray.config.devices import ON_GPUS, DeviceName
from slm_ray.errors import UserError


def device_for(config: AppConfig) -> DeviceName:
    """`auto` settled before the replicas start: Ray shows a GPU only to those that have asked for one.

    It is a GPU for each where so many are free now; the CPU where others, as a training, have them. Where replicas run
    already (`serve deploy`, again), theirs count as well: the new ones take their place.
    """
    if config.device != "auto" or config.backend not in ON_GPUS:
        return "cuda" if config.device == "cuda" else "cpu"
    has_gpus = ray.is_initialized() and _gpus(is_free=not replica_actors()) >= config.most_replicas
    return "cuda" if has_gpus else "cpu"


def check_gpus(config: AppConfig, *, is_own_cluster: bool) -> None:
    """Say that GPUs are waited for, where they may still come; a Ray that was started here gets no more of them.

    Raises:
        UserError: --device cuda, and this machine has too few.
    """
    if config.device != "cuda":
        return
    wanted, there = config.replicas, _gpus(is_free=False)
    if is_own_cluster and there < wanted:
        raise UserError(
            f"--device cuda, and Ray sees {f'{there:g} GPUs for {wanted} replicas' if there else 'no GPU'} here: "
            + (f"give --replicas {int(there)}" if there >= 1 else "leave it out to use the CPU")
        )
    if (free := _gpus(is_free=True)) < wanted:
        replicas = "the replica" if wanted == 1 else f"{wanted} replicas"
        print(f"{free:g} of {there:g} GPUs are free in this cluster: {replicas} may wait for one each", file=sys.stderr)


def _gpus(*, is_free: bool) -> float:
    resources = ray.available_resources() if is_free else ray.cluster_resources()
    return float(resources.get("GPU", 0))
