"""TensorRT's dialect of paged attention, as a graph."""

from __future__ import annotations

from pathlib import Path

import onnx_ir as ir
import pytest

from medcompile.errors import BackendError
from medcompile.kernels.launches import Face
from medcompile.rewrites import tensorrt
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
