"""A product of matrices in whole numbers, as ONNX operators: weights rounded once, each row of the input as it comes.

In: the name of the input, a weight. Out: the name of the product. A row is rounded by its own largest number and sums
of whole numbers are exact: so what a product makes of a story does not depend on those beside it.
"""

from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto
from torch import Tensor

from slm_ray.generation.graph.builder import CONTRIB, GraphBuilder

Array = NDArray[Any]
LEVELS = 127
"""Whole numbers on each side of 0."""
LARGEST_WIDTH = 64
LARGEST_SUM = LARGEST_WIDTH * 255 * LEVELS
"""What `largest_product` makes of rows that are 255 throughout."""
_ZERO = 128
_TINY = 1e-30
"""What stands for the largest number of a row of zeros."""


def linear(
    builder: GraphBuilder, x: str, weight: Array, bias: Array | Tensor | None, name: str, output: str = ""
) -> str:
    """x @ weight.T + bias, with a weight of (out, in)."""
    if bias is None:
        return _product(builder, x, weight, name, output)
    return builder.node(
        "Add", [_product(builder, x, weight, name), builder.constant(f"{name}_bias", bias)], output=output
    )


def _product(builder: GraphBuilder, x: str, weight: Array, name: str, output: str = "") -> str:
    if builder.weights == "int8":
        return _product_in_int8(builder, x, weight, name, output)
    return builder.node("MatMul", [x, builder.constant(name, np.ascontiguousarray(weight.T))], output=output)


def quantize(weight: Array) -> tuple[Array, Array]:
    """Round a matrix to whole numbers from -127 to 127, each of its rows (outputs) by a scale of its own.

    weight: (out, in). Returns levels (out, in) in int8, and scales (out,): 1 for a row of zeros.
    """
    scales = np.abs(weight).max(axis=1).astype(np.float32) / LEVELS
    scales[scales == 0] = 1
    return np.rint(weight / scales[:, None]).astype(np.int8), scales


def _product_in_int8(builder: GraphBuilder, x: str, weight: Array, name: str, output: str) -> str:
    """x is rounded once for all its products."""
    levels, largest = _rounded_rows(builder, x)
    level = _constant(builder, "level", 1 / LEVELS, np.float32)
    whole, scales = quantize(weight)
    whole, zero = np.ascontiguousarray(whole.T), [_constant(builder, "zero_level", _ZERO, np.uint8)]
    if not builder.has_signed_weights:
        whole, zero = (whole.astype(np.int16) + _ZERO).astype(np.uint8), zero * 2
    inputs = [levels, builder.constant(name, whole), level]
    product = builder.node("MatMulIntegerToFloat", [*inputs, builder.constant(f"{name}_scale", scales), *zero], CONTRIB)
    return builder.node("Mul", [product, largest], output=output)


def _rounded_rows(builder: GraphBuilder, x: str) -> tuple[str, str]:
    """x in whole numbers from 1 to 255, 128 for 0, and the largest number of each row, which it was divided by."""
    if x not in builder.rounded:
        size = builder.node("ReduceMax", [builder.node("Abs", [x])], axes=[-1], keepdims=1)
        largest = builder.node("Max", [size, _constant(builder, "tiny", _TINY, np.float32)])
        level, zero = (
            _constant(builder, "level", 1 / LEVELS, np.float32),
            _constant(builder, "zero_level", _ZERO, np.uint8),
        )
        levels = builder.node("QuantizeLinear", [builder.node("Div", [x, largest]), level, zero])
        builder.rounded[x] = levels, largest
    return builder.rounded[x]


def _constant(builder: GraphBuilder, name: str, value: float, kind: type) -> str:
    return builder.constant(name, np.array(value, kind))


def largest_product() -> onnx.ModelProto:
    """A graph of the largest sum of unsigned with signed bytes that there can be: x (N, 64) in uint8 -> int32."""
    builder = GraphBuilder()
    builder.input("x", TensorProto.UINT8, ["N", LARGEST_WIDTH])
    weight = builder.constant("weight", np.full((LARGEST_WIDTH, LARGEST_WIDTH), LEVELS, np.int8))
    builder.output(builder.node("MatMulInteger", ["x", weight]), ["N", LARGEST_WIDTH], TensorProto.INT32)
    return builder.model("largest product")
