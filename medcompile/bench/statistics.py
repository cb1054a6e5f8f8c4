"""From turns to verdicts: ratios within rounds, their intervals, and what is beyond noise. Numbers in, numbers out.

A contender is compared with another inside each round, where both met the same minute of the machine; what is left is
a ratio for each round, and the rounds are what is resampled. The median of the rounds is reported: a burst of other
work in a few rounds moves it little, as it would a mean.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np

from medcompile.metrics.intervals import NORMAL, student_quantile

Turns = Sequence[float | None]
Logs = np.ndarray[tuple[int], np.dtype[np.float64]]

MIN_ROUNDS = 6
"""With five, even the interval from the lowest to the highest round holds the median in 93.8 % of cases only."""
CONFIDENCE = 0.95
_RESAMPLES = 20_000
_SEED = 0


@dataclass(frozen=True)
class Ratio:
    """A ratio of times (below 1 is faster) with its interval; low and high are None below MIN_ROUNDS rounds."""

    value: float
    low: float | None
    high: float | None
    rounds: int

    @property
    def no_difference(self) -> bool | None:
        """True where the interval holds 1; None where there is none."""
        return None if self.low is None or self.high is None else self.low <= 1.0 <= self.high


def ratio(turns: Turns, reference: Turns, confidence: float = CONFIDENCE) -> Ratio | None:
    """The median over rounds of turns / reference, of the rounds that both had; None if there is none."""
    logs = _log_ratios(turns, reference)
    if not len(logs):
        return None
    value = math.exp(float(np.median(logs)))
    if len(logs) < MIN_ROUNDS:
        return Ratio(value, None, None, len(logs))
    low, high = np.quantile(_medians(logs, 0), _levels(confidence, len(logs)))
    return Ratio(value, math.exp(low), math.exp(high), len(logs))


def change(new: tuple[Turns, Turns], old: tuple[Turns, Turns], confidence: float = CONFIDENCE) -> Ratio | None:
    """The ratio of two ratios, each (turns, those of its reference): above 1 is slower than it was.

    What slows the whole machine, or another machine, is in both parts of a ratio and cancels. None where one is empty.
    """
    after, before = _log_ratios(*new), _log_ratios(*old)
    if not len(after) or not len(before):
        return None
    value = math.exp(float(np.median(after) - np.median(before)))
    rounds = min(len(after), len(before))
    if rounds < MIN_ROUNDS:
        return Ratio(value, None, None, rounds)
    low, high = np.quantile(_medians(after, 0) - _medians(before, 1), _levels(confidence, rounds))
    return Ratio(value, math.exp(low), math.exp(high), rounds)


def percentile(values: Sequence[float], share: float) -> float | None:
    """That percentile; None where it would lie beyond the outermost run (p90 wants 10 runs, p99 100)."""
    if not values or (share != 0.5 and len(values) * min(share, 1 - share) < 0.999):
        return None
    return float(np.quantile(np.asarray(values, np.float64), share))


def variation(values: Sequence[float]) -> float:
    """Standard deviation over mean; 0 of fewer than two values."""
    return float(np.std(values, ddof=1) / np.mean(values)) if len(values) > 1 else 0.0


def _log_ratios(turns: Turns, reference: Turns) -> Logs:
    both = [(a, b) for a, b in zip(turns, reference, strict=False) if a is not None and b is not None]
    return np.log(np.array([a / b for a, b in both], np.float64)) if both else np.zeros(0)


def _medians(logs: Logs, stream: int) -> Logs:
    """The median of each resample of the rounds."""
    low, high = _middles(len(logs), stream)
    ranked = np.sort(logs)
    return np.asarray((ranked[low] + ranked[high]) / 2)


@lru_cache(maxsize=64)
def _middles(count: int, stream: int) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """Which ranks, of count values, are in the middle of each resample: they don't depend on the values."""
    drawn = np.sort(np.random.default_rng([_SEED, stream]).integers(0, count, (_RESAMPLES, count)), axis=1)
    return drawn[:, (count - 1) // 2], drawn[:, count // 2]


def _levels(confidence: float, rounds: int) -> list[float]:
    """Percentiles of the resamples that make an interval of that confidence.

    The plain percentiles are too narrow for a handful of rounds; these are moved outward by what Student's t and the
    divisor n - 1 would add to a mean. Source: Hesterberg 2015, "What Teachers Should Know About the Bootstrap", 5.3.
    """
    t = student_quantile((1 + confidence) / 2, rounds - 1)
    outer = NORMAL.cdf(-t * math.sqrt(rounds / (rounds - 1)))
    return [outer, 1 - outer]
