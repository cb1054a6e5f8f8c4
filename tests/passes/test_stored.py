"""weights: stored puts a checkpoint's own integers and scales into the graph, and computes what they stand for."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

from medcompile import backends, cache, onnx_files, sources, stored
from medcompile.errors import QuantizeError
from medcompile.models import llama
from medcompile.passes.export import export
from medcompile.passes.quantize import Quantize
from medcompile.passes.simplify import Simplify
from medcompile.program import Context, Graph, Program, Silent
from medcompile.rewrites import fresh_attention
from medcompile.spec import Precision, Variant
from tests import decoders, quantized_checkpoints
from tests.quantized_checkpoints import FORMS, Layer

STORED = Variant("stored", weights=Precision.STORED)


@dataclass
class Made:
    """A checkpoint in one form, and its program: exported once for all forms, whose graphs differ in weights alone."""

    folder: Path
    layers: dict[str, Layer]
    program: Program

    @property
    def checkpoint(self) -> sources.Checkpoint:
        return sources.resolve(f"path:{self.folder}", cache=self.folder / "cache")

    def quantized(self, variant: Variant = STORED) -> ir.Model:
        return Quantize()(self.program, Context(self.folder, Silent(), variant)).graphs["generate"].model


Make = Callable[[str], Made]


@pytest.fixture(scope="module")
def make(tmp_path_factory: pytest.TempPathFactory) -> Make:
    made: dict[str, Made] = {}
    exported: list[Program] = []

    def find(name: str) -> Made:
        if name not in made:
            folder = tmp_path_factory.mktemp(name)
            layers = quantized_checkpoints.write(name, folder)
            checkpoint = sources.resolve(f"path:{folder}", cache=folder / "cache")
            if not exported:
                exported.append(export(llama.FAMILY, checkpoint, decoders.OPTIONS))
            program = Simplify()(rebound(exported[0], checkpoint), Context(Path(), Silent()))
            made[name] = Made(folder, layers, program)
        return made[name]

    return find


def rebound(program: Program, checkpoint: sources.Checkpoint) -> Program:
    """An exported program over another checkpoint's weights."""
    refs, kept = sources.tensors(checkpoint), sources.stored(checkpoint)
    graph = program.graphs["generate"]
    model = graph.model.clone()
    table = {}
    for name, value in model.graph.initializers.items():
        old = value.const_value
        if isinstance(old, ir.ExternalTensor):
            theirs = name if name in refs else f"model.{name}"
            ref = refs[theirs]
            value.const_value = ir.ExternalTensor(
                ref.file.name, ref.offset, ref.nbytes, old.dtype, shape=old.shape, name=name, base_dir=ref.file.parent
            )
            if theirs in kept:
                table[name] = kept[theirs]
    assert len(table) == len(program.stored["generate"])
    return replace(program, graphs={"generate": Graph(graph.spec, model)}, stored={"generate": table})


def weight_of(model: ir.Model, layer: str) -> list[Any]:
    """The arrays that the layer's DequantizeLinear reads, and the node."""
    name = f"{layer.removeprefix('model.')}/weight_dequantize"
    (node,) = [n for n in model.graph if n.name == name]
    return [node, *(value.const_value.numpy() for value in node.inputs)]


def logits(model: ir.Model, ids: np.ndarray[Any, Any], folder: Path) -> np.ndarray[Any, Any]:
    """Of every token of one sequence, by ONNX Runtime with no rewriting of its own."""
    import onnxruntime

    plain = model.clone()
    fresh_attention.rewrite(plain)
    onnx_files.save({"plain": plain}, folder)
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(folder / "plain.onnx", options, providers=["CPUExecutionProvider"])
    rows = np.arange(len(ids))
    starts = np.array([0, len(ids)], np.int32)
    feeds = {"input_ids": ids, "positions": rows, "query_starts": starts, "logit_rows": rows}
    (found,) = session.run(None, fresh_attention.feeds_of(plain, feeds))
    return found


@pytest.mark.parametrize("name", FORMS)
def test_the_graph_holds_the_very_codes_zero_points_and_scales(name: str, make: Make) -> None:
    layers, model = make(name).layers, make(name).quantized()
    for layer, written in layers.items():
        if FORMS[name].config.get("quant_method") == "compressed-tensors" and "dynamic" in name and "w8a8" in name:
            codes = model.graph.initializers[f"{layer.removeprefix('model.')}/MatMul/weight"].const_value.numpy()
            scales = model.graph.initializers[f"{layer.removeprefix('model.')}/MatMul/weight_scale"]
            np.testing.assert_array_equal(codes, np.where(written.scales == 0, 0, written.codes))
            np.testing.assert_array_equal(scales.const_value.numpy(), written.scales[0])
            continue
        _, codes, scales, *zeros = weight_of(model, f"{layer}/MatMul")
        order = np.argsort(written.groups, kind="stable")
        blocks = len(written.scales)
        expected = (written.codes[order].reshape(blocks, -1, written.codes.shape[1]) - written.zeros[:, None]).astype(
            np.float32
        )
        expected[:, :, :] *= (written.scales != 0)[:, None]  # what a scale of 0 hides is anything
        moved = np.asarray(zeros[0], np.float32) if zeros else np.float32(0)
        moved = moved.reshape(-1, 1, moved.shape[-1]) if moved.ndim else moved
        np.testing.assert_array_equal(codes.astype(np.float32).reshape(expected.shape) - moved, expected)
        np.testing.assert_array_equal(np.broadcast_to(scales, written.scales.shape), written.scales.astype(np.float32))
        if FORMS[name].zero is None and "int8" not in name:
            np.testing.assert_array_equal(zeros[0].astype(int), written.zeros + (8 if name.startswith("ct") else 0))


@pytest.mark.parametrize(
    ("name", "dtype", "attributes", "inputs"),
    [
        ("gptq", "INT4", {"axis": 0, "block_size": 32}, 2),
        ("awq", "UINT4", {"axis": 0, "block_size": 32}, 3),
        ("gptq-channel", "INT4", {"axis": 1}, 3),
        ("gptq-int8", "INT8", {"axis": 0, "block_size": 32}, 2),
        ("gptq-int8-zeros", "INT8", {"axis": 0, "block_size": 32}, 3),
        ("ct-int8", "INT8", {"axis": 1}, 3),
        ("ct-fp8-static", "FLOAT8E4M3FN", {}, 3),
        ("ct-fp8-dynamic", "FLOAT8E4M3FN", {"axis": 1}, 3),
    ],
)
def test_each_form_is_one_dequantize_linear(
    name: str, dtype: str, attributes: dict[str, int], inputs: int, make: Make
) -> None:
    layers, model = make(name).layers, make(name).quantized()
    for layer in layers:
        node, *arrays = weight_of(model, f"{layer}/MatMul")
        assert node.inputs[0].dtype == ir.DataType[dtype]
        assert {k: a.value for k, a in node.attributes.items()} == attributes
        assert len(arrays) == inputs


def test_layers_that_read_one_input_share_one_gather(make: Make) -> None:
    layers, model = make("gptq-order").layers, make("gptq-order").quantized()
    gathers = [n for n in model.graph if "by_block" in (n.name or "")]
    assert len(gathers) == 2 * 4  # of q, k and v; of o; of gate and up; of down
    assert [len(n.outputs[0].uses()) for n in gathers] == [3, 1, 2, 1] * 2
    order = gathers[0].inputs[1].const_value.numpy()
    np.testing.assert_array_equal(order, np.argsort(layers["model.layers.0.self_attn.q_proj"].groups, kind="stable"))


def test_layers_in_order_have_no_gather_and_kept_ones_stay_in_float(make: Make) -> None:
    layers = make("gptq").layers
    model = make("gptq").quantized(replace(STORED, keep=("layers.0.mlp.*",)))
    assert not [n for n in model.graph if "by_block" in (n.name or "")]
    made = [n for n in model.graph if n.op_type == "DequantizeLinear"]
    assert len(made) == len(layers) - 3


@pytest.mark.parametrize("name", [n for n in FORMS if "w8a8" not in n and n != "ct-fp8-static"])
def test_logits_are_those_of_the_reference_to_rounding_of_floats(name: str, make: Make, tmp_path: Path) -> None:
    checkpoint, model = make(name).checkpoint, make(name).quantized()
    ids = np.random.default_rng(0).integers(3, decoders.VOCABULARY, 20)
    with llama.FAMILY.reference(checkpoint, "generate", decoders.OPTIONS) as reference:
        (expected,) = reference.run({"input_ids": ids}).values()
    np.testing.assert_allclose(logits(model, ids, tmp_path), expected, atol=2e-4 * np.abs(expected).max())


@pytest.mark.parametrize(
    ("name", "dtype", "zero"), [("ct-w8a8-static", "INT8", -5), ("ct-fp8-static", "FLOAT8E4M3FN", 0)]
)
def test_static_inputs_are_rounded_with_the_stored_scale_and_zero_point(
    name: str, dtype: str, zero: int, make: Make
) -> None:
    model = make(name).quantized()
    nodes = [n for n in model.graph if n.op_type == "QuantizeLinear"]
    assert len(nodes) == 2 * 4
    for node in nodes:
        assert node.inputs[1].const_value.numpy() == np.float32(0.03125)
        assert node.inputs[2].dtype == ir.DataType[dtype]
        assert float(node.inputs[2].const_value.numpy()) == zero
        assert [use.node.op_type for use in node.outputs[0].uses()] == ["DequantizeLinear"]


def test_dynamic_inputs_are_rounded_per_token(make: Make) -> None:
    layers, model = make("ct-w8a8-dynamic").layers, make("ct-w8a8-dynamic").quantized()
    products = [n for n in model.graph if n.op_type == "MatMulInteger"]
    assert len(products) == len(layers)
    assert len({n.inputs[0] for n in products}) == 2 * 4


def test_the_table_survives_the_cache(make: Make, tmp_path: Path) -> None:
    before = make("gptq-order-zeros").program
    cache.write_program(before, tmp_path)
    after = cache.read_program(tmp_path)
    assert after.stored.keys() == {"generate"}
    assert after.stored["generate"].keys() == before.stored["generate"].keys()
    for name, linear in after.stored["generate"].items():
        arrays = stored.to_arrays({name: linear})
        expected = stored.to_arrays({name: before.stored["generate"][name]})
        assert arrays.keys() == expected.keys()
        for part, array in arrays.items():
            np.testing.assert_array_equal(array, expected[part])


@pytest.mark.parametrize(
    "more", [{"activations": Precision.INT8}, {"block_size": 32}, {"method": "awq"}, {"dynamic": True}]
)
def test_stored_weights_take_no_other_format(more: dict[str, Any], make: Make) -> None:
    with pytest.raises(QuantizeError, match="the formats that the checkpoint gave them"):
        make("gptq").quantized(replace(STORED, **more))


def test_a_checkpoint_of_floats_has_nothing_stored(make: Make, tmp_path: Path) -> None:
    program = replace(make("gptq").program, stored={})
    with pytest.raises(QuantizeError, match="weights are floats") as caught:
        Quantize()(program, Context(tmp_path, Silent(), STORED))
    assert "int4" in caught.value.fix


@pytest.mark.parametrize("target", ["openvino-cpu", "onnxruntime-cpu"])
@pytest.mark.parametrize("name", ["awq", "gptq-order"])
def test_backends_run_stored_decoders_near_the_reference(name: str, target: str, make: Make, tmp_path: Path) -> None:
    graph = make(name).program.graphs["generate"]
    for folder in ("graph", "built"):
        (tmp_path / folder).mkdir()
    onnx_files.save({"generate": make(name).quantized()}, tmp_path / "graph")
    backend = backends.for_target(target)
    built = backend.build(
        tmp_path / "graph/generate.onnx", graph.spec, STORED, backend.probe(target), tmp_path / "built"
    )
    running = backends.load_decoder(backend, tmp_path / "built" / built.file, STORED, 1, 8)
    ids = np.random.default_rng(0).integers(3, decoders.VOCABULARY, 24)
    (found,) = decoders.chunked_logits(running, [ids])
    running.close()
    with llama.FAMILY.reference(make(name).checkpoint, "generate", decoders.OPTIONS) as reference:
        (expected,) = reference.run({"input_ids": ids}).values()
    assert np.corrcoef(found.ravel(), expected.ravel())[0, 1] > 0.99
