"""AWQ: the float product is kept, strong inputs are rounded more finely, and outputs keep their length."""

from __future__ import annotations

import numpy as np
import pytest

from medcompile.errors import QuantizeError
from medcompile.quantizers import WeightFormat, awq, rtn
from tests.quantizers import layers


@pytest.mark.parametrize("form", [WeightFormat(4, 16), WeightFormat(4, 128), WeightFormat(8)])
def test_outputs_of_unseen_data_come_closer_than_by_rounding_alone(form: WeightFormat) -> None:
    seen, unseen = layers.activation(seed=0), layers.activation(seed=1)
    ours = layers.error(awq.QUANTIZER, form, seen, unseen)
    assert ours < 0.9 * layers.error(rtn.QUANTIZER, form, seen, unseen)


def test_the_strongest_input_has_a_larger_scale_than_the_weakest() -> None:
    stats = layers.statistics(awq.QUANTIZER, layers.activation())
    scale = awq.QUANTIZER.solve(layers.weight(), stats, WeightFormat(4, 32)).input_scale
    assert scale is not None
    assert scale[stats.channel_mean_square.argmax()] > 1.5 * scale[stats.channel_mean_square.argmin()]


def test_clipping_does_not_shorten_outputs() -> None:
    rows = layers.activation()
    stats = layers.statistics(awq.QUANTIZER, rows)
    solution = awq.QUANTIZER.solve(layers.weight(), stats, WeightFormat(4, 128))
    exact, found = rows @ layers.weight(), rows @ layers.effective(solution)
    np.testing.assert_allclose((exact * found).sum(0) / (exact * exact).sum(0), 1, atol=1e-4)
    assert np.abs(solution.values).max() == 7


def test_channels_that_never_move_get_a_finite_scale() -> None:
    rows = layers.activation()
    rows[:, 7] = 0
    stats = layers.statistics(awq.QUANTIZER, rows)
    scale = awq.QUANTIZER.solve(layers.weight(), stats, WeightFormat(4, 32)).input_scale
    assert scale is not None
    assert np.isfinite(scale).all()
    assert scale.min() > 0


def test_awq_without_statistics_is_refused() -> None:
    with pytest.raises(QuantizeError, match="products of its activations"):
        awq.QUANTIZER.solve(layers.weight(), None, WeightFormat(4, 32))
