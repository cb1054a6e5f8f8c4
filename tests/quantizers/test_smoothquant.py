"""SmoothQuant: the float product is kept, the published rule is followed when asked, and the search beats both ends."""

from __future__ import annotations

import numpy as np
import pytest

from medcompile.errors import QuantizeError
from medcompile.quantizers import WeightFormat
from medcompile.quantizers.smoothquant import QUANTIZER
from medcompile.statistics import Observer, Statistics


def layer(outlier: float = 50.0) -> tuple[np.ndarray, np.ndarray, Statistics]:
    """An activation whose channel 5 is so much larger than the others, a weight, and the activation's statistics."""
    rng = np.random.default_rng(0)
    activation = rng.standard_normal((600, 32)).astype(np.float32)
    activation[:, 5] *= outlier
    observer = Observer()
    QUANTIZER.observe(observer, activation)
    return activation, rng.standard_normal((32, 24)).astype(np.float32), observer.statistics()


def output_error(activation: np.ndarray, weight: np.ndarray, stats: Statistics, smoothing: float | None) -> float:
    solution = QUANTIZER.solve(weight, stats, WeightFormat(smoothing=smoothing))
    assert solution.input_scale is not None
    scaled = activation / solution.input_scale
    step = np.abs(scaled).max() / 127
    output = np.round(scaled / step) * step @ (solution.values * solution.scales)
    return float(np.square(output - activation @ weight).sum())


def test_the_activation_and_the_weight_change_by_inverse_factors() -> None:
    activation, weight, stats = layer()
    solution = QUANTIZER.solve(weight, stats, WeightFormat())
    assert solution.input_scale is not None
    output = (activation / solution.input_scale) @ (solution.values * solution.scales)
    assert np.linalg.norm(output - activation @ weight) < 0.01 * np.linalg.norm(activation @ weight)


def test_a_given_strength_follows_the_published_rule() -> None:
    _, weight, stats = layer()
    scale = QUANTIZER.solve(weight, stats, WeightFormat(smoothing=0.5)).input_scale
    published = np.sqrt(stats.channel_amax / np.abs(weight).max(axis=1))
    np.testing.assert_allclose(scale, published / published.max(), rtol=1e-5)


def test_the_search_does_at_least_as_well_as_any_published_strength() -> None:
    for outlier in (1.0, 50.0):
        activation, weight, stats = layer(outlier)
        searched = output_error(activation, weight, stats, None)
        assert searched <= 1.05 * min(output_error(activation, weight, stats, a / 10) for a in range(11))


def test_channels_that_never_move_or_are_never_used_get_a_finite_scale() -> None:
    _, weight, _ = layer()
    observer = Observer()
    rows = np.random.default_rng(1).standard_normal((50, 32)).astype(np.float32)
    rows[:, 7] = 0
    observer.add(rows)
    weight[9] = 0
    for smoothing in (None, 0.0, 1.0):
        scale = QUANTIZER.solve(weight, observer.statistics(), WeightFormat(smoothing=smoothing)).input_scale
        assert scale is not None
        assert np.isfinite(scale).all()
        assert (scale > 0).all()


def test_smoothquant_without_statistics_is_refused() -> None:
    with pytest.raises(QuantizeError, match="needs calibration statistics"):
        QUANTIZER.solve(np.ones((4, 4), np.float32), None, WeightFormat())
