from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest

from medcompile import onnx_files
from medcompile.rewrites import onnxruntime as dialect
from medcompile.rewrites.dynamic_int8 import roundings
from tests import graphs

_PLAIN = ort.SessionOptions()
_PLAIN.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL


def _operators(model: ir.Model) -> Counter[str]:
    return Counter(node.op_type for node in model.graph)


def _run(model: ir.Model, folder: Path, feeds: dict[str, np.ndarray[Any, Any]]) -> np.ndarray[Any, Any]:
    """What the model says, with no optimisation of the library's own."""
    folder.mkdir(exist_ok=True)
    onnx_files.save({"model": model}, folder)
    session = ort.InferenceSession(folder / "model.onnx", _PLAIN, providers=["CPUExecutionProvider"])
    result: np.ndarray[Any, Any] = session.run(None, feeds)[0]
    return result


@pytest.mark.parametrize(
    ("variant", "counts"),
    [
        ("fp32", {"static": 0, "dynamic": 0, "keys": 1}),
        ("static", {"static": 6, "dynamic": 0, "keys": 1}),
        ("asymmetric", {"static": 6, "dynamic": 0, "keys": 1}),
        ("dynamic", {"static": 0, "dynamic": 6, "keys": 1}),
        ("weights", {"static": 0, "dynamic": 0, "keys": 1}),
    ],
)
def test_the_rewritten_graph_computes_what_the_typed_graph_says(
    variant: str, counts: dict[str, int], tmp_path: Path
) -> None:
    feeds = graphs.feeds(4, 20)
    model = graphs.typed(graphs.VARIANTS[variant])
    expected = _run(model, tmp_path / "typed", feeds)
    assert dialect.rewrite(model) == counts
    np.testing.assert_allclose(_run(model, tmp_path / "rewritten", feeds), expected, atol=2e-5)


def test_every_static_product_is_fused_with_its_bias_and_reads_uint8() -> None:
    model = graphs.typed(graphs.VARIANTS["static"])
    dialect.rewrite(model)
    operators = _operators(model)
    assert operators["MatMulIntegerToFloat"] == 6
    assert operators["QuantizeLinear"] == 4  # query, key and value share one
    assert operators["DequantizeLinear"] == 0
    for node in model.graph:
        if node.op_type == "MatMulIntegerToFloat":
            assert node.inputs[6] is not None
        if node.op_type == "QuantizeLinear":
            zero_point = node.inputs[2]
            assert zero_point is not None and zero_point.const_value is not None
            assert zero_point.const_value.numpy() == np.uint8(128)


def test_dynamic_rows_are_rounded_to_the_same_codes() -> None:
    model = graphs.typed(graphs.VARIANTS["dynamic"])
    dialect.rewrite(model)
    operators = _operators(model)
    assert operators["QuantizeLinear"] == 4
    assert operators["Round"] == operators["Abs"] == operators["MatMulInteger"] == 0


def test_a_dynamic_row_does_not_depend_on_the_rows_beside_it(tmp_path: Path) -> None:
    model = graphs.typed(graphs.VARIANTS["dynamic"])
    dialect.rewrite(model)
    feeds = graphs.feeds(4, 12)
    together = _run(model, tmp_path, feeds)
    for row in range(4):
        alone = _run(model, tmp_path, {name: array[row : row + 1] for name, array in feeds.items()})
        np.testing.assert_allclose(alone[0], together[row], atol=1e-5)


def test_a_product_with_another_reader_is_left_in_standard_operators() -> None:
    model = graphs.typed(graphs.VARIANTS["dynamic"])
    product = next(node for node in model.graph if node.op_type == "MatMulInteger")
    model.graph.append(ir.node("Identity", [product.outputs[0]], name="watch"))
    assert len(roundings(model)) == 3


def test_a_weight_with_zero_points_is_not_fused() -> None:
    model = graphs.typed(graphs.VARIANTS["static"])
    for value in model.graph.initializers.values():
        if value.name is not None and value.name.endswith("query/MatMul/weight_zero_point"):
            value.const_value = ir.tensor(np.ones(graphs.HIDDEN, np.int8), name=value.name)
    assert dialect.rewrite(model)["static"] == 5
