"""TensorRT's dialect, as a graph: paged attention, and products in parts."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import TensorProto, helper, numpy_helper

from medcompile.backends import _tensorrt_report
from medcompile.errors import BackendError
from medcompile.kernels.launches import Face
from medcompile.rewrites import tensorrt
from medcompile.run_onnx import run_onnx
from tests.kernels import decoders

POOLS = [f"{name}.{layer}" for layer in range(2) for name in ("k_pool", "v_pool")]


def decoder(folder: Path, *, cast_pools: bool = False) -> ir.Model:
    decoders.write(folder / "generate.onnx", cast_pools=cast_pools)
    return ir.load(folder / "generate.onnx")


@pytest.mark.parametrize("cast_pools", [False, True])
def test_nodes_get_their_pools_as_outputs_and_pools_come_uncast_in_the_kernels_dtype(
    tmp_path: Path, cast_pools: bool
) -> None:
    model = decoder(tmp_path, cast_pools=cast_pools)
    face = tensorrt.rewrite(model, "float16", "float16", 32)
    assert face == Face(4, 2, 32, 32, "float16", "float16")
    nodes = [node for node in model.graph if node.op_type == "PagedAttention"]
    assert [value.name for node in nodes for value in node.inputs[3:5] if value] == POOLS
    assert [value.name for node in nodes for value in node.outputs[1:]] == [f"{pool}/updated" for pool in POOLS]
    inputs = {value.name: value for value in model.graph.inputs}
    assert {inputs[pool].dtype for pool in POOLS} == {ir.DataType.FLOAT16}
    assert {str(inputs[pool].shape) for pool in POOLS} == {"[blocks,2,32,32]"}
    assert [value.name for value in model.graph.outputs] == ["logits"]
    assert not [node for node in model.graph if node.op_type == "Cast" and node.outputs[0].name != "logits"]


def test_a_graph_without_paged_attention_stays_as_it_is(tmp_path: Path) -> None:
    model = decoder(tmp_path)
    for node in [node for node in model.graph if node.op_type == "PagedAttention"]:
        node.op_type = "SomethingElse"
    assert tensorrt.rewrite(model, "float16", "float16", 32) is None
    assert all(len(node.outputs) == 1 for node in model.graph)


def test_layers_of_unequal_heads_are_refused(tmp_path: Path) -> None:
    model = decoder(tmp_path)
    first = next(node for node in model.graph if node.op_type == "PagedAttention")
    first.attributes["heads"] = ir.AttrInt64("heads", 8)
    with pytest.raises(BackendError, match="attention layers differ"):
        tensorrt.rewrite(model, "float16", "float16", 32)


def test_a_pool_that_the_graph_computes_is_refused(tmp_path: Path) -> None:
    model = decoder(tmp_path)
    first = next(node for node in model.graph if node.op_type == "PagedAttention")
    first.replace_input_with(3, first.inputs[1])
    with pytest.raises(BackendError, match=r"input 3 of layers\.0\.attention"):
        tensorrt.rewrite(model, "float16", "float16", 32)


def fused(folder: Path, *, quantized: bool = True, read_twice: bool = False) -> Path:
    """x [batch, 4] times one int8 weight [4, 6] and a bias, split into three; with quantized=False in float."""
    rng = np.random.default_rng(0)
    weight, scale = rng.integers(-127, 128, (4, 6), np.int8), rng.uniform(0.01, 0.02, 6).astype(np.float32)
    stored = {"weight": weight, "scale": scale, "zeros": np.zeros(6, np.int8), "step": np.float32(0.05)}
    stored |= {"zero": np.int8(0), "bias": rng.normal(size=6).astype(np.float32)}
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "step", "zero"], ["q"]),
        helper.make_node("DequantizeLinear", ["q", "step", "zero"], ["dq"]),
        helper.make_node("DequantizeLinear", ["weight", "scale", "zeros"], ["w"], axis=1),
        helper.make_node("MatMul", ["dq" if quantized else "x", "w"], ["product"], "qkv/MatMul"),
        helper.make_node("Add", ["product", "bias"], ["sum"], "qkv/Add"),
        helper.make_node("Split", ["sum"], ["a/part", "b/part", "c/part"], axis=1, num_outputs=3),
        *(helper.make_node("Relu", [f"{n}/part"], [n]) for n in "abc"),
        *([helper.make_node("Identity", ["product"], ["d"])] if read_twice else []),
    ]
    outputs = [helper.make_tensor_value_info(n, TensorProto.FLOAT, ["batch", 2]) for n in "abc"]
    outputs += [helper.make_tensor_value_info("d", TensorProto.FLOAT, ["batch", 6])] if read_twice else []
    inputs = [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", 4])]
    initializers = [numpy_helper.from_array(np.asarray(array), name) for name, array in stored.items()]
    graph = helper.make_graph(nodes, "fused", inputs, outputs, initializers)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    onnx.save(onnx.shape_inference.infer_shapes(model), folder / "fused.onnx")
    return folder / "fused.onnx"


def test_a_product_of_integers_that_is_split_becomes_one_product_per_part_with_the_same_numbers(tmp_path: Path) -> None:
    x = np.random.default_rng(1).normal(size=(5, 4)).astype(np.float32)
    model = ir.load(fused(tmp_path))
    before = next(run_onnx(model, iter([{"x": x}]), ("a", "b", "c")))
    assert tensorrt.split_products(model) == 1
    assert [node.op_type for node in model.graph].count("MatMul") == 3
    assert not [node for node in model.graph if node.op_type == "Split"]
    assert {node.name for node in model.graph if node.op_type == "MatMul"} == {f"qkv/MatMul/{i}" for i in range(3)}
    assert [(p.asked, p.size) for p in _tensorrt_report.products(model)] == [("int8 x int8", 8)] * 3
    after = next(run_onnx(model, iter([{"x": x}]), ("a", "b", "c")))
    for name in "abc":
        np.testing.assert_array_equal(after[name], before[name])
    assert tensorrt.split_products(model) == 0


@pytest.mark.parametrize("how", [{"quantized": False}, {"read_twice": True}])
def test_a_product_in_float_or_one_that_is_read_whole_is_not_split(tmp_path: Path, how: dict[str, bool]) -> None:
    model = ir.load(fused(tmp_path, **how))
    assert tensorrt.split_products(model) == 0
    assert [node.op_type for node in model.graph].count("MatMul") == 1
