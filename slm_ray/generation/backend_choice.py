"""Which backend executes the model of an engine, by name.

In: a `Decoder`, a name. Out: a `Backend`. The server, `evaluate.py` and the bench choose here. onnx and onnxruntime are
imported only where their backend is asked for, so that training does without them.

Why ONNX Runtime (tests/bench/README.md, "Serving"): on 2 cores with the default preset it writes 2.4 to 8 times as
many tokens as eager torch, and more than llama.cpp; its greedy stories are torch's, token for token. `onnx-int8`
multiplies whole numbers and keeps keys and values in a byte each: a quarter of the memory, most for many stories at a
time, 0.02 % more bits per byte on real stories. `auto` does without, since its stories are not torch's word for word.
"""

import logging
import os
from collections.abc import Callable
from typing import Literal, get_args

import torch

from slm_ray.errors import UserError
from slm_ray.generation.backend import Backend
from slm_ray.generation.backend import BackendName as BackendName
from slm_ray.generation.cache_size import check_cache
from slm_ray.generation.torch_backend import TorchBackend
from slm_ray.model.decoder import Decoder
from slm_ray.model.device import free_on_gpu, room_for

LOGGER = logging.getLogger(__name__)
_Maker = Callable[[Decoder, int, int], Backend]


class BackendError(UserError):
    """A backend that cannot run a model here; the message says why and what does."""


def make_backend(model: Decoder, max_slots: int, name: BackendName = "auto", threads: int = 0) -> Backend:
    """A backend for up to `max_slots` requests at a time.

    name: `torch` on the model's own device; `onnx` on the CPU in fp32; `onnx-int8` in 8 bits, cache included;
    `auto` is `onnx` for a model on the CPU where it runs, else `torch`. threads: of each operator; 0 takes as many as
    torch is set to. With `torch` they are those of the whole process.

    Raises:
        BackendError: the backend that was named cannot run this model, or is not installed. `auto` never does.
        UserError: the cache of so many stories would be too large for the memory that it lies in.
        ValueError: an unknown name.
    """
    if name not in get_args(BackendName):
        raise ValueError(f"backend ({name!r}) must be one of {', '.join(get_args(BackendName))}")
    device = next(model.parameters()).device
    check_cache(model.config, max_slots, free_on_gpu=free_on_gpu(device))
    if name == "auto":
        try:
            return _onnx(model, max_slots, "onnx", threads)
        except BackendError as error:
            LOGGER.info("%s", error)
            name = "torch"
    if name == "torch":
        if threads:
            torch.set_num_threads(threads)
        stories = f"{max_slots} {'story' if max_slots == 1 else 'stories'}"
        with room_for(f"the cache of {stories}", device, "lower --rows, or give --device cpu"):
            return TorchBackend(model, max_slots)
    return _onnx(model, max_slots, name, threads)


def _onnx(model: Decoder, max_slots: int, name: str, threads: int) -> Backend:
    device = next(model.parameters()).device
    if device.type != "cpu":
        raise BackendError(f"backend {name} runs on the CPU and the model is on {device}: use torch")
    os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")  # a replica in somebody's cluster is started by no command
    try:
        from slm_ray.generation.onnx_backend import OnnxBackend
    except ImportError as error:
        raise BackendError(f"backend {name} needs {error.name}: pip install 'slm-ray[serve]', or use torch") from error
    weights: Literal["fp32", "int8"] = "int8" if name == "onnx-int8" else "fp32"
    try:
        backend = OnnxBackend(model, max_slots, weights=weights, threads=threads or torch.get_num_threads())
        backend.decode([0] * max_slots)
    except Exception as error:  # ONNX Runtime's errors have no common class
        reason = " ".join(str(error).split())
        raise BackendError(f"backend {name} cannot run this model: {reason}; use torch") from error
    for slot in range(max_slots):
        backend.prefill(slot, [])
    return backend
