"""How often the non-inferiority test says "non-inferior" when it must not: simulated experiments, true drop = margin.

    python benchmarks/noninferiority_simulation.py --experiments 1000 --out benchmarks/results/noninferiority.md

Each row draws evaluation sets from a population in which the candidate's true drop equals the margin, and tests each.
A test at 95 % confidence may be wrong in 5 % of them. The percentile bootstrap of the same differences is beside it
for contrast. Power is the share of "non-inferior" when the drop is zero and the flips are as many, in both directions
(for the cosine: the same spread, shifted to a mean drop of zero).
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from medcompile.metrics.intervals import RESAMPLES as REAL_RESAMPLES
from medcompile.metrics.intervals import resampled_totals
from medcompile.metrics.judge import verdict
from medcompile.metrics.material import per_unit
from medcompile.metrics.samples import PairedFlips, PairedTotals, UnitTotals
from medcompile.metrics.tasks import COSINE_RESOLUTION
from medcompile.spec import Margin, Verdict

RESAMPLES = 1_000
CONFIDENCE = 0.95
Draw = Callable[[np.random.Generator, float], PairedFlips | PairedTotals]


@dataclass(frozen=True)
class Scenario:
    """draw(rng, drop) makes one evaluation set from a population whose true drop is that number."""

    name: str
    margin: float
    draw: Draw


def accuracy(margin: float, two_way: float = 0.0, documents: int = 500, clump: float = 0.0) -> Draw:
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


def agreement(margin: float, clump: float) -> Draw:
    """923 sentences of 25 words; words that disagree with the reference clump in sentences with that correlation."""
    sentences, words = 923, 25

    def draw(rng: np.random.Generator, drop: float) -> PairedFlips:
        unit = np.repeat(np.arange(sentences), words)
        spread = 1 / clump - 1
        rate = rng.beta(drop * spread, (1 - drop) * spread, sentences) if drop else np.zeros(sentences)
        same = rng.random(len(unit)) >= rate[unit]
        return PairedFlips(np.ones(len(unit), dtype=bool), same, unit, one_way=True)

    return draw


def entity_f1(margin: float, two_way: float = 0.0, documents: int = 0) -> Draw:
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


def cosine(margin: float, spread: float, documents: int = 0) -> Draw:
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
    return rows


def percentile_says_non_inferior(sample: PairedFlips | PairedTotals, margin: float) -> bool:
    """The verdict of a percentile bootstrap by unit, for contrast."""
    if isinstance(sample, PairedFlips):
        flips = sample.candidate_right.astype(np.float64) - sample.reference_right
        rows = per_unit(sample.unit, np.stack([flips, np.ones(len(flips))], axis=1))
        totals = resampled_totals(rows, RESAMPLES)
        differences = totals[:, 0] / totals[:, 1]
    else:
        totals, width = resampled_totals(sample.totals.rows, RESAMPLES), sample.totals.reference.shape[1]
        differences = sample.score(totals[:, :1], totals[:, 1 + width :]) - sample.score(
            totals[:, :1], totals[:, 1 : 1 + width]
        )
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
    if options.out:
        options.out.write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
