"""How often the non-inferiority test says "non-inferior" when it must not: simulated experiments, true drop = margin.

    python benchmarks/noninferiority_simulation.py --experiments 1000 --out benchmarks/results/noninferiority.md

Each row draws evaluation sets from a population in which the candidate's true drop equals the margin, and tests each.
A test at 95 % confidence may be wrong in 5 % of them. The percentile bootstrap of the same differences is beside it
for contrast. Power is the share of "non-inferior" when the drop is zero and the flips are as many, in both directions
(for the cosine: the same spread, shifted to a mean drop of zero;
for the mean AUROC and retrieval: without what is lost).
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import simulated_budgets

from medcompile.metrics.intervals import NORMAL, resampled_totals
from medcompile.metrics.intervals import RESAMPLES as REAL_RESAMPLES
from medcompile.metrics.judge import verdict
from medcompile.metrics.material import per_unit, renumbered
from medcompile.metrics.pairs import auroc_sample
from medcompile.metrics.samples import PairedFlips, PairedTotals, UnitTotals
from medcompile.metrics.tasks import COSINE_RESOLUTION
from medcompile.spec import Margin, Verdict

RESAMPLES = 1_000
CONFIDENCE = 0.95
Flips = Callable[[np.random.Generator, float], PairedFlips]
Totals = Callable[[np.random.Generator, float], PairedTotals]


@dataclass(frozen=True)
class Scenario:
    """draw(rng, drop) makes one evaluation set from a population whose true drop is that number."""

    name: str
    margin: float
    draw: Flips | Totals


def accuracy(margin: float, two_way: float = 0.0, documents: int = 500, clump: float = 0.0) -> Flips:
    """500 items; gains at the rate two_way, losses at two_way + drop. clump: correlation of losses in a document."""
    items = 500

    def draw(rng: np.random.Generator, drop: float) -> PairedFlips:
        unit = np.arange(items) * documents // items
        gain = two_way + (margin - drop) / 2
        loss = np.full(documents, gain + drop)
        if clump:
            spread = 1 / clump - 1
            loss = rng.beta(loss * spread, (1 - loss) * spread)
        flip = rng.random(items)
        losses = flip < loss[unit]
        gains = (flip >= loss[unit]) & (flip < loss[unit] + gain)
        right = losses | (~gains & (rng.random(items) < 0.9))
        return PairedFlips(right, (right & ~losses) | gains, unit)

    return draw


def agreement(margin: float, clump: float) -> Flips:
    """923 sentences of 25 words; words that disagree with the reference clump in sentences with that correlation."""
    sentences, words = 923, 25

    def draw(rng: np.random.Generator, drop: float) -> PairedFlips:
        unit = np.repeat(np.arange(sentences), words)
        spread = 1 / clump - 1
        rate = rng.beta(drop * spread, (1 - drop) * spread, sentences) if drop else np.zeros(sentences)
        same = rng.random(len(unit)) >= rate[unit]
        return PairedFlips(np.ones(len(unit), dtype=bool), same, unit, one_way=True)

    return draw


def entity_f1(margin: float, two_way: float = 0.0, documents: int = 0) -> Totals:
    """923 sentences with 0.85 entities each, reference F1 about .82; the candidate loses (and gains) whole entities.

    documents: the sentences come in that many, which differ in their entities and in how the candidate fares.
    """
    sentences, entities, found, spurious = 923, 0.853, 0.81, 0.16

    def right_at(drop: float) -> float:
        f1 = 2 * found / (1 + found + spurious) - drop
        return f1 * (1 + spurious) / (2 - f1)

    def draw(rng: np.random.Generator, drop: float) -> PairedTotals:
        gain = two_way + (right_at(drop) - right_at(margin)) / 2
        loss = gain + found - right_at(drop)
        unit = np.arange(sentences)
        richness, fate = np.ones(sentences), np.ones(sentences)
        if documents:
            unit = np.arange(sentences) * documents // sentences
            richness = rng.gamma(4, 1 / 4, documents)[unit]
            fate = rng.gamma(1, 1, documents)[unit]
        gold = rng.poisson(entities * richness)
        tp = rng.binomial(gold, found)
        fp = rng.poisson(entities * richness * spurious)
        change = rng.binomial(gold - tp, gain / (1 - found)) - rng.binomial(tp, np.minimum(loss / found * fate, 1.0))
        columns = [gold, tp + fp, tp, tp + fp + change, tp + change]
        rows = per_unit(unit, np.stack(columns, axis=1))
        totals = UnitTotals(rows[:, :1], rows[:, 1:3], rows[:, 3:], RESAMPLES)
        return PairedTotals(
            totals, lambda gold, m: 2 * m[..., 1] / (gold[..., 0] + m[..., 0]), sentences, float(rows[:, 0].sum())
        )

    return draw


def cosine(margin: float, spread: float, documents: int = 0) -> Totals:
    """500 texts whose 1 - cosine is lognormal with that log-spread (half of its variance by document, if any)."""
    texts = 500

    def draw(rng: np.random.Generator, drop: float) -> PairedTotals:
        unit, shared = np.arange(texts), 0.0
        log = np.zeros(texts)
        if documents:
            unit, shared = np.arange(texts) * documents // texts, 0.5
            log = rng.normal(0, spread * math.sqrt(shared), documents)[unit]
        log = log + rng.normal(0, spread * math.sqrt(1 - shared), texts)
        values = 1.0 - margin * np.exp(log - spread**2 / 2) + (margin - drop)
        count, sums = (per_unit(unit, w[:, None]) for w in (np.ones(texts), values))
        totals = UnitTotals(count, count, sums, RESAMPLES)
        return PairedTotals(totals, lambda count, m: m[..., 0] / count[..., 0], texts, resolution=COSINE_RESOLUTION)

    return draw


def of_one_class(margin: float, two_way: float) -> Flips:
    """accuracy[label] of a class that 30 % of 500 items have; gains at the rate two_way, losses at two_way + drop."""
    everyone = accuracy(margin, two_way)

    def draw(rng: np.random.Generator, drop: float) -> PairedFlips:
        drawn, of = everyone(rng, drop), rng.random(500) < 0.3
        return PairedFlips(drawn.reference_right[of], drawn.candidate_right[of], renumbered(drawn.unit[of]))

    return draw


def retrieval(margin: float, k: int, documents: int = 500) -> Flips:
    """recall@k of 500 pairs whose partner's rank is geometric. The candidate ranks one in ten anew, and loses some.

    documents: the pairs come in that many; half of the losses are lost by a whole document.
    """
    pairs, stays = 500, 0.6

    def draw(rng: np.random.Generator, drop: float) -> PairedFlips:
        unit = np.arange(pairs) * documents // pairs
        rank = rng.geometric(stays, pairs) - 1
        again = np.where(rng.random(pairs) < 0.1, rng.geometric(stays, pairs) - 1, rank)
        fate = np.where(rng.random(pairs) < 0.5, rng.random(documents)[unit], rng.random(pairs))
        lost = fate < drop / (1 - (1 - stays) ** k)
        return PairedFlips(rank < k, np.where(lost, pairs, again) < k, unit)

    return draw


def auroc(margin: float, jitter: float = 0.0, fall: bool = False, items: int = 500, documents: int = 0) -> Totals:
    """Plain AUROC of .92, 30 % positive. jitter: noise of the candidate's scores, of which the reference's spread is 1.

    fall: the drop is made by positives that fall below everything, and (half as many at zero drop) by others that rise
    above it; else by jitter that blurs a smaller difference of the classes. documents: the items come in that many,
    which share half of the jitter's variance, and fall as a whole.
    """
    area = 0.92

    def apart(wanted: float, variance: float) -> float:
        return NORMAL.inv_cdf(wanted) * math.sqrt(2 * variance)

    def draw(rng: np.random.Generator, drop: float) -> PairedTotals:
        units = documents or items
        unit = np.arange(items) * units // items
        mine = rng.random(items) < 0.3
        common = rng.normal(size=items)
        noise = math.sqrt(0.5) * (rng.normal(size=units)[unit] + rng.normal(size=items))
        reference = common + apart(area, 1) * mine
        kept = area if fall else area - drop
        candidate = common + jitter * noise + apart(kept, 1 + jitter**2) * mine
        if fall:
            fate = rng.random(units)[unit]
            candidate = np.where(mine & (fate < (margin + drop) / 2 / area), -50.0, candidate)
            candidate = np.where(mine & (fate > 1 - (margin - drop) / 2 / (1 - area)), 50.0, candidate)
        reference, candidate = (np.stack([-s, s], axis=1) for s in (reference, candidate))
        return auroc_sample(reference, candidate, mine.astype(int), np.array([0, 1]), unit, RESAMPLES)

    return draw


def macro_auroc(margin: float, jitter: float) -> Totals:
    """Mean AUROC of six classes, 900 items, with jitter; the drop is made by items that are ranked wrong everywhere."""
    items, classes, area = 900, 6, 0.92

    def draw(rng: np.random.Generator, drop: float) -> PairedTotals:
        gold = rng.integers(0, classes, items)
        mine = np.eye(classes, dtype=bool)[gold]
        step = NORMAL.inv_cdf(area) * math.sqrt(2)
        reference = rng.normal(size=(items, classes)) + step * mine
        noise = jitter * rng.normal(size=(items, classes))
        candidate = reference + noise + step * (math.sqrt(1 + jitter**2) - 1) * mine
        lost = rng.random(items) < 1 - math.sqrt(1 - drop / area)
        candidate[lost] = np.where(mine[lost], -50.0, 50.0)
        return auroc_sample(reference, candidate, gold, np.arange(classes), np.arange(items), RESAMPLES)

    return draw


def scenarios() -> list[Scenario]:
    flips = [("one-way flips", 0.0, m) for m in (0.001, 0.005, 0.006, 0.01, 0.02)]
    flips += [("two-way flips (1 % gains)", 0.01, m) for m in (0.005, 0.01, 0.02)]
    rows = [Scenario(f"accuracy, n 500, {name}", m, accuracy(m, two_way)) for name, two_way, m in flips]
    for m in (0.01, 0.02):
        rows.append(Scenario("accuracy, 100 documents of 5", m, accuracy(m, 0.01, documents=100, clump=0.3)))
        rows.append(Scenario("word agreement, 923 sentences", m, agreement(m, 0.1)))
        rows.append(Scenario("F1, 923 sentences, losses only", m, entity_f1(m)))
        rows.append(Scenario("F1, 923 sentences, losses and gains", m, entity_f1(m, 0.01)))
        rows.append(Scenario("F1, 923 sentences in 100 documents", m, entity_f1(m, 0.01, documents=100)))
    rows.append(Scenario("cosine, 500 texts, log-spread 0.5", 0.005, cosine(0.005, 0.5)))
    rows.append(Scenario("cosine, 500 texts, log-spread 1.0", 0.005, cosine(0.005, 1.0)))
    rows.append(Scenario("cosine, 500 texts in 100 documents", 0.005, cosine(0.005, 0.7, documents=100)))
    for m in (0.02, 0.05):
        rows.append(Scenario("accuracy of a class, 30 % of 500", m, of_one_class(m, 0.0)))
        rows.append(Scenario("accuracy of a class, 30 % of 500, 1 % gains", m, of_one_class(m, 0.01)))
    for m in (0.02, 0.04):
        rows.append(Scenario("recall@1, 500 pairs", m, retrieval(m, 1)))
        rows.append(Scenario("recall@5, 500 pairs", m, retrieval(m, 5)))
        rows.append(Scenario("recall@5, 500 pairs in 100 documents", m, retrieval(m, 5, 100)))
    for m in (0.01, 0.03):
        rows.append(Scenario("AUROC, 150 of 500 positive, jitter", m, auroc(m, 0.3)))
        rows.append(Scenario("AUROC, 150 of 500 positive, falls", m, auroc(m, fall=True)))
        rows.append(Scenario("AUROC, 150 of 500 positive, falls and jitter", m, auroc(m, 0.1, fall=True)))
    for m in (0.03, 0.06):
        rows.append(Scenario("AUROC, 500 in 100 documents, jitter", m, auroc(m, 0.3, documents=100)))
        rows.append(Scenario("AUROC, 500 in 100 documents, falls and jitter", m, auroc(m, 0.1, True, documents=100)))
    rows.append(Scenario("AUROC, 600 of 2000 positive, jitter", 0.01, auroc(0.01, 0.3, items=2000)))
    rows.append(Scenario("AUROC, 600 of 2000 positive, falls and jitter", 0.01, auroc(0.01, 0.1, True, 2000)))
    rows.append(Scenario("AUROC, 12 of 40 positive, jitter", 0.1, auroc(0.1, 0.5, items=40)))
    rows.append(Scenario("AUROC, 12 of 40 positive, falls and jitter", 0.1, auroc(0.1, 0.1, True, 40)))
    rows += [Scenario("macro AUROC, 6 classes, 900 items, falls", m, macro_auroc(m, 0.1)) for m in (0.01, 0.02)]
    return rows


def percentile_says_non_inferior(sample: PairedFlips | PairedTotals, margin: float) -> bool:
    """The verdict of a percentile bootstrap by unit, for contrast."""
    if isinstance(sample, PairedFlips):
        flips = sample.candidate_right.astype(np.float64) - sample.reference_right
        rows = per_unit(sample.unit, np.stack([flips, np.ones(len(flips))], axis=1))
        totals = resampled_totals(rows, RESAMPLES)
        differences = totals[:, 0] / totals[:, 1]
    else:
        parts = (sample.totals.common, sample.totals.reference)
        totals, ends = resampled_totals(sample.totals.rows, RESAMPLES), np.cumsum([p.shape[1] for p in parts])
        common, reference, candidate = np.split(totals, ends, axis=1)
        differences = sample.score(common, candidate) - sample.score(common, reference)
    return bool(np.quantile(differences, 1 - CONFIDENCE) > -margin)


def run(scenario: Scenario, experiments: int, seed: int) -> str:
    """One row of the table."""
    rng = np.random.default_rng(seed)
    margin = Margin("simulated", scenario.margin, CONFIDENCE)

    def non_inferior(sample: PairedFlips | PairedTotals) -> bool:
        return verdict(sample, margin)[0] is Verdict.NON_INFERIOR

    false = percentile_false = power = 0
    for _ in range(experiments):
        sample = scenario.draw(rng, scenario.margin)
        false += non_inferior(sample)
        percentile_false += percentile_says_non_inferior(sample, scenario.margin)
        power += non_inferior(scenario.draw(rng, 0.0))
    rates = [count / experiments for count in (false, percentile_false, power)]
    shown = [f"{100 * r:.1f} ± {100 * math.sqrt(r * (1 - r) / experiments):.1f}" for r in rates]
    return f"| {scenario.name} | {scenario.margin:g} | {' | '.join(shown)} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--experiments", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", default="", help="run the rows whose name holds this")
    parser.add_argument("--out", type=Path, help="write the table to this file too")
    options = parser.parse_args()

    limit = 5 + 200 * math.sqrt(0.05 * 0.95 / options.experiments)
    lines = [
        "# The non-inferiority test, simulated",
        "",
        f"{options.experiments} simulated experiments a row, seed {options.seed}, {CONFIDENCE:.0%} confidence. The true"
        " drop equals the margin, so",
        f'"non-inferior" is false; at most 5 % (with sampling error: {limit:.1f} %) may say it. Per cent, with one'
        " standard error.",
        f"The bootstraps of these rows use {RESAMPLES:,} resamples, {REAL_RESAMPLES:,} outside of simulations. Power:"
        " the true drop is zero, the noise the same.",
        "A margin below one event (0.001 of 500) is never judged. Agreement with the reference at zero drop has no"
        " flips at all.",
        "",
        "| data | margin | false non-inferior | percentile bootstrap's | power |",
        "|---|---|---|---|---|",
    ]
    print("\n".join(lines))
    for scenario in scenarios():
        if options.only in scenario.name:
            lines.append(run(scenario, options.experiments, options.seed))
            print(lines[-1], flush=True)
    head = [
        "",
        "## Budgets: several margins, subgroups, costs, flips, calibration",
        "",
        "Of a family, false is an experiment in which any margin that is lost is called non-inferior, and power the"
        " share in which all are, nothing being lost. The contrast is what the naive way says: each margin tested by"
        " itself (Holm), the same margin on all items (worst subgroup), else a percentile bootstrap of the plain"
        f" difference. The bootstraps of costs use {REAL_RESAMPLES:,} resamples.",
        "",
        "| data | margin | false non-inferior | contrast | power |",
        "|---|---|---|---|---|",
    ]
    lines += head
    print("\n".join(head))
    for row in simulated_budgets.rows():
        if options.only in row.name:
            lines.append(simulated_budgets.run(row, options.experiments, options.seed))
            print(lines[-1], flush=True)
    if options.out:
        options.out.write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
