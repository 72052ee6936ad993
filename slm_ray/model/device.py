"""Where a model runs that is there to be used: on the CPU, or on a GPU of this machine.

In: a name from a command line. Out: a torch device. `generate.py`, `evaluate.py` and the server ask here; training is
given its devices by Ray.
"""

import contextlib
from collections.abc import Iterator

import torch

from slm_ray.config.devices import ON_GPUS, DeviceName, check_device
from slm_ray.errors import UserError
from slm_ray.model.decoder import Decoder

CPU = torch.device("cpu")


def find_device(name: DeviceName, backend: str = "auto") -> torch.device:
    """The device of that name for a model that this backend executes.

    `auto` is the first GPU that torch sees, unless the backend runs on CPUs alone; without one it is the CPU.

    Raises:
        UserError: `cuda` where torch sees no GPU, or with a backend that runs on CPUs alone.
    """
    check_device(name, backend)
    if name == "cpu" or backend not in ON_GPUS:
        return CPU
    if torch.cuda.is_available():
        return torch.device("cuda", torch.cuda.current_device())
    if name == "cuda":
        raise UserError("--device cuda, and torch sees no GPU here: leave it out to use the CPU")
    return CPU


def moved(model: Decoder, device: torch.device) -> Decoder:
    """The model on a device. Raises: UserError where that has no room for it."""
    with room_for("this model's weights", device):
        return model.to(device)


@contextlib.contextmanager
def room_for(what: str, device: torch.device, advice: str = "give --device cpu, or free it") -> Iterator[None]:
    """Raises: UserError where the block finds no room on a GPU."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise UserError(f"the GPU has no room for {what}: {advice} ({device})") from error


def free_on_gpu(device: torch.device) -> int | None:
    """Bytes of a GPU that can be allocated now, with those that torch keeps for that; None for another device."""
    if device.type != "cuda":
        return None
    free, _ = torch.cuda.mem_get_info(device)
    return int(free) + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
