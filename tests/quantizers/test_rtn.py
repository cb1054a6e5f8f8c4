"""Round to nearest: bounds, degenerate columns, blocks."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from medcompile.errors import QuantizeError
from medcompile.quantizers.rtn import round_to_nearest


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 999),
    bits=st.sampled_from([8, 4]),
    block_size=st.sampled_from([None, 4, 12]),
    scale=st.floats(1e-20, 1e20),
)
def test_no_weight_moves_by_more_than_half_a_step(seed: int, bits: int, block_size: int | None, scale: float) -> None:
    weight = (np.random.default_rng(seed).standard_normal((12, 5)) * scale).astype(np.float32)
    values, scales = round_to_nearest(weight, bits, block_size)
    assert values.dtype == np.int8
    assert np.abs(values).max() == 2 ** (bits - 1) - 1
    assert scales.shape == ((12 // block_size, 5) if block_size else (5,))
    assert (scales > 0).all()
    steps = np.repeat(scales, block_size, axis=0) if block_size else scales
    assert (np.abs(values * steps.astype(np.float64) - weight) <= 0.5001 * steps).all()


@pytest.mark.parametrize("tiny", [0.0, 1e-45])
def test_a_zero_column_has_a_positive_scale_and_zero_values(tiny: float) -> None:
    weight = np.ones((4, 2), np.float32)
    weight[:, 1] = tiny
    values, scales = round_to_nearest(weight, 8, None)
    assert (scales > 0).all()
    assert not values[:, 1].any()


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_weight_that_is_not_finite_is_refused(bad: float) -> None:
    weight = np.ones((4, 2), np.float32)
    weight[1, 1] = bad
    with pytest.raises(QuantizeError, match="NaN or Inf"):
        round_to_nearest(weight, 8, None)


def test_blocks_must_divide_the_inputs() -> None:
    with pytest.raises(QuantizeError, match="12 inputs don't divide into blocks of 8") as caught:
        round_to_nearest(np.ones((12, 2), np.float32), 8, 8)
    assert "block_size" in caught.value.fix
