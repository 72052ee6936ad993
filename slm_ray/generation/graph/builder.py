"""What a graph in ONNX is put together with: nodes, weights, inputs and outputs.

In: names and numbers. Out: a `ModelProto` whose weights are in memory. `onnx_graph.py` and `products.py` use it.
"""

from collections.abc import Iterable, Sequence
from typing import Any, Literal

import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper
from torch import Tensor, nn

Array = NDArray[Any]
Weights = Literal["fp32", "int8"]
CONTRIB = "com.microsoft"


class GraphBuilder:
    """Nodes, weights, inputs and outputs, in the order in which they are added. Values are passed on by name."""

    def __init__(
        self, weights: Weights = "fp32", cache_scales: Array | None = None, has_signed_weights: bool = True
    ) -> None:
        self.weights = weights
        self.cache_scales = cache_scales
        self.has_signed_weights = has_signed_weights
        self.rounded: dict[str, tuple[str, str]] = {}  # value -> its whole numbers, and their scales
        self._nodes: list[onnx.NodeProto] = []
        self._inputs: list[onnx.ValueInfoProto] = []
        self._outputs: list[onnx.ValueInfoProto] = []
        self._initializers: dict[str, TensorProto] = {}

    def model(self, name: str) -> onnx.ModelProto:
        """The finished graph."""
        graph = helper.make_graph(self._nodes, name, self._inputs, self._outputs, [*self._initializers.values()])
        opsets = [helper.make_opsetid("", 17), helper.make_opsetid(CONTRIB, 1)]
        return helper.make_model(graph, opset_imports=opsets, ir_version=9)

    def input(self, name: str, kind: int, shape: Sequence[int | str]) -> None:
        """Declare an input."""
        self._inputs.append(helper.make_tensor_value_info(name, kind, shape))

    def output(self, name: str, shape: Sequence[int | str], kind: int = TensorProto.FLOAT) -> None:
        """Declare a value as an output."""
        self._outputs.append(helper.make_tensor_value_info(name, kind, shape))

    def constant(self, name: str, values: Array | Tensor) -> str:
        """Add a weight, once under each name."""
        if name not in self._initializers:
            array = numpy_values(values) if isinstance(values, Tensor) else values
            self._initializers[name] = numpy_helper.from_array(array, name)
        return name

    def node(self, kind: str, inputs: Iterable[str], domain: str = "", output: str = "", **attributes: Any) -> str:
        """Add an operator with one output, which gets a name of its own where none is asked for."""
        output = output or f"{kind}_{len(self._nodes)}"
        self.nodes(kind, inputs, [output], domain, **attributes)
        return output

    def nodes(self, kind: str, inputs: Iterable[str], outputs: list[str], domain: str, **attributes: Any) -> None:
        """Add an operator with several outputs; those named "" are not computed."""
        self._nodes.append(helper.make_node(kind, list(inputs), outputs, domain=domain, **attributes))


def numpy_values(tensor: Tensor | nn.Parameter) -> Array:
    """The same in fp32 for NumPy."""
    values: Array = tensor.detach().float().cpu().numpy()
    return values
