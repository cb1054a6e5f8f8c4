"""Calibrate: which tensors and rows are observed, and what is refused."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from medcompile.errors import CalibrationError
from medcompile.passes import calibrate
from medcompile.passes.calibrate import Calibrate, real_rows
from medcompile.spec import Stage
from tests.passes import two_layers


def test_each_distinct_input_of_a_linear_layer_is_observed_once() -> None:
    result = Calibrate()(two_layers.program(), two_layers.context())
    assert result.stage is Stage.CALIBRATED
    assert set(result.statistics["tiny"]) == {"hidden", "act"}


def test_statistics_equal_those_of_the_activations_computed_by_hand() -> None:
    arrays, batches = two_layers.weights(), two_layers.feeds()
    rows = np.concatenate([arrays["embedding"][b["input_ids"]][b["attention_mask"].astype(bool)] for b in batches])
    stats = Calibrate()(two_layers.program(arrays), two_layers.context(batches)).statistics["tiny"]["hidden"]
    assert stats.count == len(rows)
    np.testing.assert_array_equal(stats.channel_min, rows.min(axis=0))
    np.testing.assert_array_equal(stats.channel_max, rows.max(axis=0))
    np.testing.assert_allclose(stats.channel_mean, rows.mean(axis=0), atol=1e-6)
    np.testing.assert_allclose(stats.channel_mean_square, np.square(rows).mean(axis=0), rtol=1e-5)
    assert stats.histogram.sum() == rows.size


def test_padding_is_not_observed() -> None:
    arrays = two_layers.weights()
    arrays["embedding"][0] = 1000.0  # the padding token
    stats = Calibrate()(two_layers.program(arrays), two_layers.context()).statistics["tiny"]
    assert stats["hidden"].amax < 10


def test_a_tensor_with_batch_and_sequence_in_one_axis_loses_its_padding_too() -> None:
    mask = np.array([[1, 0], [1, 1]])
    flat = np.arange(8.0).reshape(4, 2)
    np.testing.assert_array_equal(real_rows(flat, mask), flat[[0, 2, 3]])
    pooled = np.ones((2, 5))
    assert real_rows(pooled, mask).shape == (2, 5)


def test_groups_of_one_tensor_give_the_same_statistics_as_one_group(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = Calibrate()(two_layers.program(), two_layers.context()).statistics["tiny"]
    monkeypatch.setattr(calibrate, "_HELD_BYTES", 1)
    parts = Calibrate()(two_layers.program(), two_layers.context()).statistics["tiny"]
    for name, stats in whole.items():
        np.testing.assert_array_equal(stats.histogram, parts[name].histogram)
        np.testing.assert_array_equal(stats.channel_mean, parts[name].channel_mean)


def test_the_float_graph_is_left_as_it_was() -> None:
    program = two_layers.program()
    before = [value.name for value in program.graphs["tiny"].model.graph.outputs]
    Calibrate()(program, two_layers.context())
    assert [value.name for value in program.graphs["tiny"].model.graph.outputs] == before


def test_fewer_items_than_the_minimum_are_refused() -> None:
    with pytest.raises(CalibrationError, match="24 calibration items, and 32 are the least") as caught:
        Calibrate()(two_layers.program(), two_layers.context(two_layers.feeds(24)))
    assert "calibration" in caught.value.fix
    Calibrate(minimum=24)(two_layers.program(), two_layers.context(two_layers.feeds(24)))


def test_an_activation_with_nan_is_named() -> None:
    arrays = two_layers.weights()
    arrays["right"][0, 0] = np.nan
    with pytest.raises(CalibrationError, match="activation act holds NaN or Inf"):
        Calibrate()(two_layers.program(arrays), two_layers.context())


def test_a_program_without_calibration_data_is_refused() -> None:
    bare = dataclasses.replace(two_layers.context(), batches=None)
    with pytest.raises(CalibrationError, match="needs calibration data"):
        Calibrate()(two_layers.program(), bare)
