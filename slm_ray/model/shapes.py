"""A model's shapes without its weights: what is built in the block takes no memory and draws no numbers.

In: nothing. Out: a block in which `Decoder(config)` has shapes alone. Headers of weights are compared with them, and
parameters counted.
"""

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch.overrides import TorchFunctionMode


class _WithoutNumbers(TorchFunctionMode):
    """Leaves out how weights are initialised.

    Without memory they are numbers of nothing, drawn by the Python that describes operators to compilers: the first
    one imports all of torch's compiler, a second.
    """

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        named = dict(kwargs or {})
        if getattr(func, "__module__", "") == "torch.nn.init":
            return named["tensor"] if "tensor" in named else args[0]
        return func(*args, **named)


@contextlib.contextmanager
def shapes_only() -> Iterator[None]:
    """Within the block tensors are made on torch's `meta` device."""
    with torch.device("meta"), _WithoutNumbers():
        yield
