"""Statistics: what calibration keeps about a tensor, and how a clipping range is chosen from it.

An Observer takes activations a batch at a time and never keeps one: its size depends on the number of channels and
bins alone. Which tensors are observed, and on which data, is passes/calibrate.py's business.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Floats = NDArray[np.floating[Any]]

METHODS = ("minmax", "percentile", "entropy", "mse")
BINS = 4096
_SMALLEST_REACH = 2.0**-24
_SEARCHED = 64  # clipping candidates per side


@dataclass(frozen=True)
class Statistics:
    """One tensor [..., channels], observed over count rows (real tokens). Arrays are per channel unless said.

    histogram: int64 [BINS] over the whole tensor, equal bins from -reach to reach; reach is a power of two that
    covers every value. mean and mean_square are float64, the extremes float32.
    products: float32 [channels, channels], the mean over rows of x x^T, where a method asked for it; it gives the
    squared error of any product with the tensor exactly, and is too large to keep for more than one tensor at a time.
    """

    count: int
    reach: float
    histogram: NDArray[np.int64]
    channel_min: NDArray[np.float32]
    channel_max: NDArray[np.float32]
    channel_mean: NDArray[np.float64]
    channel_mean_square: NDArray[np.float64]
    products: NDArray[np.float32] | None = None

    @property
    def min(self) -> float:
        return float(self.channel_min.min())

    @property
    def max(self) -> float:
        return float(self.channel_max.max())

    @property
    def amax(self) -> float:
        return max(-self.min, self.max)

    @property
    def channel_amax(self) -> NDArray[np.float32]:
        return np.maximum(-self.channel_min, self.channel_max)


def to_arrays(statistics: Statistics) -> dict[str, NDArray[Any]]:
    """As named arrays that np.savez stores without pickle, but for products; from_arrays is the inverse."""
    return {n: np.asarray(getattr(statistics, n)) for n in Statistics.__dataclass_fields__ if n != "products"}


def from_arrays(arrays: Mapping[str, NDArray[Any]]) -> Statistics:
    return Statistics(
        count=int(arrays["count"]),
        reach=float(arrays["reach"]),
        histogram=arrays["histogram"],
        channel_min=arrays["channel_min"],
        channel_max=arrays["channel_max"],
        channel_mean=arrays["channel_mean"],
        channel_mean_square=arrays["channel_mean_square"],
    )


class Observer:
    """Accumulates the Statistics of one tensor in one pass over its batches, in constant memory."""

    def __init__(self) -> None:
        self._count = 0
        self._products: NDArray[np.float32] | None = None
        self._reach = _SMALLEST_REACH
        self._histogram = np.zeros(BINS, np.int64)
        self._min = self._max = np.empty(0, np.float32)
        self._sum = self._square = np.empty(0)

    def add(self, rows: Floats) -> None:
        """rows: [n, channels], finite. Raises ValueError if any value is NaN or Inf."""
        if not len(rows):
            return
        low, high = rows.min(axis=0), rows.max(axis=0)
        if not (np.isfinite(low).all() and np.isfinite(high).all()):
            raise ValueError("NaN or Inf")
        if self._count:
            low, high = np.minimum(low, self._min), np.maximum(high, self._max)
            self._sum = self._sum + rows.sum(axis=0, dtype=np.float64)
            self._square = self._square + np.square(rows, dtype=np.float64).sum(axis=0)
        else:
            self._sum = rows.sum(axis=0, dtype=np.float64)
            self._square = np.square(rows, dtype=np.float64).sum(axis=0)
        self._min, self._max = low.astype(np.float32), high.astype(np.float32)
        self._count += len(rows)
        self._grow(float(max(-low.min(), high.max())))
        # The factor is a power of two, so that the product is exact and merging bins later changes nothing.
        index = rows.ravel() * np.float32(BINS / 2 / self._reach)
        np.floor(index, out=index)
        index += BINS // 2
        np.minimum(index, BINS - 1, out=index)
        self._histogram += np.bincount(index.astype(np.intp), minlength=BINS)

    def add_products(self, rows: Floats) -> None:
        """As add, and take the products of channels too: for every batch, or for none."""
        self.add(rows)
        if len(rows):
            rows = rows.astype(np.float32, copy=False)
            products: NDArray[np.float32] = np.matmul(rows.T, rows, dtype=np.float32)
            if self._products is None:
                self._products = products
            else:
                self._products += products

    def _grow(self, amax: float) -> None:
        """Double the reach until it covers amax; two old bins fall into one new bin, so no count is lost."""
        while self._reach < amax:
            merged = np.zeros_like(self._histogram)
            merged[BINS // 4 : 3 * BINS // 4] = self._histogram.reshape(-1, 2).sum(axis=1)
            self._histogram, self._reach = merged, self._reach * 2

    def statistics(self) -> Statistics:
        """What was seen so far. Raises ValueError if that is nothing."""
        if not self._count:
            raise ValueError("nothing was observed")
        return Statistics(
            self._count,
            self._reach,
            self._histogram.copy(),
            self._min,
            self._max,
            self._sum / self._count,
            self._square / self._count,
            None if self._products is None else self._products / np.float32(self._count),
        )


def clipping_range(
    statistics: Statistics, method: str, symmetric: bool, percentile: float = 99.99
) -> tuple[float, float]:
    """The interval [low, high] that 8-bit rounding should cover: low <= 0 <= high, low < high.

    minmax: all that was seen. percentile: so many per cent of the values, the rest cut evenly from both ends.
    entropy: least KL divergence between the histogram and its 8-bit image (the method of TensorRT's calibrator,
    widened to two sides). mse: least expected squared error, rounding and clipping together.
    An all-zero tensor gets [-1, 1].
    symmetric: low = -high. Raises ValueError for another method.
    """
    if method not in METHODS:
        raise ValueError(f"unknown method {method!r}: one of {', '.join(METHODS)}")
    low, high = min(statistics.min, 0.0), max(statistics.max, 0.0)
    if symmetric:
        low, high = -statistics.amax, statistics.amax
    if low == high:
        return -1.0, 1.0
    if method == "percentile":
        low, high = _percentile(statistics, low, high, symmetric, percentile)
    elif method == "entropy":
        low, high = min(
            ((low * r, high * r) for r in np.linspace(1, 0.1, _SEARCHED)),
            key=lambda ends: _divergence(statistics, *ends),
        )
    elif method == "mse":
        low, high = _least_error(statistics, low, high, symmetric)
    return float(low), float(high)


def _centers(statistics: Statistics) -> NDArray[np.float64]:
    width = 2 * statistics.reach / BINS
    centers: NDArray[np.float64] = (np.arange(BINS, dtype=np.float64) + 0.5) * width - statistics.reach
    return centers


def _percentile(
    statistics: Statistics, low: float, high: float, symmetric: bool, percentile: float
) -> tuple[float, float]:
    tail = (1 - percentile / 100) / 2
    share = np.cumsum(statistics.histogram) / statistics.histogram.sum()
    edges = np.linspace(-statistics.reach, statistics.reach, BINS + 1)
    below = max(low, min(edges[int(np.searchsorted(share, tail, side="right"))], 0.0))
    above = min(high, max(edges[int(np.searchsorted(share, 1 - tail, side="left")) + 1], 0.0))
    if symmetric:
        above = max(-below, above)
        below = -above
    return (below, above) if below < above else (low, high)


def _least_error(statistics: Statistics, low: float, high: float, symmetric: bool) -> tuple[float, float]:
    ratios = np.linspace(1, 0.02, _SEARCHED)
    if symmetric:
        return min(((low * r, high * r) for r in ratios), key=lambda ends: _squared_error(statistics, *ends))
    ends = low, high
    for _ in range(2):  # one side at a time; the second round changes little, a third nothing
        lows = [(low * r, ends[1]) for r in ratios if low * r < ends[1]]
        ends = min(lows, key=lambda e: _squared_error(statistics, *e))
        highs = [(ends[0], high * r) for r in ratios if ends[0] < high * r]
        ends = min(highs, key=lambda e: _squared_error(statistics, *e))
    return ends


def _rounded(statistics: Statistics, low: float, high: float) -> NDArray[np.float64]:
    """The bin centers after 8-bit rounding to [low, high]."""
    step = (high - low) / 255
    zero = np.round(-low / step)
    codes = np.clip(np.round(_centers(statistics) / step) + zero, 0, 255)
    rounded: NDArray[np.float64] = (codes - zero) * step
    return rounded


def _squared_error(statistics: Statistics, low: float, high: float) -> float:
    error = _rounded(statistics, low, high) - _centers(statistics)
    return float(statistics.histogram @ np.square(error))


def _divergence(statistics: Statistics, low: float, high: float) -> float:
    """KL(p || q): p is the histogram clipped mass moved to its ends, q spreads each code's mass evenly."""
    counts = statistics.histogram.astype(np.float64)
    centers = _centers(statistics)
    inside = np.flatnonzero((centers >= low) & (centers <= high))
    if not len(inside):
        return np.inf
    first, last = inside[0], inside[-1] + 1
    p: NDArray[np.float64] = counts[first:last].copy()
    codes = np.floor((centers[first:last] - low) / (high - low) * 256).clip(0, 255).astype(np.int64)
    occupied = p > 0
    mass = np.bincount(codes, p, 256)
    width = np.bincount(codes, occupied, 256)
    p[0] += counts[:first].sum()
    p[-1] += counts[last:].sum()
    q = np.where(occupied, mass[codes] / np.maximum(width[codes], 1), 0)
    p /= p.sum()
    q = q / max(q.sum(), 1e-30)
    support = p > 0
    return float((p[support] * np.log(p[support] / np.maximum(q[support], 1e-12))).sum())
