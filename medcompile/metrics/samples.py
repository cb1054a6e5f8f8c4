"""Paired samples: the reference and the candidate judged on the same items, ready for bounds at any level.

Two kinds: counted flips of yes/no observations, and sufficient statistics per unit for metrics that are no plain
share. What fills them is in tasks.py; the margin comes in judge.py.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from medcompile.metrics.intervals import (
    NORMAL,
    RESAMPLES,
    Floats,
    bca_widths,
    event_widths,
    jackknife,
    resampled_totals,
    student_quantile,
)

Bools = NDArray[np.bool_]
Ints = NDArray[np.int64]

FEW_UNITS = 20
"""Below this many differing units a bootstrap has too few events to resample; bounds come from counting instead."""
_PRIOR_UNITS = 2.0  # weight, in differing units, of the clump size assumed before any flip was seen


class Sample(Protocol):
    """A metric's paired result. widths: how far the one-sided bounds at level alpha lie from the difference."""

    @property
    def reference(self) -> float: ...
    @property
    def value(self) -> float: ...
    @property
    def samples(self) -> int: ...
    @property
    def units(self) -> int: ...
    @property
    def discordant(self) -> int | None: ...
    @property
    def events(self) -> float:
        """How many single events the metric is made of; a drop below 1 / events can't be seen."""
        ...

    def method(self) -> str: ...
    def widths(self, alpha: float) -> tuple[float, float]: ...
    def power(self, margin: float, alpha: float, growth: float = 1.0) -> float:
        """Chance of a lower bound above -margin at zero true drop, the noise as seen, on growth times the items."""
        ...


def _event_power(losses: float, gains: float, size: float, *, one_way: bool, margin: float, alpha: float) -> float:
    """Power of event_widths when the seen events fall evenly on both sides (or all on one, where gains can't be)."""
    total = losses + gains
    balanced = (total, 0.0) if one_way else (total / 2, total / 2)
    room = margin - event_widths(*balanced, size, alpha)[0]
    error = math.sqrt(total * size)
    return NORMAL.cdf(room / error) if error > 0 else float(room > 0)


@dataclass(frozen=True)
class PairedFlips:
    """Yes/no observations, true where the model is right. [n] each; unit counts from 0 without gaps.
    one_way: the reference is right by definition (agreement with it), so that nothing can be gained.

    The difference of shares gets an exact paired interval. Observations that share a unit are not independent: flips
    then count as fewer, by the design effect (the variance between units over the variance of independent flips).
    Source: Rao and Scott 1992; Korn and Graubard 1998 for effective counts in Clopper and Pearson's interval.
    """

    reference_right: Bools
    candidate_right: Bools
    unit: Ints
    one_way: bool = False

    @cached_property
    def _losses(self) -> int:
        return int((self.reference_right & ~self.candidate_right).sum())

    @cached_property
    def _gains(self) -> int:
        return int((~self.reference_right & self.candidate_right).sum())

    @property
    def reference(self) -> float:
        return float(self.reference_right.mean())

    @property
    def value(self) -> float:
        return float(self.candidate_right.mean())

    @property
    def samples(self) -> int:
        return len(self.unit)

    @cached_property
    def units(self) -> int:
        return len(np.unique(self.unit))

    @property
    def discordant(self) -> int:
        return self._losses + self._gains

    @property
    def events(self) -> float:
        return float(self.samples)

    @cached_property
    def design_effect(self) -> float:
        """At least 1. Before any flip it is the root of the mean unit size, halfway (as a ratio) between independent
        observations and units that flip as a whole; each unit that differs moves it towards what the data say."""
        if self.units == self.samples:
            return 1.0
        if self.units < 2:
            return float(self.samples)
        flips = self.candidate_right.astype(np.float64) - self.reference_right
        sizes, sums = np.bincount(self.unit).astype(np.float64), np.bincount(self.unit, weights=flips)
        expected = math.sqrt(self.samples / self.units)
        independent = float(((flips - flips.mean()) ** 2).sum())
        between = float(((sums - flips.mean() * sizes) ** 2).sum()) * self.units / (self.units - 1)
        seen = between / independent if independent > 0 else expected
        differing = float(np.count_nonzero(np.bincount(self.unit, weights=flips != 0)))
        mixed = (differing * seen + _PRIOR_UNITS * expected) / (differing + _PRIOR_UNITS)
        widened = (student_quantile(0.95, self.units - 1) / NORMAL.inv_cdf(0.95)) ** 2
        return min(max(mixed * widened, 1.0), float(self.samples))

    def method(self) -> str:
        name = "exact paired interval (Clopper-Pearson, MOVER)"
        clustered = f", design effect {self.design_effect:.2f}" if self.units < self.samples else ""
        return name + clustered + (", no flips" if not self.discordant else "")

    def widths(self, alpha: float) -> tuple[float, float]:
        n = self.samples
        below, above = event_widths(self._losses / n, self._gains / n, self.design_effect / n, alpha)
        difference = self.value - self.reference
        return below, min(above, -difference) if self.one_way else above

    def power(self, margin: float, alpha: float, growth: float = 1.0) -> float:
        n = self.samples
        size = self.design_effect / (n * growth)
        return _event_power(self._losses / n, self._gains / n, size, one_way=self.one_way, margin=margin, alpha=alpha)


@dataclass(frozen=True)
class UnitTotals:
    """Sufficient statistics per unit: common (gold counts) [units, c], and those of each model [units, m]."""

    common: Floats
    reference: Floats
    candidate: Floats
    resamples: int = RESAMPLES

    @cached_property
    def rows(self) -> Floats:
        return np.concatenate([self.common, self.reference, self.candidate], axis=1)

    @cached_property
    def resampled(self) -> Floats:
        """Totals of every resample by unit, shared by every metric over these statistics."""
        return resampled_totals(self.rows, self.resamples)

    @cached_property
    def differing(self) -> int:
        return int((self.reference != self.candidate).any(axis=1).sum())


@dataclass(frozen=True)
class PairedTotals:
    """A metric that is a function of totals: score(common [..., c], model [..., m]) -> [...].

    resolution: differences below it are rounding, and no interval is narrower than it on either side (0 for metrics
    made of decisions, where too few differing units switch to counting events instead).
    """

    totals: UnitTotals
    score: Callable[[Floats, Floats], Floats]
    samples: int
    events: float = math.inf
    discordant: int | None = None
    resolution: float = 0.0

    def _scores(self, totals: Floats) -> tuple[Floats, Floats]:
        c = self.totals.common.shape[1]
        m = self.totals.reference.shape[1]
        common = totals[..., :c]
        return self.score(common, totals[..., c : c + m]), self.score(common, totals[..., c + m :])

    def _difference(self, totals: Floats) -> Floats:
        reference, candidate = self._scores(totals)
        return candidate - reference

    @cached_property
    def _values(self) -> tuple[float, float]:
        reference, candidate = self._scores(self.totals.rows.sum(axis=0))
        return float(reference), float(candidate)

    @property
    def reference(self) -> float:
        return self._values[0]

    @property
    def value(self) -> float:
        return self._values[1]

    @property
    def units(self) -> int:
        return len(self.totals.rows)

    @property
    def counted(self) -> bool:
        """True where too few units differ for a bootstrap."""
        return self.resolution == 0.0 and self.totals.differing < FEW_UNITS

    @cached_property
    def _sorted(self) -> Floats:
        return np.sort(self._difference(self.totals.resampled))

    @cached_property
    def _jackknife(self) -> tuple[float, float]:
        return jackknife(self.totals.rows, self._difference)

    @cached_property
    def _events(self) -> tuple[float, float, float]:
        """Losses, gains and event size: what each unit adds to the difference, the size-weighted mean of it.

        Before any difference was seen, an event is a unit that loses all it has; where units hold several items, the
        root of their number of items stands between one lost item and a lost unit.
        """
        common, candidate = self.totals.common.sum(axis=0), self.totals.candidate.sum(axis=0)
        restored = self.score(common, candidate - self.totals.candidate + self.totals.reference)
        shifts = self.score(common, candidate) - restored
        losses, gains = float(-shifts[shifts < 0].sum()), float(shifts[shifts > 0].sum())
        prior = max(self.reference, 1e-9) / math.sqrt(self.units * max(self.samples, self.units))
        weight = _PRIOR_UNITS * prior
        return losses, gains, (float((shifts**2).sum()) + weight * prior) / (losses + gains + weight)

    def method(self) -> str:
        if self.units < 2:
            return "none: one unit has no spread"
        if self.counted:
            return f"exact-type interval by events, {self.totals.differing or 'no'} differing units"
        return f"BCa paired bootstrap, {self.totals.resamples} resamples"

    def widths(self, alpha: float) -> tuple[float, float]:
        if self.units < 2:
            return 1.0 + self.value - self.reference, 1.0 - self.value + self.reference
        if self.counted:
            return event_widths(*self._events, alpha)
        below, above = bca_widths(self.value - self.reference, self._sorted, self._jackknife[1], self.units, alpha)
        return max(below, self.resolution), max(above, self.resolution)

    def power(self, margin: float, alpha: float, growth: float = 1.0) -> float:
        if self.counted:
            losses, gains, size = self._events
            return _event_power(losses, gains, size / growth, one_way=False, margin=margin, alpha=alpha)
        error = max(self._jackknife[0], self.resolution) / math.sqrt(growth)
        return NORMAL.cdf(margin / error - NORMAL.inv_cdf(1.0 - alpha))


@dataclass(frozen=True)
class LowestValue:
    """The worst of many values, for reports: an extreme has no confidence bound, but a low quantile has one.

    lowest: the worst value of each unit. The lower bound is the worst value seen: with 97.5 % confidence at most
    `share` of all units lie below it; the upper bound is an order statistic for that same quantile. It can't be
    budgeted, because the share shrinks as items are added. Source: David and Nagaraja 2003, section 7.1.
    """

    lowest: Floats
    samples: int
    reference: float = 1.0
    discordant: int | None = None
    events: float = math.inf

    @property
    def share(self) -> float:
        return float(1.0 - 0.025 ** (1.0 / self.units))

    @property
    def value(self) -> float:
        return float(self.lowest.min())

    @property
    def units(self) -> int:
        return len(self.lowest)

    def method(self) -> str:
        return f"order statistic: at most {100 * self.share:.2g} % of units below the lowest (97.5 % confidence)"

    def widths(self, alpha: float) -> tuple[float, float]:
        rank, term = 0, (1.0 - self.share) ** self.units
        reached = term
        while reached < 1.0 - alpha and rank < self.units:
            term *= (self.units - rank) / (rank + 1) * self.share / (1.0 - self.share)
            rank += 1
            reached += term
        above = np.sort(self.lowest)[rank] if rank < self.units else self.reference
        return 0.0, float(above) - self.value

    def power(self, margin: float, alpha: float, growth: float = 1.0) -> float:
        raise NotImplementedError("an extreme is reported, not judged")
