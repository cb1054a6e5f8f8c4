"""Statistics: the streamed histogram loses nothing, and each method finds the range that it promises."""

from __future__ import annotations

import io

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from medcompile.statistics import BINS, METHODS, Observer, Statistics, clipping_range, from_arrays, to_arrays


def observed(*batches: np.ndarray) -> Statistics:
    observer = Observer()
    for batch in batches:
        observer.add(batch.astype(np.float32))
    return observer.statistics()


@settings(max_examples=50, deadline=None)
@given(scales=st.lists(st.floats(1e-6, 1e6), min_size=1, max_size=6), seed=st.integers(0, 99))
def test_the_histogram_counts_every_value_however_the_range_grew(scales: list[float], seed: int) -> None:
    rng = np.random.default_rng(seed)
    batches = [(rng.standard_normal((7, 3)) * scale).astype(np.float32) for scale in scales]
    stats = observed(*batches)
    everything = np.concatenate(batches)
    assert stats.histogram.sum() == everything.size
    assert stats.reach >= stats.amax == np.abs(everything).max()
    edges = np.linspace(-stats.reach, stats.reach, BINS + 1)
    # Merging bins must give what one histogram over the final range gives.
    np.testing.assert_array_equal(np.histogram(everything.astype(np.float64), edges)[0], stats.histogram)


def test_memory_does_not_grow_with_what_is_observed() -> None:
    few, many = observed(np.ones((10, 4))), observed(*[np.ones((10, 4))] * 50)
    assert {n: a.nbytes for n, a in to_arrays(few).items()} == {n: a.nbytes for n, a in to_arrays(many).items()}


def test_arrays_pass_through_npz_without_pickle() -> None:
    stats = observed(np.random.default_rng(0).standard_normal((20, 4)))
    stored = io.BytesIO()
    np.savez(stored, **to_arrays(stats))
    stored.seek(0)
    back = from_arrays(np.load(stored, allow_pickle=False))
    for name, array in to_arrays(stats).items():
        np.testing.assert_array_equal(to_arrays(back)[name], array)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_value_that_is_not_finite_is_refused(bad: float) -> None:
    rows = np.zeros((3, 2), np.float32)
    rows[1, 1] = bad
    with pytest.raises(ValueError, match="NaN or Inf"):
        Observer().add(rows)


def test_an_observer_that_saw_nothing_says_so() -> None:
    with pytest.raises(ValueError, match="nothing was observed"):
        Observer().statistics()


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("kind", ["zero", "constant", "positive", "negative", "normal", "outlier"])
def test_every_method_gives_a_proper_range(method: str, symmetric: bool, kind: str) -> None:
    normal = np.random.default_rng(0).standard_normal((500, 8))
    rows = {
        "zero": np.zeros((40, 3)),
        "constant": np.full((40, 3), 2.5),
        "positive": np.abs(normal),
        "negative": -np.abs(normal),
        "normal": normal,
        "outlier": np.where(np.arange(500)[:, None] == 7, normal * 100, normal),
    }[kind]
    stats = observed(rows)
    low, high = clipping_range(stats, method, symmetric)
    assert low <= 0 <= high
    assert low < high
    assert not symmetric or low == -high
    if kind != "zero":
        assert low >= (-stats.amax if symmetric else min(stats.min, 0))
        assert high <= (stats.amax if symmetric else max(stats.max, 0))


def test_minmax_covers_exactly_what_was_seen() -> None:
    stats = observed(np.array([[-1.0, 3.0], [0.5, 2.0]]))
    assert clipping_range(stats, "minmax", symmetric=False) == (-1.0, 3.0)
    assert clipping_range(stats, "minmax", symmetric=True) == (-3.0, 3.0)


def rounding_error(values: np.ndarray, low: float, high: float) -> float:
    step = (high - low) / 255
    zero = round(-low / step)
    rounded = (np.clip(np.round(values / step) + zero, 0, 255) - zero) * step
    return float(np.square(rounded - values).mean())


@pytest.mark.parametrize("symmetric", [True, False])
def test_mse_cuts_an_outlier_where_minmax_spends_its_codes_on_it(symmetric: bool) -> None:
    values = np.random.default_rng(0).standard_normal((50_000, 4))
    values[0, 0] = 20.0
    stats = observed(values)
    by_mse = rounding_error(values, *clipping_range(stats, "mse", symmetric))
    assert by_mse < 0.8 * rounding_error(values, *clipping_range(stats, "minmax", symmetric))


def test_percentile_and_entropy_cut_a_lone_outlier() -> None:
    values = np.random.default_rng(0).standard_normal((5000, 8))
    values[0, 0] = 500.0
    stats = observed(values)
    assert 3 < clipping_range(stats, "percentile", symmetric=True, percentile=99.9)[1] < 10
    assert clipping_range(stats, "entropy", symmetric=True)[1] < 100


def test_an_unknown_method_is_refused() -> None:
    with pytest.raises(ValueError, match="unknown method 'guess'"):
        clipping_range(observed(np.ones((2, 2))), "guess", symmetric=True)
