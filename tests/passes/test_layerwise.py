"""Layer by layer: each layer sees what the quantized ones before it give, every node runs once, no file is left."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

from medcompile.errors import CalibrationError, QuantizeError
from medcompile.passes.calibrate import Calibrate
from medcompile.passes.layerwise import Carried
from medcompile.passes.linear import linear_groups
from medcompile.passes.quantize import Quantize
from medcompile.quantizers import gptq, rtn
from medcompile.run_onnx import run_onnx
from medcompile.spec import Precision, Variant
from tests.passes import gated, two_layers

INT4 = Variant("int4", weights=Precision.INT4, block_size=16)


def test_what_a_layer_sees_is_what_the_whole_graph_gives_there(tmp_path: Path) -> None:
    model = gated.program().graphs["generate"].model
    names = tuple(g.tensor for g in linear_groups(model))
    whole = list(gated.values(model, gated.feeds(), names))
    with Carried(model, "generate", gated.context(tmp_path)) as carried:
        for group in linear_groups(model):
            stats = carried.statistics(group, gptq.QUANTIZER)
            rows = np.concatenate([one[group.tensor] for one in whole])
            assert stats.count == len(rows)
            assert stats.products is not None
            np.testing.assert_allclose(stats.products, rows.T @ rows / len(rows), atol=1e-5)
    assert not list(tmp_path.iterdir())


def test_later_layers_see_the_rounding_of_earlier_ones(tmp_path: Path) -> None:
    seen: dict[str, np.ndarray] = {}

    def spy(carried: Carried, group: Any, quantizer: Any) -> Any:
        stats = statistics(carried, group, quantizer)
        seen[group.tensor] = stats.products
        return stats

    statistics = Carried.statistics
    variant = Variant("int4", weights=Precision.INT4, block_size=16, method="awq")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Carried, "statistics", spy)
        quantized = Quantize()(gated.program(), gated.context(tmp_path, variant)).graphs["generate"].model
    # In the finished graph, each input is as it was observed, but for the scale that its own layer folded into it.
    for name in ("layers.1.norm_Mul_output", "layers.1.attention_PagedAttention_output"):
        rows = np.concatenate([v[name] for v in gated.values(quantized, gated.feeds(), (name,))])
        ratio = np.sqrt(np.square(rows).mean(0) / np.diagonal(seen[name]))
        np.testing.assert_allclose(rows.T @ rows / len(rows), seen[name] * np.outer(ratio, ratio), atol=2e-5)


def test_each_node_runs_once_over_the_data(tmp_path: Path) -> None:
    ran: Counter[str] = Counter()

    def counting(model: ir.Model, feeds: Iterator[Any], names: tuple[str, ...]) -> Iterator[dict[str, Any]]:
        ran.update(node.name or "" for node in model.graph if node.op_type == "MatMul")
        return run_onnx(model, feeds, names)

    variant = Variant("int4", weights=Precision.INT4, block_size=16, method="gptq")
    Quantize()(gated.program(), gated.context(tmp_path, variant, counting))
    layers = {name: count for name, count in ran.items() if "attention" not in name}
    assert len(layers) == 14  # of 15: nothing comes after the last one
    assert set(layers.values()) == {1}


@pytest.mark.parametrize("kv_heads", [2, 4])
@pytest.mark.parametrize("method", ["awq", "gptq"])
def test_calibrated_int4_comes_closer_than_rounding(method: str, kv_heads: int, tmp_path: Path) -> None:
    program = gated.program(kv_heads)
    exact = gated.logits(program)
    errors = {}
    for name in ("rtn", method):
        variant = Variant("int4", weights=Precision.INT4, block_size=32, method=name)
        made = gated.logits(Quantize()(program, gated.context(tmp_path, variant)))
        errors[name] = np.linalg.norm(made - exact) / np.linalg.norm(exact)
    assert errors[method] < 0.95 * errors["rtn"]


def test_scales_are_folded_where_one_node_makes_the_input(tmp_path: Path) -> None:
    variant = Variant("int4", weights=Precision.INT4, block_size=32, method="awq")
    left = {}
    for kv_heads in (2, 4):
        model = Quantize()(gated.program(kv_heads), gated.context(tmp_path, variant)).graphs["generate"].model
        left[kv_heads] = [n.name for n in model.graph if (n.name or "").endswith("/equalize")]
    assert left[4] == []
    assert left[2] == [f"layers.{i}.attention_PagedAttention_output/equalize" for i in (0, 1)]


def test_layers_that_are_kept_are_neither_observed_nor_changed(tmp_path: Path) -> None:
    variant = Variant("int4", weights=Precision.INT4, block_size=16, method="gptq", keep=("lm_head", "layers.0.*"))
    model = Quantize()(gated.program(), gated.context(tmp_path, variant)).graphs["generate"].model
    kept = {n.name for n in model.graph if n.op_type == "MatMul" and n.inputs[1].const_value is not None}
    assert kept == {"lm_head/MatMul"} | {f"layers.0.{n}/MatMul" for n in ("q", "k", "v", "o", "gate", "up", "down")}


def test_encoders_are_carried_with_their_padding_left_out(tmp_path: Path) -> None:
    model = two_layers.program().graphs["tiny"].model
    whole = Calibrate()(two_layers.program(), two_layers.context()).statistics["tiny"]
    with Carried(model, "tiny", two_layers.context()) as carried:
        for group in linear_groups(model):
            stats = carried.statistics(group, rtn.QUANTIZER)
            assert stats.count == whole[group.tensor].count
            np.testing.assert_allclose(stats.channel_mean, whole[group.tensor].channel_mean, atol=1e-6)


def test_calibrate_takes_ragged_decoders_and_counts_their_sequences(tmp_path: Path) -> None:
    statistics = Calibrate(minimum=48)(gated.program(), gated.context(tmp_path)).statistics["generate"]
    assert len(statistics) == 9
    assert {s.count for s in statistics.values()} == {sum(len(f["input_ids"]) for f in gated.feeds())}
    with pytest.raises(CalibrationError, match="48 calibration items, and 49"):
        Calibrate(minimum=49)(gated.program(), gated.context(tmp_path))


def test_a_variant_that_must_see_data_is_refused_without_and_with_integer_activations(tmp_path: Path) -> None:
    variant = Variant("int4", weights=Precision.INT4, block_size=16, method="gptq")
    blind = gated.Context(tmp_path, gated.Silent(), variant)
    with pytest.raises(CalibrationError, match="needs calibration data"):
        Quantize()(gated.program(), blind)
    both = Variant("int8", weights=Precision.INT8, activations=Precision.INT8, method="awq")
    with pytest.raises(QuantizeError, match="awq is for quantized weights under activations that stay in float"):
        Quantize()(gated.program(), gated.context(tmp_path, both))
