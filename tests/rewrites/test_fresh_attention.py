"""Fresh attention: the standard operators agree with the numpy reference wherever no sequence has a past."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest

from medcompile.kernels.reference import paged_attention
from medcompile.rewrites import fresh_attention
from medcompile.run_onnx import run_onnx
from tests.kernels import batches

HEADS = {"heads": 6, "kv_heads": 2, "head_dim": 8}
SCALE = 0.3
FACE = {
    "q": (ir.DataType.FLOAT, ["tokens", 48]),
    "k": (ir.DataType.FLOAT, ["tokens", 16]),
    "v": (ir.DataType.FLOAT, ["tokens", 16]),
    "k_pool": (ir.DataType.FLOAT, ["blocks", 2, "block_size", 8]),
    "v_pool": (ir.DataType.FLOAT, ["blocks", 2, "block_size", 8]),
    "query_starts": (ir.DataType.INT32, ["bounds"]),
    "past_lens": (ir.DataType.INT32, ["sequences"]),
    "block_table": (ir.DataType.INT32, ["sequences", "table"]),
}


def paged(*windows: int, dtype: ir.DataType = ir.DataType.FLOAT) -> ir.Model:
    """One attention node over the same inputs per window; the last output is called out, the others out.0 and so on."""
    inputs = [
        ir.Value(name=n, type=ir.TensorType(dtype if t == ir.DataType.FLOAT else t), shape=ir.Shape(s))
        for n, (t, s) in FACE.items()
    ]
    nodes = []
    for layer, window in enumerate(windows):
        attributes = HEADS | {"scale": SCALE, "sliding_window": window, "layer": layer}
        node = ir.node("PagedAttention", inputs, attributes, domain="medcompile", name=f"layer.{layer}")
        node.outputs[0].name = "out" if layer == len(windows) - 1 else f"out.{layer}"
        node.outputs[0].type, node.outputs[0].shape = ir.TensorType(dtype), inputs[0].shape
        nodes.append(node)
    outputs = [n.outputs[0] for n in nodes]
    graph = ir.Graph(inputs, outputs, nodes=nodes, opset_imports={"": 21, "medcompile": 1}, name="attention")
    return ir.Model(graph, ir_version=10)


def both(lengths: list[int], window: int, dtype: ir.DataType = ir.DataType.FLOAT) -> tuple[np.ndarray, np.ndarray]:
    """(what the rewritten graph gives, what the reference gives) for fresh sequences of these lengths."""
    drawn = batches.draw([(0, n) for n in lengths], **HEADS, block_size=16, dtype=dtype.numpy(), seed=len(lengths))
    expected = paged_attention(*drawn.arrays, **HEADS, scale=SCALE, sliding_window=window)
    model = paged(window, dtype=dtype)
    assert fresh_attention.rewrite(model) == 1
    feeds = fresh_attention.feeds_of(model, dict(zip(FACE, drawn.arrays, strict=True)))
    return next(run_onnx(model, iter([feeds]), ("out",)))["out"], expected


@pytest.mark.parametrize("window", [0, 1, 5, 100])
@pytest.mark.parametrize("lengths", [[1], [40], [3, 17, 1, 9], [0, 5, 0, 0, 7, 0]])
def test_ragged_fresh_sequences_agree_with_the_reference(lengths: list[int], window: int) -> None:
    given, expected = both(lengths, window)
    np.testing.assert_allclose(given, expected, atol=2e-6)


def test_a_sequence_is_blind_to_its_neighbours() -> None:
    alone, _ = both([9], 0)
    model = paged(0)
    fresh_attention.rewrite(model)
    first = batches.draw([(0, 9)], **HEADS, block_size=16, seed=1)
    q, k, v = first.arrays[:3]
    rows = {"q": np.tile(q, (2, 1)), "k": np.tile(k, (2, 1)), "v": np.tile(v, (2, 1))}
    feeds = rows | {"query_starts": np.array([0, 9, 18], np.int32)}
    out = next(run_onnx(model, iter([feeds]), ("out",)))["out"]
    np.testing.assert_allclose(out[:9], out[9:], atol=1e-6)
    np.testing.assert_allclose(out[:9], alone, atol=1e-6)


def test_sixteen_bit_graphs_round_only_where_the_operator_does() -> None:
    given, expected = both([3, 17, 1], 0, ir.DataType.FLOAT16)
    assert given.dtype == np.float16
    np.testing.assert_allclose(given.astype(np.float32), expected.astype(np.float32), rtol=1e-3, atol=1e-6)


def test_layers_of_one_window_share_a_mask_and_paging_leaves_the_face() -> None:
    model = paged(0, 4, 0)
    assert fresh_attention.rewrite(model) == 3
    assert [n.op_type for n in model.graph].count("Where") == 2
    assert [v.name for v in model.graph.inputs] == ["q", "k", "v", "query_starts"]
    assert [v.name for v in model.graph.outputs] == ["out.0", "out.1", "out"]


def test_a_graph_without_paged_attention_stays_as_it_is() -> None:
    unused = ir.Value(name="unused", type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape([2]))
    node = ir.node("Identity", [ir.Value(name="x", type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape([2]))])
    graph = ir.Graph([*node.inputs, unused], node.outputs, nodes=[node], opset_imports={"": 21})
    model = ir.Model(graph, ir_version=10)
    assert fresh_attention.rewrite(model) == 0
    assert len(model.graph.inputs) == 2
