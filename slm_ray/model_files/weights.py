"""Tensors of safetensors files by the headers of these, compared with the files' sizes before anything is read.

In: the files of one model, one or several shards. Out: shape and type of every tensor; the tensors in fp32, one file
after another. A header may say anything: it is bounded here, and the library holds its lengths against the file.
"""

import dataclasses
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from slm_ray.errors import visible

MAX_HEADER_BYTES = 8 * 1024 * 1024
"""Of names, types, shapes and offsets: some 100 bytes a tensor."""
MAX_TENSORS = 50_000
MAX_NAME = 200
"""Characters of a tensor's name, which messages repeat."""
_LENGTH_BYTES = 8  # of the header's length, at the beginning of the file
TYPES = {
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F64": torch.float64,
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "I16": torch.int16,
    "I32": torch.int32,
    "I64": torch.int64,
}
"""Names of safetensors for what a model's file may hold."""
TAKEN = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}
"""What is taken for weights; all is computed in fp32."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class StoredTensor:
    """What a header says of one tensor."""

    file: Path
    shape: tuple[int, ...]
    dtype: torch.dtype


def stored_tensors(files: Sequence[Path]) -> dict[str, StoredTensor]:
    """Every tensor of some files, by name; nothing but their headers is read.

    Raises:
        OSError: a file cannot be read.
        ValueError: a header lies about a length, is too long, or names a type that is not known; or a tensor is there
            twice.
    """
    found: dict[str, StoredTensor] = {}
    for file in files:
        for name, tensor in _header(file).items():
            if name in found:
                raise ValueError(f"{name} is there twice, in {found[name].file.name} and in {file.name}")
            found[name] = tensor
        if len(found) > MAX_TENSORS:
            raise ValueError(f"it has more than {MAX_TENSORS} tensors")
    return found


def _header(path: Path) -> dict[str, StoredTensor]:
    with path.open("rb") as raw:
        size = os.fstat(raw.fileno()).st_size
        length = int.from_bytes(raw.read(_LENGTH_BYTES), "little")
    if length > min(size - _LENGTH_BYTES, MAX_HEADER_BYTES):
        most = f"it has {size} bytes" if length > size - _LENGTH_BYTES else f"{MAX_HEADER_BYTES} are the most"
        raise ValueError(f"{path.name} says that its header has {length} bytes, and {most}")
    found: dict[str, StoredTensor] = {}
    try:
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118  # it is no mapping
                if len(name) > MAX_NAME or visible(name) != name:
                    raise ValueError(f"{path.name} has a tensor with the name {visible(name[:MAX_NAME])!r}")
                part = file.get_slice(name)
                if part.get_dtype() not in TYPES:
                    raise ValueError(f"{name} in {path.name} is of type {part.get_dtype()}: {_expected()}")
                found[name] = StoredTensor(file=path, shape=tuple(part.get_shape()), dtype=TYPES[part.get_dtype()])
    except SafetensorError as error:
        raise ValueError(f"{path.name} is no safetensors file: {error}") from error
    return found


def type_fault(tensors: Mapping[str, Tensor]) -> str:
    """Which tensor is of a type that is not taken; empty where none is."""
    for name, tensor in tensors.items():
        if tensor.dtype not in TAKEN:
            kind = next((word for word, dtype in TYPES.items() if dtype == tensor.dtype), str(tensor.dtype))
            return f"{name} is of type {kind}: {_expected()}"
    return ""


def not_finite(tensors: Mapping[str, Tensor]) -> str:
    """Which tensor holds a NaN or an infinity; empty where none does.

    One pass without a copy: the sum is finite only where all is. One that overflows is looked at number by number.
    """
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and not math.isfinite(tensor.sum()) and not bool(tensor.isfinite().all()):
            return name
    return ""


def _expected() -> str:
    return f"{', '.join(TAKEN.values())} are read"


def meta_tensors(stored: Mapping[str, StoredTensor]) -> dict[str, Tensor]:
    """Tensors of these shapes and types that take no memory. Raises: RuntimeError for a shape that no tensor has."""
    return {name: torch.empty(one.shape, dtype=one.dtype, device="meta") for name, one in stored.items()}


def read_tensors(stored: Mapping[str, StoredTensor]) -> dict[str, Tensor]:
    """The tensors, floating ones in fp32, on the CPU. Raises: OSError, SafetensorError."""
    by_file: dict[Path, list[str]] = {}
    for name, one in stored.items():
        by_file.setdefault(one.file, []).append(name)
    found: dict[str, Tensor] = {}
    for path, names in by_file.items():
        with safe_open(path, framework="pt") as file:
            for name in names:
                tensor = file.get_tensor(name)
                found[name] = tensor.float() if tensor.dtype in TAKEN else tensor
    return found
