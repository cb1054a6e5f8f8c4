"""Simplify: the one shape of graph that later passes and backends rely on."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from safetensors.numpy import load_file, save_file

from medcompile import onnx_files
from medcompile.passes.derived import Derived
from medcompile.passes.linear import linear_groups
from medcompile.program import Graph
from medcompile.spec import Stage
from tests import simplified, tiny

# Per layer query, key, value, attention output, intermediate and output; then the task's own.
LINEARS = {
    "embed": [],
    "token-classification": ["classifier/MatMul"],
    "sequence-classification": ["pooler.dense/MatMul", "classifier/MatMul"],
    "fill-mask": ["cls.predictions.transform.dense/MatMul", "cls.predictions.decoder/MatMul"],
}
LAYER = [
    *(f"attention.self.{part}/MatMul" for part in ("query", "key", "value")),
    "attention.output.dense/MatMul",
    "intermediate.dense/MatMul",
    "output.dense/MatMul",
]


def graph(task: str) -> ir.Model:
    return simplified.simplified().graphs[task].model


@pytest.fixture(params=tiny.TASKS)
def model(request: pytest.FixtureRequest) -> ir.Model:
    return graph(request.param)


def test_the_program_is_simplified_and_its_source_untouched() -> None:
    assert simplified.simplified().stage is Stage.SIMPLIFIED
    kept: Graph = simplified.exported().graphs["sequence-classification"]
    assert any(node.op_type == "Transpose" and node.inputs[0].is_initializer() for node in kept.model.graph)


@pytest.mark.parametrize("task", tiny.TASKS)
def test_every_linear_layer_is_a_matmul_named_after_its_module(task: str) -> None:
    names = [node.name for group in linear_groups(graph(task)) for node in group.nodes]
    layers = [f"encoder.layer.{i}.{part}" for i in range(tiny.LAYERS) for part in LAYER]
    assert sorted(names) == sorted(layers + LINEARS[task])


def test_a_16_bit_checkpoint_gives_the_same_linear_layers(tmp_path: Path) -> None:
    folder = tiny.write_checkpoint(tmp_path / "half")
    stored = load_file(folder / "model.safetensors")
    save_file({name: t.astype(np.float16) for name, t in stored.items()}, folder / "model.safetensors")
    halved = simplified.simplified_from(folder, "token-classification").graphs["token-classification"].model
    names = [node.name for group in linear_groups(halved) for node in group.nodes]
    assert sorted(names) == sorted(n.name for g in linear_groups(graph("token-classification")) for n in g.nodes)


def test_weights_lie_input_first_and_are_not_in_memory(model: ir.Model) -> None:
    for group in linear_groups(model):
        for node in group.nodes:
            weight = node.inputs[1]
            assert weight.is_initializer()
            assert weight.const_value.shape[0] == group.channels
            assert isinstance(weight.const_value, Derived)
            assert weight.name == f"{node.name.removesuffix('/MatMul')}.weight.T"


def test_no_transpose_or_cast_of_a_weight_and_no_gemm_is_left(model: ir.Model) -> None:
    assert "Gemm" not in {node.op_type for node in model.graph}
    for node in model.graph:
        if node.op_type in ("Transpose", "Cast"):
            assert not node.inputs[0].is_initializer(), node.name


def test_shapes_of_reshapes_are_constant(model: ir.Model) -> None:
    reshapes = [node for node in model.graph if node.op_type == "Reshape"]
    assert len(reshapes) == 4 * tiny.LAYERS
    assert all(node.inputs[1].const_value is not None for node in reshapes)


def test_layer_norm_gelu_and_softmax_are_single_nodes(model: ir.Model) -> None:
    ops = [node.op_type for node in model.graph]
    extra = model.graph.name == "fill-mask"
    assert ops.count("LayerNormalization") == 1 + 2 * tiny.LAYERS + extra
    assert ops.count("Gelu") == tiny.LAYERS + extra
    assert ops.count("Softmax") == tiny.LAYERS
    assert not {"Erf", "Pow", "Sqrt", "Identity", "Dropout"} & set(ops)


def test_dynamic_axes_have_the_names_of_the_face_alone(model: ir.Model) -> None:
    values = [v for node in model.graph for v in node.outputs] + list(model.graph.inputs)
    assert all(value.dtype is not None and value.shape is not None for value in values)
    dims = {dim if isinstance(dim, int) else dim.value for value in values for dim in value.shape}
    assert {dim for dim in dims if not isinstance(dim, int)} == {"batch", "sequence"}


def test_the_graph_passes_the_checker_with_full_inference(model: ir.Model, tmp_path: Path) -> None:
    assert model.graph.opset_imports == {"": 21}
    onnx_files.save({"graph": model}, tmp_path)
    onnx.checker.check_model(str(tmp_path / "graph.onnx"), full_check=True)


def test_names_are_unique_and_say_where_they_come_from(model: ir.Model) -> None:
    names = [node.name for node in model.graph]
    assert len(set(names)) == len(names)
    assert not [n for n in names if n.startswith(("node_", "bert.", "_"))]
    assert not [n for n in model.graph.initializers if n.startswith(("model.", "bert."))]
    assert {"embeddings.LayerNorm/LayerNormalization", "encoder.layer.1.attention.self/Softmax"} <= set(names)


def test_simplifying_again_changes_nothing() -> None:
    from medcompile.passes.simplify import Simplify

    once = simplified.simplified()
    twice = Simplify()(once, simplified.context())
    for task in tiny.TASKS:
        assert [n.name for n in twice.graphs[task].model.graph] == [n.name for n in once.graphs[task].model.graph]
