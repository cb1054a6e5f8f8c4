"""Cast: 16-bit graphs of float and of quantized ones, valid by the standard and close to float32."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from medcompile import onnx_files
from medcompile.errors import PassError
from medcompile.passes.calibrate import Calibrate
from medcompile.passes.cast import Cast
from medcompile.passes.linear import linear_groups
from medcompile.passes.quantize import Quantize
from medcompile.program import Context, Program, Silent
from medcompile.run_onnx import run_onnx
from medcompile.spec import Precision, Stage, Variant
from tests import simplified, tiny
from tests.runtime import fakes

W8A8 = Variant("int8", weights=Precision.INT8, activations=Precision.INT8)
VARIANTS = {
    "float": None,
    "static": W8A8,
    "smooth": Variant("s", weights=Precision.INT8, activations=Precision.INT8, method="smoothquant", smoothing=0.5),
    "dynamic": Variant("d", weights=Precision.INT8, activations=Precision.INT8, dynamic=True),
    "int4": Variant("i4", weights=Precision.INT4, block_size=16),
}
LOWS = {Precision.FLOAT16: ir.DataType.FLOAT16, Precision.BFLOAT16: ir.DataType.BFLOAT16}
TASK = "token-classification"
GIVEN = simplified.feeds(4, 16, len(fakes.VOCABULARY))


def one_task(task: str = TASK) -> Program:
    program = simplified.simplified()
    return program.with_graphs({task: program.graphs[task]}, program.stage)


def lowered(kind: str, precision: Precision, keep: tuple[str, ...] = ()) -> Program:
    return Cast(precision, keep)(quantized(kind), simplified.context())


def quantized(kind: str) -> Program:
    variant = VARIANTS[kind]
    program = one_task()
    if variant is None:
        return program

    def batches(_: str) -> Iterator[dict[str, np.ndarray]]:
        return iter([simplified.feeds(12, n, len(fakes.VOCABULARY)) for n in (9, 12, 16)])

    ctx = Context(Path(), Silent(), variant, batches, run_onnx)
    if variant.needs_statistics:
        program = Calibrate()(program, ctx)
    return Quantize()(program, ctx)


def run_openvino(program: Program, folder: Path) -> np.ndarray:
    import openvino as ov

    onnx_files.save({TASK: program.graphs[TASK].model}, folder)
    compiled = ov.Core().compile_model(folder / f"{TASK}.onnx", "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    return np.asarray(compiled(dict(GIVEN))[0])


def error(answer: np.ndarray, expected: np.ndarray) -> float:
    real = GIVEN["attention_mask"].astype(bool)
    return float(np.linalg.norm(answer[real] - expected[real]) / np.linalg.norm(expected[real]))


def limit(kind: str, rounding: float) -> float:
    """The largest error against the float32 graph without integers: what the integers cost alone, and some more."""
    plain = simplified.run(one_task().graphs[TASK].model, GIVEN)
    integers = 0.0 if kind == "float" else error(simplified.run(quantized(kind).graphs[TASK].model, GIVEN), plain)
    return 1.5 * integers + rounding


@pytest.mark.parametrize("kind", VARIANTS)
def test_float16_adds_little_error_in_onnx_runtime(kind: str) -> None:
    result = lowered(kind, Precision.FLOAT16)
    assert result.stage is Stage.TYPED
    plain = simplified.run(one_task().graphs[TASK].model, GIVEN)
    assert error(simplified.run(result.graphs[TASK].model, GIVEN), plain) < limit(kind, 0.003)


@pytest.mark.parametrize("kind", ["float", "static", "dynamic"])
@pytest.mark.parametrize("precision", LOWS)
def test_16_bits_add_little_error_in_openvino(kind: str, precision: Precision, tmp_path: Path) -> None:
    plain = simplified.run(one_task().graphs[TASK].model, GIVEN)
    most = limit(kind, 0.003 if precision is Precision.FLOAT16 else 0.02)
    assert error(run_openvino(lowered(kind, precision), tmp_path), plain) < most


@pytest.mark.parametrize("kind", VARIANTS)
@pytest.mark.parametrize("precision", LOWS)
def test_types_agree_by_the_standard(kind: str, precision: Precision, tmp_path: Path) -> None:
    model = lowered(kind, precision).graphs[TASK].model
    onnx_files.save({TASK: model}, tmp_path)
    onnx.checker.check_model(str(tmp_path / f"{TASK}.onnx"), full_check=True)
    # What the standard infers from the inputs alone is what the graph says.
    proto = onnx.load(tmp_path / f"{TASK}.onnx", load_external_data=False)
    said = {v.name: v.type.tensor_type.elem_type for v in proto.graph.value_info}
    del proto.graph.value_info[:]
    inferred = onnx.shape_inference.infer_shapes(proto, strict_mode=True).graph.value_info
    assert len(inferred) > 50
    assert {v.name: v.type.tensor_type.elem_type for v in inferred} == {v.name: said[v.name] for v in inferred}


@pytest.mark.parametrize("task", tiny.TASKS)
@pytest.mark.parametrize("precision", LOWS)
def test_the_face_stays_float32_and_fragile_operators_compute_in_it(task: str, precision: Precision) -> None:
    model = Cast(precision)(one_task(task), simplified.context()).graphs[task].model
    spec = simplified.simplified().graphs[task].spec
    assert [(v.name, v.dtype) for v in model.graph.outputs] == [(spec.outputs[0].name, ir.DataType.FLOAT)]
    assert [v.name for v in model.graph.inputs] == [t.name for t in spec.inputs]
    for node in model.graph:
        if node.op_type in ("LayerNormalization", "Softmax", "ReduceSum"):
            assert {v.dtype for v in (*node.inputs, *node.outputs)} <= {ir.DataType.FLOAT, ir.DataType.INT64}
        if node.op_type == "MatMul":
            assert {v.dtype for v in (*node.inputs, *node.outputs)} == {LOWS[precision]}, node.name


def test_weights_of_a_float16_int8_graph_come_out_in_float16() -> None:
    model = lowered("static", Precision.FLOAT16).graphs[TASK].model
    weights = [n for n in model.graph if n.op_type == "DequantizeLinear" and n.inputs[0].is_initializer()]
    assert len(weights) == 6 * tiny.LAYERS + 1
    for node in weights:
        assert node.inputs[0].dtype is ir.DataType.INT8
        assert node.inputs[1].dtype is node.outputs[0].dtype is ir.DataType.FLOAT16
    for node in model.graph:
        if node.op_type == "QuantizeLinear":
            assert node.inputs[0].dtype is node.inputs[1].dtype


def test_a_scale_that_float16_would_lose_stays_float32() -> None:
    program = quantized("static")
    first = next(n for n in program.graphs[TASK].model.graph if n.op_type == "QuantizeLinear")
    first.inputs[1].const_value = ir.tensor(np.float32(3e-7), name=first.inputs[1].name)
    model = Cast(Precision.FLOAT16)(program, simplified.context()).graphs[TASK].model
    node = next(n for n in model.graph if n.name == first.name)
    assert node.inputs[0].dtype is node.inputs[1].dtype is ir.DataType.FLOAT
    simplified.run(model, GIVEN)  # the matching DequantizeLinear takes a float32 scale, too


def test_the_rounding_of_dynamic_int8_stays_float32() -> None:
    model = lowered("dynamic", Precision.BFLOAT16).graphs[TASK].model
    rounding = [n for n in model.graph if n.name.endswith(("/divide", "/round", "/row_scale", "/by_row", "/by_column"))]
    assert len(rounding) > 5 * tiny.LAYERS
    assert {v.dtype for n in rounding for v in (*n.inputs, *n.outputs)} == {ir.DataType.FLOAT}
    biases = [n for n in model.graph if n.name.endswith("query/Add")]
    assert {n.outputs[0].dtype for n in biases} == {ir.DataType.BFLOAT16}


def test_kept_layers_stay_float32_by_module_or_by_glob() -> None:
    keep = ("encoder.layer.0.output.dense", "encoder.layer.1.attention.self.*/MatMul")
    model = lowered("float", Precision.FLOAT16, keep).graphs[TASK].model
    kept = {n.name for n in model.graph if n.op_type == "MatMul" and n.outputs[0].dtype is ir.DataType.FLOAT}
    assert kept == {"encoder.layer.0.output.dense/MatMul"} | {
        f"encoder.layer.1.attention.self.{part}/MatMul" for part in ("query", "key", "value")
    }


def test_a_weight_beyond_float16_is_named_when_it_is_written(tmp_path: Path) -> None:
    program = one_task()
    model = program.graphs[TASK].model.clone()
    node = linear_groups(model)[0].nodes[0]
    weight = node.inputs[1].const_value.numpy().copy()
    weight[2, 3] = 70000
    name = "encoder.layer.0.attention.self.query.weight"
    large = ir.Value(name="large", type=node.inputs[1].type, shape=node.inputs[1].shape)
    large.const_value = ir.tensor(weight, name=name)
    model.graph.register_initializer(large)
    node.replace_input_with(1, large)
    graph = type(program.graphs[TASK])(program.graphs[TASK].spec, model)
    result = Cast(Precision.FLOAT16)(program.with_graphs({TASK: graph}, program.stage), simplified.context())
    with pytest.raises(PassError, match=f"{name} reaches 70000, beyond float16"):
        onnx_files.save({TASK: result.graphs[TASK].model}, tmp_path)


def test_a_mask_constant_beyond_float16_is_clipped_not_refused() -> None:
    program = one_task()
    model = program.graphs[TASK].model.clone()
    mask = next(
        v
        for v in model.graph.initializers.values()
        if v.dtype is ir.DataType.FLOAT and v.const_value.size == 1 and float(v.const_value.numpy()) == -10000
    )
    mask.const_value = ir.tensor(np.finfo(np.float32).min, name=mask.name)
    graph = type(program.graphs[TASK])(program.graphs[TASK].spec, model)
    changed = program.with_graphs({TASK: graph}, program.stage)
    expected = simplified.run(one_task().graphs[TASK].model, GIVEN)
    result = Cast(Precision.FLOAT16)(changed, simplified.context())
    assert error(simplified.run(result.graphs[TASK].model, GIVEN), expected) < 0.003


def test_the_program_that_went_in_keeps_its_types() -> None:
    before = [(v.name, v.dtype) for n in one_task().graphs[TASK].model.graph for v in n.outputs]
    lowered("float", Precision.BFLOAT16)
    assert [(v.name, v.dtype) for n in one_task().graphs[TASK].model.graph for v in n.outputs] == before


def test_float32_leaves_the_graph_alone() -> None:
    program = one_task()
    result = Cast(Precision.FLOAT32)(program, simplified.context())
    assert result.stage is Stage.TYPED
    assert result.graphs[TASK].model is program.graphs[TASK].model
