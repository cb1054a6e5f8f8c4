"""Quantize: the operators that each kind of variant gives, and how close the result stays to float."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import ml_dtypes
import numpy as np
import onnx_ir as ir
import pytest

from medcompile import cache
from medcompile.errors import QuantizeError
from medcompile.passes.calibrate import Calibrate
from medcompile.passes.edits import constant
from medcompile.passes.quantize import Quantize
from medcompile.program import Program
from medcompile.spec import Precision, Stage, Variant
from tests.passes import two_layers

STATIC = Variant("int8", weights=Precision.INT8, activations=Precision.INT8)
ASYMMETRIC = dataclasses.replace(STATIC, symmetric=False)
DYNAMIC = dataclasses.replace(STATIC, dynamic=True)
WEIGHTS = Variant("w8", weights=Precision.INT8)


def quantized(variant: Variant, arrays: dict[str, np.ndarray] | None = None, method: str = "mse") -> Program:
    program = Calibrate()(two_layers.program(arrays), two_layers.context())
    return Quantize(method)(program, two_layers.context(variant=variant))


def nodes(program: Program, op_type: str) -> list[ir.Node]:
    return [node for node in program.graphs["tiny"].model.graph if node.op_type == op_type]


def stored(node: ir.Node, index: int) -> np.ndarray:
    value = node.inputs[index]
    assert value is not None and value.const_value is not None
    return value.const_value.numpy()


def relative_error(program: Program, arrays: dict[str, np.ndarray] | None = None) -> float:
    expected = two_layers.logits(two_layers.program(arrays))
    return float(np.linalg.norm(two_layers.logits(program) - expected) / np.linalg.norm(expected))


@pytest.mark.parametrize("variant", [STATIC, ASYMMETRIC, DYNAMIC, WEIGHTS], ids=["static", "uint8", "dynamic", "w8"])
@pytest.mark.parametrize("method", ["rtn", "smoothquant"])
def test_int8_stays_close_to_float(variant: Variant, method: str) -> None:
    result = quantized(dataclasses.replace(variant, method=method))
    assert result.stage is Stage.QUANTIZED
    assert relative_error(result) < 0.02


def test_symmetric_static_is_what_tensorrt_asks_for() -> None:
    result = quantized(STATIC)
    for node in nodes(result, "QuantizeLinear"):
        assert stored(node, 1).shape == ()
        assert stored(node, 2).dtype == np.int8
        assert stored(node, 2) == 0
    for matmul in nodes(result, "MatMul"):
        activation, weight = (value.producer() for value in matmul.inputs)
        assert activation.op_type == weight.op_type == "DequantizeLinear"
        assert activation.inputs[0].producer().op_type == "QuantizeLinear"
        assert stored(weight, 0).dtype == np.int8
        assert stored(weight, 1).shape == (stored(weight, 0).shape[1],)
        assert not stored(weight, 2).any()
        assert weight.attributes["axis"].as_int() == 1


def test_asymmetric_static_moves_the_zero_point_of_a_one_sided_activation() -> None:
    after_gelu = next(n for n in nodes(quantized(ASYMMETRIC), "QuantizeLinear") if n.inputs[0].name == "act")
    assert stored(after_gelu, 2).dtype == np.uint8
    assert 0 < stored(after_gelu, 2) < 64


def test_layers_that_read_one_tensor_share_one_rounding_of_it() -> None:
    result = quantized(STATIC)
    left, right, down = nodes(result, "MatMul")
    assert left.inputs[0] is right.inputs[0]
    assert len(nodes(result, "QuantizeLinear")) == 2
    assert down.inputs[0] is not left.inputs[0]


def test_float_weights_leave_the_graph() -> None:
    left = {"left", "right", "down"} & set(quantized(STATIC).graphs["tiny"].model.graph.initializers)
    assert not left


def test_layers_that_keep_names_stay_in_float() -> None:
    kept = dataclasses.replace(STATIC, keep=("block/down", "*/left/*"))
    left, right, down = nodes(quantized(kept), "MatMul")
    assert left.inputs[1].name == "left"
    assert down.inputs[1].name == "down"
    assert right.inputs[1].producer().op_type == "DequantizeLinear"


def test_a_keep_pattern_that_matches_nothing_is_refused() -> None:
    with pytest.raises(QuantizeError, match="'lm_head' matches no linear layer") as caught:
        quantized(dataclasses.replace(STATIC, keep=("lm_head",)))
    assert "block/left/MatMul" in caught.value.fix


def test_equalizing_channels_saves_a_tensor_with_outlier_channels() -> None:
    arrays = two_layers.weights(outlier=100)
    arrays["left"][3] /= 100
    arrays["right"][3] /= 100
    plain = relative_error(quantized(STATIC, arrays), arrays)
    equalized = quantized(dataclasses.replace(STATIC, method="smoothquant"), arrays)
    assert relative_error(equalized, arrays) < plain / 5
    left, right, _ = nodes(equalized, "MatMul")
    assert left.inputs[0] is right.inputs[0]


def test_dynamic_rounds_each_token_by_itself() -> None:
    result = quantized(DYNAMIC)
    batch = two_layers.feeds(8)[0]
    together = two_layers.logits(result, [batch])
    alone = [two_layers.logits(result, [{n: a[i : i + 1] for n, a in batch.items()}]) for i in range(8)]
    np.testing.assert_array_equal(together, np.concatenate(alone))


def test_dynamic_takes_an_all_zero_row() -> None:
    arrays = two_layers.weights()
    arrays["embedding"][1:] = 0
    assert not two_layers.logits(quantized(DYNAMIC, arrays)).any()


@pytest.mark.parametrize("variant", [STATIC, ASYMMETRIC], ids=["static", "uint8"])
def test_static_takes_a_tensor_that_is_always_zero(variant: Variant) -> None:
    arrays = two_layers.weights()
    arrays["embedding"][:] = 0
    for method in ("rtn", "smoothquant"):
        assert not two_layers.logits(quantized(dataclasses.replace(variant, method=method), arrays)).any()


@pytest.mark.parametrize(("weights", "bound"), [(Precision.INT8, 0.01), (Precision.INT4, 0.2)])
def test_weights_in_blocks_are_a_blocked_dequantizelinear(weights: Precision, bound: float) -> None:
    result = quantized(Variant("w", weights=weights, block_size=16))
    for node in nodes(result, "DequantizeLinear"):
        assert node.attributes["block_size"].as_int() == 16
        assert stored(node, 1).shape[0] == stored(node, 0).shape[0] // 16
    assert relative_error(result) < bound


def test_int4_takes_half_a_byte_in_memory_and_comes_back_exactly(tmp_path: Path) -> None:
    values = np.random.default_rng(0).integers(-7, 8, (6, 5)).astype(ml_dtypes.int4)
    model = two_layers.program().graphs["tiny"].model
    tensor = constant(model, "packed", values).const_value
    assert tensor is not None
    assert tensor.raw.nbytes == tensor.nbytes == 15
    np.testing.assert_array_equal(tensor.numpy().astype(np.int8), values.astype(np.int8))
    written = ir.from_proto(ir.to_proto(model)).graph.initializers["packed"].const_value.numpy()
    np.testing.assert_array_equal(written.astype(np.int8), values.astype(np.int8))


def test_a_damaged_weight_is_named() -> None:
    arrays = two_layers.weights()
    program = Calibrate()(two_layers.program(arrays), two_layers.context())
    arrays["down"][0, 0] = np.inf
    damaged = dataclasses.replace(program, graphs=two_layers.program(arrays).graphs)
    with pytest.raises(QuantizeError, match="block/down/MatMul: the weight holds NaN or Inf"):
        Quantize()(damaged, two_layers.context(variant=STATIC))


def test_a_static_variant_without_statistics_is_refused() -> None:
    with pytest.raises(QuantizeError, match="no statistics of its input hidden"):
        Quantize()(two_layers.program(), two_layers.context(variant=STATIC))


def test_a_variant_in_float_passes_through() -> None:
    program = two_layers.program()
    result = Quantize()(program, two_layers.context(variant=Variant("fp32")))
    assert result.stage is Stage.QUANTIZED
    assert result.graphs == program.graphs


@pytest.mark.parametrize(
    "variant",
    [
        Variant("bad", weights=Precision.FLOAT16),
        Variant("bad", weights=Precision.INT4, activations=Precision.INT8),
        Variant("bad", weights=Precision.INT8, activations=Precision.INT8, block_size=16),
    ],
)
def test_a_variant_that_makes_no_sense_is_refused(variant: Variant) -> None:
    with pytest.raises(QuantizeError, match="variant bad"):
        quantized(variant)


def test_the_float_program_is_not_changed() -> None:
    program = Calibrate()(two_layers.program(), two_layers.context())
    before = two_layers.logits(program)
    Quantize()(program, two_layers.context(variant=STATIC))
    np.testing.assert_array_equal(two_layers.logits(program), before)


@pytest.mark.parametrize(
    "variant", [DYNAMIC, dataclasses.replace(WEIGHTS, embeddings=Precision.INT8)], ids=["int8", "tables"]
)
def test_weights_are_read_and_not_left_mapped(variant: Variant, tmp_path: Path) -> None:
    """Mapped pages stay resident: a model's float32 weights would all be in memory at the end."""
    cache.write_program(two_layers.program(), tmp_path)
    program = cache.read_program(tmp_path)
    stored = [v.const_value for v in program.graphs["tiny"].model.graph.initializers.values()]
    in_file = [t for t in stored if isinstance(t, ir.ExternalTensor)]
    Quantize()(program, two_layers.context(variant=variant))
    assert len(in_file) >= 3
    assert [t.name for t in in_file if t.raw is not None] == []


def test_two_runs_give_the_same_bytes() -> None:
    first, second = (
        ir.to_proto(quantized(ASYMMETRIC).graphs["tiny"].model).SerializeToString(deterministic=True) for _ in range(2)
    )
    assert first == second
