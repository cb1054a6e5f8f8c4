"""Sensitivity: the layer that int8 ruins comes first, and kept layers don't come at all."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from medcompile.errors import CalibrationError
from medcompile.passes.calibrate import Calibrate
from medcompile.passes.quantize import Quantize
from medcompile.passes.sensitivity import sensitivity
from medcompile.spec import Precision, Variant
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
    with pytest.raises(CalibrationError, match="needs a variant and calibration data"):
        sensitivity(two_layers.program(), bare, Quantize())


def test_a_decoder_with_paged_attention_is_ranked_too(tmp_path: Path) -> None:
    variant = Variant("int4", weights=Precision.INT4, block_size=16, method="gptq", keep=("layers.0.*",))
    ranked = sensitivity(gated.program(), gated.context(tmp_path, variant), Quantize(), batches=2)["generate"]
    assert {name.split("/")[0] for s in ranked for name in s.nodes} == {
        "lm_head",
        *(f"layers.1.{n}" for n in ("q", "k", "v", "o", "gate", "up", "down")),
    }
    assert all(0 < s.error < 1 for s in ranked)
