"""Parts of an ONNX graph of standard operators: nodes, weights, linear layers and norms.

In: weights of torch, names of values. Out: a `ModelProto` in opset 17. `onnx_graph` puts the decoder together.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper
from torch import Tensor, nn

Array = NDArray[Any]
OPSET, IR_VERSION = 17, 8


class Graph:
    """Nodes and weights in the order in which they are added; values are passed on by name."""

    def __init__(self, *, is_int8: bool) -> None:
        self.is_int8 = is_int8
        self.nodes: list[onnx.NodeProto] = []
        self.inputs: list[onnx.ValueInfoProto] = []
        self.outputs: list[onnx.ValueInfoProto] = []
        self.weights: dict[str, TensorProto] = {}

    def proto(self) -> onnx.ModelProto:
        """The finished graph."""
        graph = helper.make_graph(self.nodes, "decoder", self.inputs, self.outputs, [*self.weights.values()])
        opsets = [helper.make_opsetid("", OPSET)]
        return helper.make_model(graph, opset_imports=opsets, ir_version=IR_VERSION, producer_name="slm-ray")

    def add(self, kind: str, *inputs: str, output: str = "", **attributes: Any) -> str:
        """Add an operator with one output, and give its name."""
        output = output or f"{kind}_{len(self.nodes)}"
        self.nodes.append(helper.make_node(kind, list(inputs), [output], **attributes))
        return output

    def halves(self, x: str) -> tuple[str, str]:
        """Split the last dimension in two."""
        names = [f"Split_{len(self.nodes)}_{half}" for half in range(2)]
        self.nodes.append(helper.make_node("Split", [x], names, axis=-1))
        return names[0], names[1]

    def constant(self, values: Array | Tensor | Sequence[int] | float, name: str = "") -> str:
        """A weight under a name, once; or a number or a shape under its value."""
        if isinstance(values, Tensor):
            array = values.detach().float().cpu().numpy()
        elif isinstance(values, float):
            array, name = np.array(values, np.float32), name or f"float_{values!r}"
        elif isinstance(values, np.ndarray):
            array = values
        else:
            array, name = np.array(values, np.int64), name or f"ints_{'_'.join(map(str, values))}"
        if name not in self.weights:
            self.weights[name] = numpy_helper.from_array(np.array(array, order="C"), name)
        return name

    def number(self, value: int) -> str:
        """An integer without dimensions."""
        return self.constant(np.array(value, np.int64), f"int_{value}")

    def matrix(self, weight: Tensor, name: str) -> str:
        """A weight (out, in) as it is, or out of 8 bits: levels from -127 to 127, a scale for each row."""
        if not self.is_int8:
            return self.constant(weight, name)
        levels, scales = quantized(weight)
        levels_name = self.constant(levels, f"{name}.levels")
        if f"{name}.whole" not in {node.output[0] for node in self.nodes}:
            cast = self.add("Cast", levels_name, to=TensorProto.FLOAT)
            self.add("Mul", cast, self.constant(scales, f"{name}.scales"), output=f"{name}.whole")
        return f"{name}.whole"

    def linear(self, x: str, layer: Any, name: str, output: str = "") -> str:
        """x (..., in) -> (..., out)."""
        if self.is_int8:
            weight = self.add("Transpose", self.matrix(layer.weight, f"{name}.weight"), perm=[1, 0])
        else:
            weight = self.constant(layer.weight.detach().float().cpu().numpy().T, f"{name}.weight")
        if layer.bias is None:
            return self.add("MatMul", x, weight, output=output)
        return self.add("Add", self.add("MatMul", x, weight), self.constant(layer.bias, f"{name}.bias"), output=output)

    def norm(self, x: str, norm: Any, name: str, eps: float) -> str:
        """RMSNorm by its parts, which opset 17 does not have as one; or torch's LayerNorm."""
        scale = self.constant(norm.weight, f"{name}.weight")
        if isinstance(norm, nn.LayerNorm):
            shift = [] if norm.bias is None else [self.constant(norm.bias, f"{name}.bias")]
            return self.add("LayerNormalization", x, scale, *shift, axis=-1, epsilon=eps)
        mean = self.add("ReduceMean", self.add("Mul", x, x), axes=[-1], keepdims=1)
        root = self.add("Sqrt", self.add("Add", mean, self.constant(float(eps))))
        return self.add("Mul", self.add("Div", x, root), scale)

    def input(self, name: str, kind: int, shape: Sequence[int | str]) -> None:
        """Declare an input."""
        self.inputs.append(helper.make_tensor_value_info(name, kind, shape))

    def output(self, name: str, shape: Sequence[int | str]) -> None:
        """Declare a value as an fp32 output."""
        self.outputs.append(helper.make_tensor_value_info(name, TensorProto.FLOAT, shape))


def quantized(weight: Tensor) -> tuple[Array, Array]:
    """Round a matrix to 8 bits: levels (out, in) from -127 to 127, and a scale for each row, (out, 1)."""
    values = weight.detach().float().cpu().numpy()
    scales = np.abs(values).max(axis=1, keepdims=True) / 127
    levels = np.rint(values / np.where(scales == 0, 1, scales))
    return levels.astype(np.int8), scales.astype(np.float32)
