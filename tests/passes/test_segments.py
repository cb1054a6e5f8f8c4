"""Segments: a graph cut at its linear layers gives, piece after piece, what it gives whole."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir

from medcompile.passes.linear import linear_groups
from medcompile.passes.segments import Running, cut
from medcompile.run_onnx import run_onnx
from tests.passes import gated, two_layers


def through(model: ir.Model, names: tuple[str, ...], feeds: list[dict[str, Any]], run: Any) -> list[dict[str, Any]]:
    runs = [Running(segment, run) for segment in cut(model, names)]
    states: list[Any] = list(feeds)
    for one in runs:
        states = [one(state) for state in states]
    return states


def test_each_group_begins_a_segment_of_its_own() -> None:
    segments = cut(two_layers.program().graphs["tiny"].model, ("logits",))
    assert [[n.name for g in linear_groups(s.model) for n in g.nodes] for s in segments] == [
        [],
        list(two_layers.LAYERS[:2]),
        list(two_layers.LAYERS[2:]),
    ]
    assert [s.made for s in segments] == [("hidden",), ("act",), ("logits",)]
    assert [s.later for s in segments] == [{"hidden", "act", "logits"}, {"act", "logits"}, {"logits"}]


def test_an_encoder_gives_what_it_gives_whole() -> None:
    model, feeds = two_layers.program().graphs["tiny"].model, two_layers.feeds()
    whole = list(two_layers.run_onnx(model, iter(feeds), ("logits",)))
    parts = through(model, ("logits",), feeds, two_layers.run_onnx)
    for expected, found in zip(whole, parts, strict=True):
        assert set(found) == {"logits"}
        np.testing.assert_allclose(found["logits"], expected["logits"], atol=1e-5)


def test_a_decoder_with_paged_attention_gives_what_it_gives_whole() -> None:
    model, feeds = gated.program().graphs["generate"].model, gated.feeds(3)
    parts = through(model, ("logits",), feeds, run_onnx)
    for expected, found in zip(gated.values(model, feeds, ("logits",)), parts, strict=True):
        np.testing.assert_allclose(found["logits"], expected["logits"], atol=1e-4)


def test_an_output_made_early_is_kept_to_the_end_and_the_graph_is_not_changed() -> None:
    model, feeds = two_layers.program().graphs["tiny"].model, two_layers.feeds(8)
    before = ir.to_proto(model)
    (found,) = through(model, ("sum", "logits"), feeds, two_layers.run_onnx)
    assert found["sum"].shape == (8, 8, two_layers.INNER)
    assert ir.to_proto(model) == before


def test_layers_that_read_one_tensor_stand_together_wherever_they_stood() -> None:
    model = two_layers.program().graphs["tiny"].model
    right = next(n for n in model.graph if n.name == two_layers.LAYERS[1])
    after = ir.node("Neg", [right.inputs[0]], name="between")
    between = ir.node("MatMul", [after.outputs[0], model.graph.initializers["left"]], name="between/MatMul")
    late = ir.node("Add", [between.outputs[0], right.outputs[0]], name="late")
    for node, name in ((after, "negative"), (between, "other"), (late, "both")):
        node.outputs[0].name, node.outputs[0].type = name, ir.TensorType(ir.DataType.FLOAT)
        model.graph.insert_before(right, node)
    model.graph.remove(late)
    model.graph.insert_after(right, late)
    model.graph.outputs.append(late.outputs[0])
    names = ("logits", "both")
    segments = cut(model, names)
    assert [[n.name for g in linear_groups(s.model) for n in g.nodes] for s in segments][1:3] == [
        list(two_layers.LAYERS[:2]),
        ["between/MatMul"],
    ]
    (found,) = through(model, names, two_layers.feeds(8), run_onnx)
    (whole,) = run_onnx(model, iter(two_layers.feeds(8)), names)
    for name in names:
        np.testing.assert_allclose(found[name], whole[name], atol=1e-5)
