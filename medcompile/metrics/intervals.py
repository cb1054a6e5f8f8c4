"""Confidence bounds for paired differences: exact ones for counted flips, studentized bootstrap for the rest.

Numbers in, bounds out; what a metric is and what a margin means is not known here. Every bound is one-sided at level
alpha, and is returned as its distance from the estimate, so that callers can also centre it at zero for power.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import lru_cache
from statistics import NormalDist

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]

NORMAL = NormalDist()
RESAMPLES = 10_000
SEED = 0
_CELLS_AT_ONCE = 1 << 20  # resample weights held at once: 8 MiB
_DRAWS_PER_KIND = 10  # single draws that cost as much as one multinomial count


def _beta_fraction(x: float, a: float, b: float) -> float:
    """Lentz's continued fraction of the incomplete beta function; converges fast for x < (a + 1) / (a + b + 2)."""
    tiny = 1e-300
    c, d = 1.0, 1.0 / max(1.0 - (a + b) * x / (a + 1.0), tiny)
    result = d
    for m in range(1, 10_000):
        for term in (
            m * (b - m) * x / ((a + 2 * m - 1) * (a + 2 * m)),
            -(a + m) * (a + b + m) * x / ((a + 2 * m) * (a + 2 * m + 1)),
        ):
            d = 1.0 + term * d
            d = 1.0 / (d if abs(d) > tiny else tiny)
            c = 1.0 + term / c
            c = c if abs(c) > tiny else tiny
            result *= c * d
        if abs(c * d - 1.0) < 1e-13:
            break
    return result


def beta_cdf(x: float, a: float, b: float) -> float:
    """Regularized incomplete beta function I_x(a, b), a and b > 0. Source: DLMF 8.17.22."""
    if x <= 0.0 or x >= 1.0:
        return float(x >= 1.0)
    log_front = a * math.log(x) + b * math.log1p(-x) + math.lgamma(a + b) - math.lgamma(a) - math.lgamma(b)
    if x < (a + 1.0) / (a + b + 2.0):
        return math.exp(log_front) * _beta_fraction(x, a, b) / a
    return 1.0 - math.exp(log_front) * _beta_fraction(1.0 - x, b, a) / b


@lru_cache(maxsize=4096)
def beta_quantile(p: float, a: float, b: float) -> float:
    """The x with I_x(a, b) = p, by Newton's method kept inside a shrinking bracket."""
    log_norm = math.lgamma(a + b) - math.lgamma(a) - math.lgamma(b)
    low, high, x = 0.0, 1.0, a / (a + b)
    for _ in range(200):
        error = beta_cdf(x, a, b) - p
        low, high = (x, high) if error < 0 else (low, x)
        density = math.exp(log_norm + (a - 1.0) * math.log(x) + (b - 1.0) * math.log1p(-x))
        step = x - error / density if density > 0 else low
        new = step if low < step < high else (low + high) / 2
        if abs(new - x) <= 1e-12 * x or new >= 1.0:
            return new
        x = new
    return x


def student_quantile(p: float, freedom: int) -> float:
    """The p quantile (p > 0.5) of Student's t with that many degrees of freedom."""
    x = beta_quantile(2.0 * (1.0 - p), freedom / 2.0, 0.5)
    return math.sqrt(freedom * (1.0 - x) / x)


def binomial_bounds(count: float, trials: float, alpha: float) -> tuple[float, float]:
    """Clopper and Pearson's one-sided lower and upper bounds of a share, each at level alpha.

    count may be fractional (an effective number of events). Source: Clopper and Pearson 1934, in its beta form.
    """
    lower = beta_quantile(alpha, count, trials - count + 1.0) if count > 0 else 0.0
    upper = beta_quantile(1.0 - alpha, count + 1.0, trials - count) if count < trials - 1e-9 else 1.0
    return lower, upper


def event_widths(losses: float, gains: float, size: float, alpha: float) -> tuple[float, float]:
    """How far the lower and upper bound of size x (gains - losses) lie from it, each one-sided at level alpha.

    losses, gains: how many events went against and for the candidate; fractional where events are only effective ones.
    size: weight of one event in the metric, 1/n for n independent items, more for events that come in clumps; 1/size
    is how many events there could be. With no event at all the bounds are exact, 1 - alpha^(1/n): the rule of three.
    Source: exact limits of the two shares joined by MOVER (Zou and Donner 2008) with the multinomial's correlation.
    Unlike Tango's score interval, whose level reaches 6.6 % near three expected events, the level stays below alpha
    over the whole grid of tests/metrics/test_intervals.py.
    """
    trials = max(1.0 / size, losses + gains, 1.0)
    lost, gained = losses / trials, gains / trials
    lost_low, lost_high = binomial_bounds(losses, trials, alpha)
    gained_low, gained_high = binomial_bounds(gains, trials, alpha)
    correlation = 0.0
    if 0 < lost < 1 and 0 < gained < 1:
        correlation = -math.sqrt(lost * gained / ((1 - lost) * (1 - gained)))

    def joined(first: float, second: float) -> float:
        return math.sqrt(first * first + second * second - 2 * correlation * first * second) * trials * size

    return joined(gained - gained_low, lost_high - lost), joined(gained_high - gained, lost - lost_low)


def resampled_totals(rows: Floats, resamples: int = RESAMPLES, seed: int = SEED) -> Floats:
    """Totals of the rows (units x statistics) in resamples drawn with replacement. Returns [resamples, statistics].

    Bounded memory: the weights of a chunk of resamples are drawn, multiplied with the rows, and dropped. Equal rows
    (most sentences hold one entity or none) are drawn together, from the multinomial that their number gives.
    """
    units = len(rows)
    rng = np.random.default_rng(seed)
    kinds, counts = np.unique(rows, axis=0, return_counts=True)
    grouped = len(kinds) * _DRAWS_PER_KIND < units
    chunk = max(1, _CELLS_AT_ONCE // (len(kinds) if grouped else units))
    totals = np.empty((resamples, rows.shape[1]))
    for start in range(0, resamples, chunk):
        size = min(chunk, resamples - start)
        if grouped:
            weights = rng.multinomial(units, counts / units, size=size)
        else:
            draws = rng.integers(0, units, size=(size, units)) + np.arange(size)[:, None] * units
            weights = np.bincount(draws.ravel(), minlength=size * units).reshape(size, units)
        totals[start : start + size] = weights.astype(np.float64) @ (kinds if grouped else rows)
    return totals


def studentized(
    rows: Floats, statistic: Callable[[Floats], Floats], resamples: int = RESAMPLES
) -> tuple[float, Floats]:
    """Standard error of statistic(totals of rows), and its sorted studentized errors in resamples by unit.

    statistic: totals [..., statistics] -> [...]. A one-sided bound lies standard error x quantile from the estimate.
    The unit that speaks most against the candidate counts twice, as Clopper and Pearson's upper bound counts one event
    more than was seen: the next unit may be as bad as the worst one, and long tails are understated without it.
    Source: Efron 1981's bootstrap-t, studentized by the jackknife's influence values (Davison and Hinkley 1997, 2.7).
    """
    left_out = statistic(rows.sum(axis=0) - rows)
    rows = np.concatenate([rows, rows[np.argmax(left_out)][None]])
    units, total = len(rows), rows.sum(axis=0)
    left_out = statistic(total - rows)
    influence = (left_out.mean() - left_out) * (1.0 - 1.0 / units)
    error = math.sqrt(float((influence**2).sum()) * units / (units - 1))
    totals = resampled_totals(np.column_stack([rows, influence, influence**2]), resamples)
    errors = statistic(totals[:, :-2]) - statistic(total)
    squares = (totals[:, -1] - totals[:, -2] ** 2 / units) * units / (units - 1)
    flat = squares <= 1e-12 * error**2
    scaled = errors / np.sqrt(np.where(flat, 1.0, squares))
    return error, np.sort(np.where(flat, np.copysign(np.inf, errors), scaled))
