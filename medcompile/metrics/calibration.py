"""Calibration error: how far a model's stated confidence lies from how often it is right, and how far that may rise.

Expected calibration error of the top label in 15 bins of equal width (Guo et al. 2017): the items of a bin should be
right as often as they are confident; the gaps between the two add up, each weighing its bin's share of the items.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from medcompile.metrics.decisions import decisions, words_of
from medcompile.metrics.intervals import RESAMPLES, Floats
from medcompile.metrics.material import Ints, Material, per_unit, renumbered, share
from medcompile.metrics.samples import PairedTotals, Sample, UnitTotals

BINS = 15
_CLEAR = 3.0  # standard errors from 0 at which the sign of a bin's gap is taken as known


@dataclass(frozen=True)
class PairedCalibration:
    """Confidence less correctness, summed by unit and bin: gaps of both models, float [units, BINS]; counts [units].

    The errors shown are the plain ones, sums of |gap| / items. Their difference is no basis for a bound: where a gap
    is small beside its noise, |gap| is mostly noise, which a rise hides in. But in each bin |candidate's| less
    |reference's| is at most sign x (candidate's - reference's), where sign is that of the candidate's true gap, because
    |gap| is at least sign x gap for the reference. That is a mean of paired differences, whose noise is small. Where
    the sign is not clear from the data, the worse one is taken; where the reference's is clear, nothing is given away.
    So the bound errs on the safe side: at no rise at all it lies as far below 0 as items that move from one bin to
    another scatter the gaps. The upper bound is its mirror image.
    """

    reference_gaps: Floats
    candidate_gaps: Floats
    counts: Floats
    resamples: int = RESAMPLES

    @property
    def reference(self) -> float:
        return self._error(self.reference_gaps)

    @property
    def value(self) -> float:
        return self._error(self.candidate_gaps)

    @property
    def difference(self) -> float:
        return self.reference - self.value

    @property
    def samples(self) -> int:
        return int(self.counts.sum())

    @property
    def units(self) -> int:
        return len(self.counts)

    @property
    def discordant(self) -> int | None:
        return None

    @property
    def events(self) -> float:
        return math.inf

    def method(self) -> str:
        return f"{self._worst.method()}, of the gaps' differences by their signs"

    def widths(self, alpha: float) -> tuple[float, float]:
        lower = self._worst.difference - self._worst.widths(alpha)[0]
        upper = self._best.difference + self._best.widths(alpha)[1]
        return max(self.difference - lower, 0.0), max(upper - self.difference, 0.0)

    def power(self, margin: float, alpha: float, growth: float = 1.0) -> float:
        unclear = ~(self._clear(self.candidate_gaps) | self._clear(self.reference_gaps))
        moved = self.candidate_gaps - self.reference_gaps
        scatter = np.sqrt((moved**2).sum(axis=0))[unclear].sum() * math.sqrt(2 / math.pi)
        room = margin - float(scatter) / self.samples / math.sqrt(growth)
        return self._worst.power(room, alpha, growth) if room > 0 else 0.0

    @cached_property
    def _worst(self) -> PairedTotals:
        """Of which the lower bound is one of the difference of errors."""
        return self._mean(-self._excess(self.candidate_gaps, self.reference_gaps))

    @cached_property
    def _best(self) -> PairedTotals:
        """Of which the upper bound is."""
        return self._mean(self._excess(self.reference_gaps, self.candidate_gaps))

    def _error(self, gaps: Floats) -> float:
        return float(np.abs(gaps.sum(axis=0)).sum() / self.counts.sum())

    def _clear(self, gaps: Floats) -> NDArray[np.bool_]:
        clear: NDArray[np.bool_] = np.abs(gaps.sum(axis=0)) > _CLEAR * np.sqrt((gaps**2).sum(axis=0))
        return clear

    def _excess(self, more: Floats, less: Floats) -> Floats:
        """By unit, what adds up to no less than the sums of |more| - |less| do in truth. [units]."""
        of_more, of_less = np.sign(more.sum(axis=0)), np.sign(less.sum(axis=0))
        of_more = np.where(self._clear(more) | self._clear(less), of_more, np.sign((more - less).sum(axis=0)))
        of_less = np.where(self._clear(less), of_less, of_more)
        excess: Floats = more @ of_more - less @ of_less
        return excess

    def _mean(self, sums: Floats) -> PairedTotals:
        """The mean per item of what is summed by unit."""
        return PairedTotals(
            UnitTotals(self.counts[:, None], np.zeros((self.units, 1)), sums[:, None], self.resamples),
            lambda counts, totals: share(totals[..., 0], counts[..., 0]),
            self.samples,
            largest=1.0 / self.samples,
        )


def calibration_sample(
    confidences: tuple[Floats, Floats],
    right: tuple[NDArray[np.bool_], NDArray[np.bool_]],
    unit: Ints,
    resamples: int = RESAMPLES,
) -> PairedCalibration:
    """confidences, right: of the reference and of the candidate, [n] each, confidences in [0, 1]; unit: [n]."""

    def gaps(confidence: Floats, hit: NDArray[np.bool_]) -> Floats:
        bins = np.minimum((confidence * BINS).astype(np.int64), BINS - 1)
        cells = np.bincount(unit * BINS + bins, weights=confidence - hit, minlength=(int(unit.max()) + 1) * BINS)
        return np.asarray(cells, np.float64).reshape(-1, BINS)

    (reference, candidate) = (gaps(c, r) for c, r in zip(confidences, right, strict=True))
    return PairedCalibration(reference, candidate, per_unit(unit, np.ones((len(unit), 1)))[:, 0], resamples)


def _ece(name: str, m: Material) -> Sample:
    """Of token-classification over words, else over items. A word that has no token is outside, with confidence 1."""
    gold = m.known(name)
    chosen = decisions(name, m)
    if m.task == "token-classification":
        truth = np.concatenate([np.asarray(g) for g in gold])
        unit = renumbered(m.unit[words_of(m)])
    else:
        truth, unit = np.asarray(gold), m.unit
    first, second = (np.clip(np.nan_to_num(c, nan=1.0), 0.0, 1.0) for c in m.confidences(name))
    return calibration_sample((first, second), (chosen[0] == truth, chosen[1] == truth), unit)


METRICS: Mapping[str, Callable[[str, Material], Sample]] = {"ece": _ece}
