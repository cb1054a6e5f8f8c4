"""ONNX Runtime's paged attention, as its own checker sees it: it has no kernel for a CPU, so nothing runs here."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import onnx_ir as ir
import pytest

from medcompile.errors import BackendError
from medcompile.rewrites import onnxruntime_cuda
from tests.kernels import decoders


def opened(model: ir.Model) -> Any:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    data = ir.to_proto(model).SerializeToString()
    return onnxruntime.InferenceSession(data, options, providers=["CPUExecutionProvider"])


@pytest.mark.parametrize("cast_pools", [False, True])
def test_its_checker_takes_the_graph_and_misses_kernels_alone(tmp_path: Path, cast_pools: bool) -> None:
    from onnxruntime.capi.onnxruntime_pybind11_state import NotImplemented as NoKernel

    """In bfloat16: around a float16 node without a kernel the library casts to float32 before it looks again."""
    decoders.write(tmp_path / "generate.onnx", dtype="BFLOAT16", cast_pools=cast_pools)
    model = ir.load(tmp_path / "generate.onnx")
    assert onnxruntime_cuda.rewrite_attention(model, "bfloat16") == 2
    with pytest.raises(NoKernel, match="Could not find an implementation"):
        opened(model)
    inputs = {value.name: value for value in model.graph.inputs}
    assert str(inputs["k_pool.0"].shape) == "[blocks,block_size,2,32]"
    assert inputs["v_pool.1"].dtype == ir.DataType.BFLOAT16
    windows = [n.attributes["local_window_size"].as_int() for n in model.graph if n.op_type == "PagedAttention"]
    assert windows == [-1, 16]


def test_its_checker_refuses_an_attribute_that_the_schema_does_not_know(tmp_path: Path) -> None:
    """So the test above can fail: the checker comes before the search for kernels."""
    from onnxruntime.capi.onnxruntime_pybind11_state import InvalidGraph

    decoders.write(tmp_path / "generate.onnx")
    model = ir.load(tmp_path / "generate.onnx")
    onnxruntime_cuda.rewrite_attention(model, "float16")
    first = next(node for node in model.graph if node.op_type == "PagedAttention")
    first.attributes["kv_heads"] = ir.AttrInt64("kv_heads", 2)
    with pytest.raises(InvalidGraph, match="Unrecognized attribute: kv_heads"):
        opened(model)


def test_float32_is_refused(tmp_path: Path) -> None:
    decoders.write(tmp_path / "generate.onnx", dtype="FLOAT")
    with pytest.raises(BackendError, match="16 bits only"):
        onnxruntime_cuda.rewrite_attention(ir.load(tmp_path / "generate.onnx"), "float32")


def test_a_graph_without_paged_attention_stays_as_it_is() -> None:
    x = ir.Input("x", ir.Shape(["n"]), ir.TensorType(ir.DataType.FLOAT))
    node = ir.node("Relu", [x])
    graph = ir.Graph([x], node.outputs, nodes=[node], opset_imports={"": 21})
    model = ir.Model(graph, ir_version=10)
    assert onnxruntime_cuda.rewrite_attention(model, "float16") == 0
    assert model.opset_imports == {"": 21}
    assert [node.op_type for node in model.graph] == ["Relu"]
