"""Bounds against scipy, and against the exact probabilities of the outcomes that they speak of."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from medcompile.metrics import intervals
from medcompile.metrics.intervals import (
    beta_quantile,
    binomial_bounds,
    event_widths,
    resampled_totals,
    student_quantile,
    studentized,
)


@pytest.mark.parametrize("p", [0.001, 0.025, 0.05, 0.5, 0.95, 0.999])
@pytest.mark.parametrize(("a", "b"), [(1, 500), (0.3, 7.2), (2.5, 0.5), (1.0, 1.0), (40, 9_000), (20_000, 30_000)])
def test_beta_quantile_equals_scipy(p: float, a: float, b: float) -> None:
    assert beta_quantile(p, a, b) == pytest.approx(stats.beta.ppf(p, a, b), rel=1e-8)


@pytest.mark.parametrize("freedom", [1, 2, 9, 99, 9_000])
def test_student_quantile_equals_scipy(freedom: int) -> None:
    for p in (0.9, 0.95, 0.975, 0.999):
        assert student_quantile(p, freedom) == pytest.approx(stats.t.ppf(p, freedom), rel=1e-8)


def test_binomial_bounds_equal_scipys_exact_interval() -> None:
    for count, trials in ((0, 20), (3, 20), (20, 20), (37, 923)):
        expected = stats.binomtest(count, trials).proportion_ci(0.9, "exact")
        assert binomial_bounds(count, trials, 0.05) == pytest.approx((expected.low, expected.high), abs=1e-9)


def test_without_any_flip_the_lower_bound_is_the_rule_of_three() -> None:
    below, above = event_widths(0.0, 0.0, 1 / 500, 0.05)
    assert below == above == pytest.approx(1 - 0.05 ** (1 / 500))
    assert below * 500 == pytest.approx(3.0, abs=0.02)


def test_one_way_flips_get_the_clopper_pearson_bound() -> None:
    below, above = event_widths(7, 0, 1 / 500, 0.05)
    assert 7 / 500 + below == pytest.approx(stats.beta.ppf(0.95, 8, 493))
    assert above < 7 / 500


def test_false_non_inferior_probability_is_at_most_alpha_at_every_true_drop_and_rate_of_gains() -> None:
    n, alpha = 60, 0.05
    lower = np.full((n + 1, n + 1), -1.0)
    for lost in range(n + 1):
        for gained in range(n + 1 - lost):
            lower[lost, gained] = (gained - lost) / n - event_widths(lost, gained, 1 / n, alpha)[0]
    losses, gains = np.arange(n + 1)[:, None], np.arange(n + 1)[None, :]
    worst = 0.0
    for gain in (0.0, 0.002, 0.01, 0.02, 0.05, 0.1, 0.2, 0.3):
        for drop in np.linspace(1.2, 15, 47) / n:
            chance = stats.binom.pmf(losses, n, gain + drop)
            chance = chance * stats.binom.pmf(gains, np.maximum(n - losses, 0), gain / (1 - gain - drop))
            worst = max(worst, float(chance[lower > -drop + 1e-12].sum()))
    assert 0.04 < worst <= alpha


def test_larger_events_widen_the_bounds() -> None:
    widths = [event_widths(0.02 / size, 0.01 / size, size, 0.05)[0] for size in (0.001, 0.003, 0.01)]
    assert widths == sorted(widths)
    assert widths[2] > 2 * widths[0]


def test_resampled_totals_are_draws_with_replacement_whatever_the_chunk(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = np.random.default_rng(1).exponential(size=(400, 2))
    totals = resampled_totals(np.concatenate([rows, np.ones((400, 1))], axis=1), resamples=4_000)
    assert (totals[:, 2] == 400).all()
    assert totals[:, 0].mean() == pytest.approx(rows[:, 0].sum(), rel=0.005)
    assert totals[:, 0].std() == pytest.approx(rows[:, 0].std() * 20, rel=0.05)
    monkeypatch.setattr(intervals, "_CELLS_AT_ONCE", 401)
    assert np.allclose(resampled_totals(rows, resamples=50), totals[:50, :2])


def test_equal_rows_are_drawn_with_the_spread_of_single_draws() -> None:
    rows = np.repeat(np.array([[1.0, 0.0], [0.0, 3.0]]), [250, 50], axis=0)
    totals = resampled_totals(rows, resamples=20_000)
    assert (totals[:, 0] + totals[:, 1] / 3 == 300).all()
    assert totals[:, 0].mean() == pytest.approx(250, abs=0.2)
    assert totals[:, 0].std() == pytest.approx(np.sqrt(300 * 250 / 300 * 50 / 300), rel=0.03)


def test_studentized_bounds_equal_a_plain_bootstrap_t_of_the_same_units() -> None:
    values = np.random.default_rng(2).lognormal(size=300)

    def mean(totals: np.ndarray) -> np.ndarray:
        return np.asarray(totals[..., 0] / totals[..., 1])

    error, scaled = studentized(np.column_stack([values, np.ones(300)]), mean, resamples=40_000)
    values = np.append(values, values.min())  # the unit that speaks most against a high mean counts twice
    assert error == pytest.approx(values.std(ddof=1) / np.sqrt(301), rel=1e-6)
    draws = np.random.default_rng(3).choice(values, size=(40_000, 301))
    plain = (draws.mean(axis=1) - values.mean()) / (draws.std(axis=1, ddof=1) / np.sqrt(301))
    for share in (0.025, 0.05, 0.5, 0.95, 0.975):
        assert np.quantile(scaled, share) == pytest.approx(np.quantile(plain, share), abs=0.05)
