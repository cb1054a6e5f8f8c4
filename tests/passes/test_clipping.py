"""Clipping: ranges are read as they stand in the graph, and the share outside is what the statistics say."""

from __future__ import annotations

import dataclasses

import pytest

from medcompile.passes.calibrate import Calibrate
from medcompile.passes.clipping import Clipping, clippings
from medcompile.passes.quantize import Quantize
from medcompile.spec import LayerRule, Precision, Variant
from tests.passes import two_layers

STATIC = Variant("int8", weights=Precision.INT8, activations=Precision.INT8)


def read(variant: Variant, options: Quantize) -> list[Clipping]:
    program = Calibrate()(two_layers.program(), two_layers.context())
    result = options(program, two_layers.context(variant=variant))
    return clippings(result.graphs["tiny"].model, program.statistics["tiny"], variant)


@pytest.mark.parametrize("symmetric", [True, False])
def test_a_range_of_all_that_was_seen_clips_nothing(symmetric: bool) -> None:
    found = read(dataclasses.replace(STATIC, symmetric=symmetric), Quantize("minmax"))
    assert found and all(c.layers for c in found)
    for one in found:
        step = (one.range[1] - one.range[0]) / 255
        assert one.range[0] - step <= one.observed[0] < one.observed[1] <= one.range[1] + step
        assert one.clipped == 0 and not one.rescaled


def test_a_percentile_clips_the_share_that_it_says() -> None:
    for one in read(STATIC, Quantize("percentile", 90.0)):
        assert 0.02 < one.clipped < 0.11
        assert one.observed[0] < one.range[0] or one.observed[1] > one.range[1]


def test_smoothquants_tensors_are_told_as_rescaled_and_clip_nothing() -> None:
    found = read(dataclasses.replace(STATIC, method="smoothquant"), Quantize("percentile", 90.0))
    assert found
    assert all(c.rescaled and c.clipped == 0 for c in found)


def test_scales_of_run_time_have_no_range() -> None:
    assert read(dataclasses.replace(STATIC, dynamic=True), Quantize()) == []
    assert read(Variant("w8", weights=Precision.INT8), Quantize()) == []


def test_layers_of_another_format_are_left_out() -> None:
    (first, *others) = read(STATIC, Quantize())
    rest = read(dataclasses.replace(STATIC, layers=(LayerRule(first.layers[0]),)), Quantize())
    assert others
    assert first.layers[0] not in {name for one in rest for name in one.layers}
