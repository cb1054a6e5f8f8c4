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
    event_widths,
    student_quantile,
    studentized,
)

Bools = NDArray[np.bool_]
Ints = NDArray[np.int64]

FEW_EVENTS = 60.0
"""Below this many (effective) events a bootstrap is too sure (6 % false at 50 of them); they are counted instead."""
_PRIOR_UNITS = 2.0  # weight, in differing units, of the clump size assumed before any flip was seen


class Sample(Protocol):
    """A metric's paired result.

    widths: how far the one-sided bounds at level alpha lie from the difference; no smaller at a smaller level.
    """

    @property
    def reference(self) -> float: ...
    @property
    def value(self) -> float: ...
    @property
    def difference(self) -> float:
        """How much better the candidate is; below 0 where it is worse."""
        ...

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


@dataclass(frozen=True)
class _Events:
    """A difference as events of one size: how many losses and gains. one_way: nothing can be gained. scale: how far
    the metric reaches, so that scale / size is how many events there could be."""

    losses: float
    gains: float
    size: float
    one_way: bool = False
    scale: float = 1.0

    def widths(self, alpha: float) -> tuple[float, float]:
        below, above = event_widths(self.losses, self.gains, self.size / self.scale, alpha)
        return below * self.scale, above * self.scale

    def power(self, margin: float, alpha: float, growth: float) -> float:
        """Power when the seen events fall evenly on both sides (or all on one) and there are growth times as many."""
        total = (self.losses + self.gains) * growth
        split = (total, 0.0) if self.one_way else (total / 2, total / 2)
        room = margin - _Events(*split, self.size / growth, scale=self.scale).widths(alpha)[0]
        error = math.sqrt(total) * self.size / growth
        return NORMAL.cdf(room / error) if error > 0 else float(room > 0)


def _shrunk(seen: float, expected: float, differing: float) -> float:
    """What the units that differ say, mixed with what is expected of two more such units."""
    return (differing * seen + _PRIOR_UNITS * expected) / (differing + _PRIOR_UNITS)


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
    def difference(self) -> float:
        return self.value - self.reference

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
    def _clumps(self) -> tuple[float, float]:
        """Design effect and clump size, in items, both at least 1: how flips of a unit widen and skew the sum of all.

        Before any flip both are the root of the mean unit size, halfway (as a ratio) between independent items and
        units that flip as a whole; each unit that differs moves them towards what the data say. The clump size is the
        third moment between units over the second, the size that events of one size need for the sum's skewness.
        """
        if self.units == self.samples:
            return 1.0, 1.0
        if self.units < 2:
            return float(self.samples), float(self.samples)
        flips = self.candidate_right.astype(np.float64) - self.reference_right
        sizes, sums = np.bincount(self.unit), np.bincount(self.unit, weights=flips)
        apart = sums - flips.mean() * sizes
        apart = np.append(apart, apart.min())  # the worst unit twice: the next may be as bad (as in studentized)
        expected = math.sqrt(self.samples / self.units)
        effect, clump = expected, expected
        differing = int(np.count_nonzero(np.bincount(self.unit, weights=flips != 0)))
        squares = float((apart**2).sum())
        if squares > 0:
            effect = squares * self.units / (self.units - 1) / float(((flips - flips.mean()) ** 2).sum())
            clump = -float((apart**3).sum()) / squares
        few = (student_quantile(0.95, self.units - 1) / NORMAL.inv_cdf(0.95)) ** 2
        effect = min(max(_shrunk(effect, expected, differing) * few, 1.0), float(self.samples))
        return effect, max(_shrunk(clump, expected, differing), effect)

    @property
    def design_effect(self) -> float:
        return self._clumps[0]

    @cached_property
    def _events(self) -> _Events:
        effect, clump = self._clumps
        share = effect / clump**2  # so that size^2 x events is the variance with the design effect
        return _Events(self._losses * share, self._gains * share, clump / self.samples, self.one_way)

    def method(self) -> str:
        name = "exact paired interval (Clopper-Pearson, MOVER)"
        clustered = f", design effect {self.design_effect:.2f}" if self.units < self.samples else ""
        return name + clustered + (", no flips" if not self.discordant else "")

    def widths(self, alpha: float) -> tuple[float, float]:
        below, above = self._events.widths(alpha)
        return below, min(above, -self.difference) if self.one_way else above

    def power(self, margin: float, alpha: float, growth: float = 1.0) -> float:
        return self._events.power(margin, alpha, growth)


@dataclass(frozen=True)
class FlippedShare(PairedFlips):
    """The share of observations that flipped, of which less is better: the complement of an agreement.

    The reference's share is 0 by definition, and the margin is the largest share that is tolerated.
    """

    one_way: bool = True

    @property
    def reference(self) -> float:
        return 0.0

    @property
    def value(self) -> float:
        return 1.0 - float(self.candidate_right.mean())

    @property
    def difference(self) -> float:
        return -self.value


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
    def differing(self) -> int:
        return int((self.reference != self.candidate).any(axis=1).sum())


@dataclass(frozen=True)
class PairedTotals:
    """A metric that is a function of totals: score(common [..., c], model [..., m]) -> [...].

    largest: the most that one item can move the score; None where all weigh alike, score / samples.
    resolution: differences below it are rounding, and no interval is narrower than it on either side (0 for metrics
    made of decisions, where too few events switch to counting events instead). scale: how far the score reaches.
    """

    totals: UnitTotals
    score: Callable[[Floats, Floats], Floats]
    samples: int
    events: float = math.inf
    discordant: int | None = None
    resolution: float = 0.0
    largest: float | None = None
    scale: float = 1.0

    def _scores(self, totals: Floats) -> tuple[Floats, Floats]:
        c = self.totals.common.shape[1]
        m = self.totals.reference.shape[1]
        common = totals[..., :c]
        return self.score(common, totals[..., c : c + m]), self.score(common, totals[..., c + m :])

    def _gain(self, before: Floats, after: Floats) -> Floats:
        return after - before

    def _difference(self, totals: Floats) -> Floats:
        return self._gain(*self._scores(totals))

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
    def difference(self) -> float:
        return float(self._difference(self.totals.rows.sum(axis=0)))

    @property
    def units(self) -> int:
        return len(self.totals.rows)

    @property
    def _widest(self) -> float:
        return 2.0 * self.scale  # there and back: no difference is larger

    @property
    def counted(self) -> bool:
        """True where too few units move the metric for a bootstrap."""
        return self.resolution == 0.0 and self._events.losses + self._events.gains < FEW_EVENTS

    @cached_property
    def _studentized(self) -> tuple[float, Floats]:
        return studentized(self.totals.rows, self._difference, self.totals.resamples)

    @cached_property
    def _events(self) -> _Events:
        """The difference as events: what each unit adds to it, with a size that keeps the second and third moment.

        Before any difference was seen, an event is a unit that loses all it has; where units hold several items, the
        root of their number of items stands between one lost item and a lost unit.
        """
        common, candidate = self.totals.common.sum(axis=0), self.totals.candidate.sum(axis=0)
        restored = self.score(common, candidate - self.totals.candidate + self.totals.reference)
        shifts = self._gain(restored, self.score(common, candidate))
        items = max(self.samples, self.units)
        largest = max(self.reference, 1e-9) / items if self.largest is None else self.largest
        expected = largest * math.sqrt(items / self.units)
        first, second, third = (float((np.abs(shifts) ** k).sum()) + _PRIOR_UNITS * expected**k for k in (1, 2, 3))
        share = second / first / (third / second) ** 2
        losses, gains = float(-shifts[shifts < 0].sum()), float(shifts[shifts > 0].sum())
        return _Events(losses * share, gains * share, third / second, scale=self.scale)

    def method(self) -> str:
        if self.units < 2:
            return "none: one unit has no spread"
        if self.counted:
            return f"exact-type interval by events, {self.totals.differing or 'no'} differing units"
        return f"studentized paired bootstrap, {self.totals.resamples} resamples"

    def widths(self, alpha: float) -> tuple[float, float]:
        if self.units < 2:
            return 1.0 + self.difference, 1.0 - self.difference
        if self.counted:
            return self._events.widths(alpha)
        if alpha * self.totals.resamples < 1.0:  # so far out no resample lies
            return self._widest, self._widest
        error, scaled = self._studentized
        widths = np.quantile(scaled, 1.0 - alpha, method="higher"), -np.quantile(scaled, alpha, method="lower")
        below, above = (min(error * max(float(w), 0.0), self._widest) if error > 0 else 0.0 for w in widths)
        return max(below, self.resolution), max(above, self.resolution)

    def power(self, margin: float, alpha: float, growth: float = 1.0) -> float:
        if self.counted:
            return self._events.power(margin, alpha, growth)
        error = max(self._studentized[0], self.resolution) / math.sqrt(growth)
        return NORMAL.cdf(margin / error - NORMAL.inv_cdf(1.0 - alpha)) if error > 0 else float(margin > 0)


@dataclass(frozen=True)
class PairedCost(PairedTotals):
    """A metric of which less is better. relative: judged as a share of the reference's, 0.01 being 1 % of it."""

    relative: bool = False

    def _gain(self, before: Floats, after: Floats) -> Floats:
        return (before - after) / (before if self.relative else 1.0)

    def widths(self, alpha: float) -> tuple[float, float]:
        return super().widths(alpha) if self.units > 1 else (self._widest, self._widest)


@dataclass(frozen=True)
class LowestValue:
    """The worst of many values. An extreme has no confidence bound, so that what was seen is all that is judged.

    lowest: the worst value of each unit. What follows for units not seen is said beside it: the distribution-free
    tolerance bound of Wilks 1941 (David and Nagaraja 2003, section 7.2).
    """

    lowest: Floats
    samples: int
    reference: float = 1.0
    discordant: int | None = None
    events: float = math.inf

    @property
    def value(self) -> float:
        return float(self.lowest.min())

    @property
    def difference(self) -> float:
        return self.value - self.reference

    @property
    def units(self) -> int:
        return len(self.lowest)

    def unseen(self, confidence: float, unit: str) -> str:
        """What the worst one seen says of others like it. unit: what a unit is called."""
        share = 1.0 - (1.0 - confidence) ** (1.0 / self.units)
        return f"with {100 * confidence:g} % confidence, at most {100 * share:.2g} % of such {unit}s are worse"

    def method(self) -> str:
        return "the worst one seen; an extreme has no bound"

    def widths(self, alpha: float) -> tuple[float, float]:
        return 0.0, 0.0

    def power(self, margin: float, alpha: float, growth: float = 1.0) -> float:
        raise AssertionError("an extreme has no power")
