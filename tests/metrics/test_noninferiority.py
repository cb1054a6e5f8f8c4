"""Seeded small simulations of the whole test; benchmarks/noninferiority_simulation.py runs the full ones."""

from __future__ import annotations

import math

import numpy as np
import pytest

from medcompile.metrics.judge import samples_for_power, verdict
from medcompile.metrics.samples import LowestValue, PairedFlips, PairedTotals, UnitTotals
from medcompile.spec import Margin, Verdict

EXPERIMENTS = 300
MOST_FALSE = 0.05 + 3 * math.sqrt(0.05 * 0.95 / EXPERIMENTS)


def says_non_inferior(sample: PairedFlips | PairedTotals, margin: float) -> bool:
    return verdict(sample, Margin("m", margin))[0] is Verdict.NON_INFERIOR


def flips(rng: np.random.Generator, loss: float, gain: float, unit: np.ndarray) -> PairedFlips:
    drawn = rng.random(int(unit.max()) + 1)[unit]  # the items of a unit flip together
    lost, gained = drawn < loss, drawn > 1 - gain
    right = lost | (~gained & (rng.random(len(unit)) < 0.9))
    return PairedFlips(right, (right & ~lost) | gained, unit)


def entity_counts(rng: np.random.Generator, loss: float, units: int = 300) -> PairedTotals:
    """Recall of entities that the candidate loses at that rate; recall of the reference is 1."""
    gold = rng.poisson(2.0, units).astype(np.float64)
    lost = rng.binomial(gold.astype(int), loss)
    totals = UnitTotals(gold[:, None], gold[:, None], (gold - lost)[:, None], resamples=1_000)
    return PairedTotals(totals, lambda g, m: m[..., 0] / np.maximum(g[..., 0], 1), units, float(gold.sum()))


@pytest.mark.parametrize(("margin", "gain"), [(0.006, 0.0), (0.01, 0.0), (0.02, 0.0), (0.01, 0.02), (0.02, 0.02)])
def test_accuracy_is_falsely_non_inferior_in_at_most_five_per_cent(margin: float, gain: float) -> None:
    rng = np.random.default_rng(11)
    unit = np.arange(500)
    false = sum(says_non_inferior(flips(rng, margin + gain, gain, unit), margin) for _ in range(EXPERIMENTS))
    assert false / EXPERIMENTS <= MOST_FALSE


def test_accuracy_of_documents_that_flip_as_a_whole_is_rarely_falsely_non_inferior() -> None:
    rng = np.random.default_rng(12)
    unit = np.repeat(np.arange(300), 4)
    false = sum(says_non_inferior(flips(rng, 0.04, 0.01, unit), 0.03) for _ in range(EXPERIMENTS))
    assert false / EXPERIMENTS <= MOST_FALSE


@pytest.mark.parametrize("margin", [0.005, 0.01, 0.05])
def test_entity_recall_is_falsely_non_inferior_in_at_most_five_per_cent(margin: float) -> None:
    rng = np.random.default_rng(13)
    false = sum(says_non_inferior(entity_counts(rng, margin), margin) for _ in range(EXPERIMENTS))
    assert false / EXPERIMENTS <= MOST_FALSE


def test_stated_power_is_the_rate_of_non_inferior_at_zero_drop() -> None:
    rng = np.random.default_rng(14)
    unit = np.arange(1_000)
    drawn = [flips(rng, 0.01, 0.01, unit) for _ in range(EXPERIMENTS)]
    stated = float(np.mean([s.power(0.01, 0.05) for s in drawn]))
    reached = sum(says_non_inferior(s, 0.01) for s in drawn) / EXPERIMENTS
    assert stated == pytest.approx(reached, abs=0.1)


def test_samples_for_power_gives_that_power_and_shrinks_with_the_margin() -> None:
    rng = np.random.default_rng(15)
    for sample in (flips(rng, 0.01, 0.01, np.arange(1_000)), entity_counts(rng, 0.05), entity_counts(rng, 0.005)):
        needed = [samples_for_power(sample, margin, 0.05) for margin in (0.005, 0.01, 0.02)]
        assert None not in needed
        assert needed == sorted(needed, reverse=True)
        assert needed[0] > needed[2]
    needed_at = samples_for_power(flips(rng, 0.01, 0.01, np.arange(1_000)), 0.01, 0.05)
    assert needed_at is not None
    unit = np.arange(needed_at)
    reached = sum(says_non_inferior(flips(rng, 0.01, 0.01, unit), 0.01) for _ in range(EXPERIMENTS)) / EXPERIMENTS
    assert reached == pytest.approx(0.8, abs=0.12)


def test_units_that_flip_as_a_whole_have_their_size_as_design_effect() -> None:
    rng = np.random.default_rng(16)
    whole = flips(rng, 0.2, 0.1, np.repeat(np.arange(400), 5))
    apart = flips(rng, 0.2, 0.1, np.arange(2_000))
    apart = PairedFlips(apart.reference_right, apart.candidate_right, np.repeat(np.arange(400), 5))
    assert whole.design_effect == pytest.approx(4.0, abs=1.2)
    assert 1.0 <= apart.design_effect < 1.3


def test_the_note_of_a_worst_value_holds_for_values_not_seen() -> None:
    rng = np.random.default_rng(17)
    kept = 0
    for _ in range(2_000):
        sample = LowestValue(rng.random(100), 100)  # uniform: the share of values below x is x
        told = sample.unseen(0.9, "text")
        kept += sample.value <= 1 - 0.1 ** (1 / 100)
    assert told == "with 90 % confidence, at most 2.3 % of such texts are worse"
    assert kept / 2_000 == pytest.approx(0.9, abs=0.02)
