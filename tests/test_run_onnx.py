"""Graphs on the CPU: the oracle computes what the graph says, and rounds nothing on its own."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest

from medcompile.run_onnx import run_onnx


@pytest.mark.parametrize("block", [32, None])
def test_weights_in_integers_meet_activations_in_float(block: int | None) -> None:
    random = np.random.default_rng(0)
    codes = random.integers(-7, 8, (64, 16)).astype(np.int8)
    scales = random.uniform(0.01, 0.02, (2, 16) if block else 16).astype(np.float32)
    x = random.normal(size=(5, 64)).astype(np.float32)
    given = ir.Value(name="x", shape=ir.Shape(["rows", 64]), type=ir.TensorType(ir.DataType.FLOAT))
    values = [ir.Value(name=n, const_value=ir.tensor(a, name=n)) for n, a in (("codes", codes), ("scales", scales))]
    told = {"axis": 0, "block_size": block} if block else {"axis": 1}
    weight = ir.node("DequantizeLinear", values, told, name="dequantize")
    product = ir.node("MatMul", [given, weight.outputs[0]], name="product")
    product.outputs[0].name = "y"
    product.outputs[0].type = ir.TensorType(ir.DataType.FLOAT)
    graph = ir.Graph([given], product.outputs, nodes=[weight, product], initializers=values, opset_imports={"": 21})
    (found,) = run_onnx(ir.Model(graph, ir_version=10), iter([{"x": x}]), ("y",))
    dense = codes * (np.repeat(scales, block, axis=0) if block else scales)
    np.testing.assert_allclose(found["y"], x @ dense, rtol=1e-5, atol=1e-5)
