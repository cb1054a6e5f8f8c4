"""What every quantizer keeps to, whichever files quantizers/ holds."""

from __future__ import annotations

import numpy as np
import pytest

from medcompile import quantizers
from medcompile.errors import QuantizeError, UsageError
from medcompile.quantizers import WeightFormat
from medcompile.statistics import Observer, Statistics


def statistics(quantizer: quantizers.Quantizer) -> Statistics:
    observer = Observer()
    quantizer.observe(observer, np.random.default_rng(0).standard_normal((64, 32)).astype(np.float32))
    return observer.statistics()


def weight() -> np.ndarray:
    return np.random.default_rng(1).standard_normal((32, 8)).astype(np.float32)


@pytest.mark.parametrize("name", quantizers.names())
class TestEveryQuantizer:
    def test_its_name_is_its_file(self, name: str) -> None:
        assert quantizers.get(name).name == name

    @pytest.mark.parametrize("form", [WeightFormat(8), WeightFormat(8, 16), WeightFormat(4, 16)])
    def test_shapes_and_types_are_as_promised(self, name: str, form: WeightFormat) -> None:
        quantizer = quantizers.get(name)
        solution = quantizer.solve(weight(), statistics(quantizer), form)
        assert solution.values.dtype == np.int8
        assert solution.values.shape == (32, 8)
        assert np.abs(solution.values).max() <= 2 ** (form.bits - 1) - 1
        assert solution.scales.dtype == np.float32
        assert solution.scales.shape == ((32 // form.block_size, 8) if form.block_size else (8,))
        assert (solution.scales > 0).all()
        if solution.input_scale is not None:
            assert solution.input_scale.dtype == np.float32
            assert solution.input_scale.shape == (32,)
            assert (solution.input_scale > 0).all()

    def test_the_weight_comes_back_within_a_step(self, name: str) -> None:
        quantizer = quantizers.get(name)
        solution = quantizer.solve(weight(), statistics(quantizer), WeightFormat(8))
        back = solution.values * solution.scales
        bound = np.broadcast_to(solution.scales, back.shape)
        if solution.input_scale is not None:
            back, bound = back / solution.input_scale[:, None], bound / solution.input_scale[:, None]
        assert (np.abs(back - weight()) <= bound).all()

    def test_solving_twice_gives_the_same_numbers(self, name: str) -> None:
        quantizer = quantizers.get(name)
        first, second = (quantizer.solve(weight(), statistics(quantizer), WeightFormat(8)) for _ in range(2))
        np.testing.assert_array_equal(first.values, second.values)
        np.testing.assert_array_equal(first.scales, second.scales)

    @pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
    def test_a_weight_that_is_not_finite_is_refused(self, name: str, bad: float) -> None:
        quantizer = quantizers.get(name)
        damaged = weight()
        damaged[3, 3] = bad
        with pytest.raises(QuantizeError, match="NaN or Inf"):
            quantizer.solve(damaged, statistics(quantizer), WeightFormat(8))

    def test_an_all_zero_weight_is_defined(self, name: str) -> None:
        quantizer = quantizers.get(name)
        solution = quantizer.solve(np.zeros((32, 8), np.float32), statistics(quantizer), WeightFormat(8))
        assert not solution.values.any()
        assert (solution.scales > 0).all()


def test_an_unknown_quantizer_is_refused_with_the_known_ones() -> None:
    with pytest.raises(UsageError, match="unknown method 'magic'") as caught:
        quantizers.get("magic")
    assert "rtn" in caught.value.fix
