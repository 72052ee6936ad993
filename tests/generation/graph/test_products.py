"""Products in whole numbers against the same arithmetic in NumPy."""

import numpy as np
import onnxruntime
import pytest
from onnx import TensorProto

from slm_ray.generation.graph.builder import Array, GraphBuilder
from slm_ray.generation.graph.products import LARGEST_SUM, largest_product, linear, quantize


def product(x: Array, weight: Array, bias: Array | None, *, has_signed_weights: bool = True) -> Array:
    """x @ weight.T + bias in int8, by ONNX Runtime."""
    builder = GraphBuilder("int8", has_signed_weights=has_signed_weights)
    builder.input("x", TensorProto.FLOAT, ["N", x.shape[1]])
    linear(builder, "x", weight, bias, "w", "y")
    builder.output("y", ["N", len(weight)])
    content = builder.model("product").SerializeToString()
    (values,) = onnxruntime.InferenceSession(content, providers=["CPUExecutionProvider"]).run(None, {"x": x})
    return values


def some(rows: int, width: int, seed: int = 0) -> Array:
    return np.random.default_rng(seed).standard_normal((rows, width)).astype(np.float32)


def test_quantized_weights_are_within_half_a_level_of_their_row() -> None:
    weight = some(6, 40)
    weight[3] = 0
    levels, scales = quantize(weight)
    assert levels.dtype == np.int8 and levels.shape == (6, 40) and scales.shape == (6,)
    back = levels * scales[:, None]
    assert (np.abs(back - weight).max(axis=1) <= scales / 2 * 1.001).all()
    assert not back[3].any() and np.abs(levels[[0, 1, 2, 4, 5]]).max(axis=1).tolist() == [127] * 5


def test_product_is_that_of_rounded_numbers() -> None:
    x, weight, bias = some(5, 72), some(24, 72, seed=1), some(1, 24, seed=2)[0]
    x[2] = 0
    levels, scales = quantize(weight)
    largest = np.maximum(np.abs(x).max(axis=1, keepdims=True) / 127, 1e-30)
    expected = (np.rint(x / largest) @ levels.T.astype(np.float64)) * scales * largest + bias
    np.testing.assert_allclose(product(x, weight, bias), expected, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(product(x, weight, bias), x @ weight.T + bias, atol=0.3, rtol=0)


def test_unsigned_weights_give_the_same_to_the_last_digit() -> None:
    """So a story does not depend on which of them a processor needs. Kernels cut the largest sums first: these too."""
    x, weight = np.ones((3, 64), np.float32), np.ones((8, 64), np.float32)
    assert (product(x, weight, None, has_signed_weights=False) == 64).all()
    x, weight = some(33, 256), some(40, 256, seed=1)
    whole = product(x, weight, None, has_signed_weights=False)
    np.testing.assert_array_equal(whole[:1], product(x[:1], weight, None, has_signed_weights=False))
    np.testing.assert_allclose(whole, x @ weight.T, atol=0.6, rtol=0)


@pytest.mark.parametrize("rows", [1, 2, 5, 32])
def test_row_is_the_same_in_any_company(rows: int) -> None:
    weight, x = some(96, 64, seed=1), some(40, 64)
    x[-1] *= 1000  # a loud neighbour
    whole = product(x, weight, None, has_signed_weights=False)
    np.testing.assert_array_equal(product(x[:rows], weight, None, has_signed_weights=False), whole[:rows])


def test_largest_product_is_the_largest_sum() -> None:
    graph = largest_product()
    assert LARGEST_SUM == 64 * 255 * 127
    assert [one.data_type for one in graph.graph.initializer] == [TensorProto.INT8]
