"""Populations for noninferiority_simulation.py: several margins at once, worst subgroups, costs, flips, calibration.

draw(rng, lost) makes one experiment: the budget of one graph, as (sample, margin). lost: the true drop of the metrics
in `guilty` equals their margin; else nothing is lost, and the noise is the same.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from medcompile.metrics.calibration import PairedCalibration, calibration_sample
from medcompile.metrics.decisions import METRICS
from medcompile.metrics.intervals import NORMAL, resampled_totals
from medcompile.metrics.judge import ALONE, holm, verdict
from medcompile.metrics.material import Material, Predictions, per_unit, renumbered
from medcompile.metrics.samples import FlippedShare, PairedCost, PairedFlips, PairedTotals, Sample
from medcompile.metrics.subgroups import Subgroups
from medcompile.spec import Margin, Verdict

RESAMPLES = 1_000
CONFIDENCE = 0.95
Floats = NDArray[np.float64]
Budget = list[tuple[Sample | Subgroups, Margin]]
Draw = Callable[[np.random.Generator, bool], Budget]


@dataclass(frozen=True)
class Simulated:
    """One row. contrast: whether the naive way says non-inferior. guilty: which margins are lost; None: all."""

    name: str
    margin: float
    draw: Draw
    contrast: Callable[[Budget], bool]
    guilty: tuple[int, ...] | None = None

    def passed(self, budget: Budget) -> list[bool]:
        steps = holm(budget) if len(budget) > 1 else [ALONE]
        found = [verdict(s, m, step)[0] is Verdict.NON_INFERIOR for (s, m), step in zip(budget, steps, strict=True)]
        return [found[i] for i in self.guilty or range(len(found))]


def alone(sample: Sample | Subgroups, margin: Margin) -> bool:
    return verdict(sample, margin)[0] is Verdict.NON_INFERIOR


def together(loss: Floats, gain: float, correlation: float, items: int, rng: np.random.Generator) -> list[PairedFlips]:
    """Accuracies whose losses, at those rates, and gains come together: by a Gaussian copula over the items."""
    common = rng.normal(size=items)
    found = []
    for rate in loss:
        latent = math.sqrt(correlation) * common + math.sqrt(1 - correlation) * rng.normal(size=items)
        losses, gains = latent < NORMAL.inv_cdf(max(rate, 1e-12)), latent > -NORMAL.inv_cdf(max(gain, 1e-12))
        right = losses | (~gains & (rng.random(items) < 0.9))
        found.append(PairedFlips(right, (right & ~losses) | gains, np.arange(items)))
    return found


def family(size: int, margin: float, correlation: float, guilty: int, items: int = 800, gain: float = 0.005) -> Draw:
    """That many accuracies; the first `guilty` of them lose their margin."""

    def draw(rng: np.random.Generator, lost: bool) -> Budget:
        loss = gain + np.where(np.arange(size) < guilty, margin * lost, 0.0)
        samples = together(loss, gain, correlation, items, rng)
        return [(s, Margin(f"m{i}", margin, CONFIDENCE)) for i, s in enumerate(samples)]

    return draw


def same_items(margin: float, gain: float = 0.005, items: int = 1_000) -> Draw:
    """Accuracy, harmful flips and cost (each mistake costs 2) of one model: each at its own margin when one is."""

    def draw(rng: np.random.Generator, lost: bool) -> Budget:
        (s,) = together(np.array([gain + margin * lost]), gain, 0.0, items, rng)
        harmful = FlippedShare(np.ones(items, bool), ~s.reference_right | s.candidate_right, s.unit)
        costs = {"0": {"1": 2.0, "2": 2.0}}
        reference, candidate = (np.where(right, 0, 1) for right in (s.reference_right, s.candidate_right))
        cost = class_cost(np.zeros(items, np.int64), reference, candidate, s.unit, costs)
        margins = (margin, margin + gain, 2 * margin)
        named = zip((s, harmful, cost), ("accuracy", "harmful_flips", "cost"), margins, strict=True)
        return [(sample, Margin(name, m, CONFIDENCE)) for sample, name, m in named]

    return draw


def groups(margin: float, sizes: Sequence[int], gain: float = 0.005) -> Draw:
    """Accuracy in groups of those sizes; the first one loses the margin."""

    def draw(rng: np.random.Generator, lost: bool) -> Budget:
        loss = [gain + margin * lost, *[gain] * (len(sizes) - 1)]
        samples = {
            f"g{i}": together(np.array([rate]), gain, 0.0, n, rng)[0]
            for i, (rate, n) in enumerate(zip(loss, sizes, strict=True))
        }
        return [(Subgroups("site", samples, {}), Margin("accuracy[worst:site]", margin, CONFIDENCE))]

    return draw


def on_all_items(budget: Budget) -> bool:
    """The same margin, asked of all items together."""
    ((sample, margin),) = budget
    assert isinstance(sample, Subgroups)
    parts = [s for s in sample.samples.values() if isinstance(s, PairedFlips)]
    right = [np.concatenate([getattr(s, side) for s in parts]) for side in ("reference_right", "candidate_right")]
    return alone(PairedFlips(*right, np.arange(len(right[0]))), margin)


def class_cost(
    gold: NDArray[np.int64],
    reference: NDArray[np.int64],
    candidate: NDArray[np.int64],
    unit: NDArray[np.int64],
    costs: Mapping[str, Mapping[str, float]],
) -> Sample:
    asked = Predictions(reference), Predictions(candidate)
    return METRICS["cost"]("cost", Material("sequence-classification", *asked, gold, unit, ("0", "1", "2"), {}, costs))


def cost(margin: float, dear_share: float, gain: float = 0.0, documents: int = 0, items: int = 1_000) -> Draw:
    """Half of the items are ill; to call one healthy costs 10, the other way round 1. The rise is made of both, dear
    mistakes giving that share of it. gain: of the rise when there is none, as much is gained as is lost (else half of
    the margin is). documents: the items come in that many, which lose in clumps."""

    def draw(rng: np.random.Generator, lost: bool) -> Budget:
        unit = np.arange(items) * (documents or items) // items
        gold = rng.integers(0, 2, items)
        more = margin * np.where(gold == 1, dear_share / 10, 1 - dear_share) * 2  # of each half of the items
        down, up = (more + gain, gain) if lost else (more / 2 + gain, more / 2 + gain)
        fate = rng.random(items)
        if documents:  # half of the items share their document's fate
            fate = np.where(rng.random(items) < 0.5, rng.random(documents)[unit], fate)
        losses, gains = fate < down, fate > 1 - up
        right = losses | (~gains & (rng.random(items) < 0.9))
        reference = np.where(right, gold, 1 - gold)
        candidate = np.where((right & ~losses) | gains, gold, 1 - gold)
        sample = class_cost(gold, reference, candidate, renumbered(unit), {"1": {"0": 10.0}})
        return [(sample, Margin("cost", margin, CONFIDENCE))]

    return draw


def entity_cost(margin: float, dear_share: float) -> Draw:
    """923 sentences of 12 words, 0.85 entities each; a missed one costs 10, a false alarm 1. The rise is made of both;
    at no rise as many are found and as many alarms silenced."""
    sentences, rate, alarms = 923, 0.853, 0.16

    def draw(rng: np.random.Generator, lost: bool) -> Budget:
        gold = rng.random((sentences, 6)) < rate / 6  # one-word entities at every second word
        before = gold & (rng.random(gold.shape) < 0.8)
        false = ~gold & (rng.random(gold.shape) < alarms * rate / 6)
        missed, alarm = margin * dear_share / 10, margin * (1 - dear_share)  # per entity
        down, up = (missed, 0.0) if lost else (missed / 2, missed / 2)
        after = (before & (rng.random(gold.shape) >= down / 0.8)) | (
            gold & ~before & (rng.random(gold.shape) < up / 0.2)
        )
        come, go = (alarm, 0.0) if lost else (alarm / 2, alarm / 2)
        empty = (1 - rate / 6) * (1 - alarms * rate / 6) / (rate / 6)  # empty places per entity
        alarmed = (false & (rng.random(gold.shape) >= go / (alarms * (1 - rate / 6)))) | (
            ~gold & ~false & (rng.random(gold.shape) < come / empty)
        )

        def tagged(entities: NDArray[np.bool_]) -> list[NDArray[np.int64]]:
            words = np.zeros((sentences, 12), np.int64)
            words[:, ::2] = entities
            return list(words)

        asked = Predictions(tagged(before | false)), Predictions(tagged(after | alarmed))
        costs = {"missed": 10.0, "false_alarm": 1.0}
        material = Material(
            "token-classification", *asked, tagged(gold), np.arange(sentences), ("O", "B-Disease"), {}, costs
        )
        return [(METRICS["cost"]("cost", material), Margin("cost", margin, CONFIDENCE))]

    return draw


def harmful(margin: float, items: int = 500, documents: int = 0, clump: float = 0.3) -> Draw:
    """documents: the items come in that many, in which harmful flips are correlated so much."""

    def draw(rng: np.random.Generator, lost: bool) -> Budget:
        unit = np.arange(items) * (documents or items) // items
        rate = np.full(documents or items, margin if lost else 0.0)
        if documents and lost:
            spread = 1 / clump - 1
            rate = rng.beta(margin * spread, (1 - margin) * spread, documents)
        unharmed = rng.random(items) >= rate[unit]
        return [(FlippedShare(np.ones(items, bool), unharmed, unit), Margin("harmful_flips", margin, CONFIDENCE))]

    return draw


class LowerBound(PairedCalibration):
    """The lower bound alone decides here; the upper one would take as long again."""

    @property
    def _best(self) -> PairedTotals:  # type: ignore[override]
        return self._worst


def calibration(margin: float, items: int, before: float, noise: float, sentences: int = 0, sharp: float = 1.0) -> Draw:
    """Two models that are right as often as they know, and say `before` more; the candidate knows another amount, by
    that noise, and says the margin more than that. sharp: above 1, most items are sure. sentences: that many units."""

    def draw(rng: np.random.Generator, lost: bool) -> Budget:
        unit = np.arange(items) * (sentences or items) // items
        top = 1.0 - before - margin
        known = 0.4 + (top - 0.4) * rng.random(items) ** (1 / sharp)
        other = known + noise * rng.normal(size=items) * (top - known) * (known - 0.4) * 10
        other = np.clip(other, 0.4, top)
        fate = rng.random(items)
        if sentences:  # the words of a sentence share a third of their luck
            fate = np.where(rng.random(items) < 1 / 3, rng.random(sentences)[unit], fate)
        said = (known + before, other + before + margin * lost)
        made = calibration_sample(said, (fate < known, fate < other), unit, RESAMPLES)
        sample = LowerBound(made.reference_gaps, made.candidate_gaps, made.counts, RESAMPLES)
        return [(sample, Margin("ece", margin, CONFIDENCE))]

    return draw


def percentile(budget: Budget) -> bool:
    """A percentile bootstrap by unit of the plain difference."""
    ((sample, margin),) = budget
    if isinstance(sample, PairedCalibration):
        rows = np.column_stack([sample.reference_gaps, sample.candidate_gaps, sample.counts])
        totals = np.abs(resampled_totals(rows, RESAMPLES))
        bins = sample.reference_gaps.shape[1]
        differences = (totals[:, :bins].sum(axis=1) - totals[:, bins:-1].sum(axis=1)) / totals[:, -1]
    elif isinstance(sample, PairedFlips):
        flips = sample.candidate_right.astype(np.float64) - sample.reference_right
        totals = resampled_totals(per_unit(sample.unit, np.stack([flips, np.ones(len(flips))], axis=1)), RESAMPLES)
        differences = totals[:, 0] / totals[:, 1]
    else:
        assert isinstance(sample, PairedTotals)
        parts = (sample.totals.common, sample.totals.reference)
        totals, ends = resampled_totals(sample.totals.rows, RESAMPLES), np.cumsum([p.shape[1] for p in parts])
        common, reference, candidate = np.split(totals, ends, axis=1)
        differences = sample.score(common, candidate) - sample.score(common, reference)
        differences = -differences if isinstance(sample, PairedCost) else differences
    return bool(np.quantile(differences, 1 - CONFIDENCE) > -margin.max_drop)


def uncorrected(budget: Budget) -> bool:
    """Any of them, each tested by itself."""
    return any(alone(*each) for each in budget)


def rows() -> list[Simulated]:
    found = []
    for size, correlation in ((2, 0.0), (2, 0.5), (3, 0.0), (3, 0.5), (3, 0.9)):
        name = f"Holm: {size} accuracies, n 800, correlation {correlation:g}"
        found.append(Simulated(name, 0.02, family(size, 0.02, correlation, size), uncorrected))
    for guilty in (1, 2):
        draw = family(3, 0.03, 0.5, guilty, items=1_500)
        name = f"Holm: 3 accuracies, n 1500, correlation 0.5, {guilty} lost"
        first = tuple(range(guilty))
        found.append(Simulated(name, 0.03, draw, lambda b, k=guilty: uncorrected(b[:k]), first))  # type: ignore[misc]
    several = "Holm: accuracy, harmful flips, cost, n 1000"
    found += [Simulated(several, m, same_items(m), uncorrected) for m in (0.01, 0.02)]
    for m, sizes in ((0.05, (400, 400, 400)), (0.05, (200, 800, 800)), (0.03, (600, 900, 1_500, 3_000))):
        name = f"worst subgroup, groups of {', '.join(map(str, sizes))}"
        found.append(Simulated(name, m, groups(m, sizes), on_all_items))
    for m in (0.05, 0.1):
        found.append(Simulated("cost 10 : 1, n 1000, dear mistakes alone", m, cost(m, 1.0), percentile))
        found.append(Simulated("cost 10 : 1, n 1000, half of it dear", m, cost(m, 0.5), percentile))
        found.append(Simulated("cost 10 : 1, n 1000, a fifth dear, 0.5 % gains", m, cost(m, 0.2, 0.005), percentile))
        clumped = cost(m, 0.5, documents=200)
        found.append(Simulated("cost 10 : 1, 200 documents of 5, half of it dear", m, clumped, percentile))
    entities = "cost 10 : 1, entities of 923 sentences, half of it dear"
    found += [Simulated(entities, m, entity_cost(m, 0.5), percentile) for m in (0.1, 0.2)]
    found += [Simulated("harmful flips, n 500", m, harmful(m), percentile) for m in (0.01, 0.02)]
    found += [
        Simulated("harmful flips, 100 documents of 5", m, harmful(m, documents=100), percentile) for m in (0.01, 0.03)
    ]
    for before in (0.0, 0.05):
        said = f"{before:g} overconfident"
        found.append(Simulated(f"ece, n 1000, {said}", 0.03, calibration(0.03, 1_000, before, 0.02), percentile))
        sure = calibration(0.02, 1_000, before, 0.02, sharp=6)
        found.append(Simulated(f"ece, n 1000, {said}, mostly sure", 0.02, sure, percentile))
        words = calibration(0.01, 23_000, before, 0.05, sentences=923, sharp=6)
        found.append(Simulated(f"ece, 23000 words in 923 sentences, {said}", 0.01, words, percentile))
    return found


def run(row: Simulated, experiments: int, seed: int) -> str:
    """One row of the table: false non-inferior (of any margin that is lost), the contrast's, and power (of all)."""
    rng = np.random.default_rng(seed)
    false = contrast = power = 0
    for _ in range(experiments):
        budget = row.draw(rng, True)
        false += any(row.passed(budget))
        contrast += row.contrast(budget)
        power += all(replace(row, guilty=None).passed(row.draw(rng, False)))
    rates = [count / experiments for count in (false, contrast, power)]
    shown = [f"{100 * r:.1f} ± {100 * math.sqrt(r * (1 - r) / experiments):.1f}" for r in rates]
    return f"| {row.name} | {row.margin:g} | {' | '.join(shown)} |"
