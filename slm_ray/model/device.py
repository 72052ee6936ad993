"""Where a model runs that is there to be used: on the CPU, or on a GPU of this machine.

In: a name from a command line. Out: a torch device. `generate.py`, `evaluate.py` and the server ask here; training is
given its devices by Ray.
"""

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
    try:
        return model.to(device)
    except torch.OutOfMemoryError as error:
        raise UserError(
            f"the GPU has no room for this model's weights: give --device cpu, or free it ({device})"
        ) from error
