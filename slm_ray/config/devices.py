"""Names of where a model runs, known without torch: `--help` need not wait for it.

In: options of `generate.py`, `evaluate.py` and the server. Out: names that fit each other; `model/device.py` finds the
device.
"""

from typing import Literal

from slm_ray.errors import UserError

DeviceName = Literal["auto", "cpu", "cuda"]
ON_GPUS = ("auto", "torch")
"""Backends that run there; the others are for CPUs."""


def check_device(name: DeviceName, backend: str) -> None:
    """Raises: UserError where a GPU is asked for with a backend that runs on CPUs alone."""
    if name == "cuda" and backend not in ON_GPUS:
        raise UserError(f"--device cuda needs --backend torch: {backend} runs on the CPU")
