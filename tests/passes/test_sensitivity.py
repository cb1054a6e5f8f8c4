"""Sensitivity: the layer that int8 ruins comes first, and kept layers don't come at all."""

from __future__ import annotations

import dataclasses
import glob
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from medcompile.errors import CalibrationError
from medcompile.passes.calibrate import Calibrate
from medcompile.passes.quantize import Quantize
from medcompile.passes.sensitivity import sensitivities, sensitivity
from medcompile.program import Program
from medcompile.spec import LayerRule, Precision, Variant
from tests.passes import gated, two_layers

STATIC = Variant("int8", weights=Precision.INT8, activations=Precision.INT8)


def test_a_planted_bad_layer_is_ranked_first() -> None:
    arrays = two_layers.weights()
    arrays["down"][0] *= 1e4  # one row dwarfs each column's other entries ...
    arrays["left"][:, 0] = arrays["right"][:, 0] = 0  # ... but its input is always zero, so the float output is unhurt
    program = Calibrate()(two_layers.program(arrays), two_layers.context())
    first, second = sensitivity(program, two_layers.context(variant=STATIC), Quantize())["tiny"]
    assert first.nodes == ("block/down/MatMul",)
    assert first.error > 0.9
    assert second.nodes == ("block/left/MatMul", "block/right/MatMul")
    assert 0 < second.error < 0.05


def test_layers_that_are_kept_already_are_left_out() -> None:
    program = Calibrate()(two_layers.program(), two_layers.context())
    variant = dataclasses.replace(STATIC, keep=("block/down", "block/left"))
    (only,) = sensitivity(program, two_layers.context(variant=variant), Quantize())["tiny"]
    assert only.nodes == ("block/right/MatMul",)


def test_sensitivity_without_data_is_refused() -> None:
    bare = dataclasses.replace(two_layers.context(variant=STATIC), batches=None)
    with pytest.raises(CalibrationError, match="sensitivity needs calibration data"):
        sensitivity(two_layers.program(), bare, Quantize())


def test_a_decoder_with_paged_attention_is_ranked_too(tmp_path: Path) -> None:
    variant = Variant("int4", weights=Precision.INT4, block_size=16, method="gptq", keep=("layers.0.*",))
    ranked = sensitivity(gated.program(), gated.context(tmp_path, variant), Quantize(), batches=2)["generate"]
    assert {name.split("/")[0] for s in ranked for name in s.nodes} == {
        "lm_head",
        *(f"layers.1.{n}" for n in ("q", "k", "v", "o", "gate", "up", "down")),
    }
    assert all(0 < s.error < 1 for s in ranked)


FORMATS = {
    "int8": dataclasses.replace(STATIC, method="smoothquant"),
    "dynamic": dataclasses.replace(STATIC, dynamic=True),
    "int4": Variant("int4", weights=Precision.INT4, block_size=16),
}


def alone(program: Program, variant: Variant, nodes: tuple[str, ...]) -> np.ndarray:
    """The logits where these nodes are quantized by the pass, and no others."""
    others = [name for name in two_layers.LAYERS if name not in nodes]
    only = dataclasses.replace(variant, keep=tuple(map(glob.escape, others)))
    return two_layers.logits(Quantize()(program, two_layers.context(variant=only)))


def test_each_format_is_what_the_pass_would_do_to_that_group_alone() -> None:
    program = Calibrate()(two_layers.program(), two_layers.context())
    exact = two_layers.logits(program)
    rows = sensitivities(program, two_layers.context(), Quantize(), FORMATS, batches=99)["tiny"]
    assert [row.nodes for row in rows] == [two_layers.LAYERS[:2], two_layers.LAYERS[2:]]
    for row in rows:
        assert set(row.errors) == set(FORMATS)
        for name, variant in FORMATS.items():
            moved = np.linalg.norm(alone(program, variant, row.nodes) - exact) / np.linalg.norm(exact)
            assert row.errors[name] == pytest.approx(moved, rel=1e-3), name
    assert all(row.errors["int4"] > 3 * row.errors["int8"] for row in rows)


def test_a_format_that_leaves_a_group_in_float_has_no_error_there() -> None:
    program = Calibrate()(two_layers.program(), two_layers.context())
    half = dataclasses.replace(STATIC, layers=(LayerRule("*/down"),))
    formats = {"half": half, "left": dataclasses.replace(STATIC, keep=("*/right", "*/down"))}
    (row,) = sensitivities(program, two_layers.context(), Quantize(), formats)["tiny"]
    assert row.nodes == two_layers.LAYERS[:2]
    assert row.errors["half"] > row.errors["left"] > 0


def test_several_formats_share_the_runs_of_the_reference() -> None:
    program = Calibrate()(two_layers.program(), two_layers.context())
    sessions: list[tuple[str, ...]] = []

    def counting(model: Any, feeds: Any, names: tuple[str, ...]) -> Any:
        sessions.append(tuple(n.name for n in model.graph if n.op_type == "MatMul"))
        return two_layers.run_onnx(model, feeds, names)

    ctx = dataclasses.replace(two_layers.context(), run_onnx=counting)
    sensitivities(program, ctx, Quantize(), {name: FORMATS[name] for name in ("int8", "int4")})
    # What stands before all layers; each group in float; each group in each of two formats. None holds both groups.
    assert sorted(sessions) == sorted([(), *([two_layers.LAYERS[:2]] * 3), *([two_layers.LAYERS[2:]] * 3)])


def test_a_mixed_decoder_is_ranked_with_a_method_that_sees_whole_activations(tmp_path: Path) -> None:
    rules = (LayerRule("*.q", Precision.INT8), LayerRule("*.v", Precision.INT8, Precision.INT8, dynamic=True))
    mixed = Variant("mixed", weights=Precision.INT4, block_size=16, method="awq", layers=rules)
    plain = dataclasses.replace(mixed, layers=())
    formats = {"mixed": mixed, "plain": plain}
    rows = sensitivities(gated.program(), gated.context(tmp_path), Quantize(), formats, batches=2)["generate"]
    assert len(rows) == 9
    for row in rows:
        assert 0 < row.errors["mixed"] < 1
        if row.nodes[0].endswith(".q/MatMul"):
            assert row.errors["mixed"] < row.errors["plain"]
        else:
            assert row.errors["mixed"] == row.errors["plain"]
