"""P-values, and Holm's procedure over the margins of one graph."""

from __future__ import annotations

import numpy as np
import pytest

from medcompile.metrics import Predictions, evaluate
from medcompile.metrics.judge import holds, holm, p_value, verdict
from medcompile.metrics.samples import PairedFlips, PairedTotals, Sample, UnitTotals
from medcompile.spec import Margin, Verdict


def flips(losses: int, gains: int = 0, n: int = 1_000, one_way: bool = False) -> PairedFlips:
    right = np.ones(n, dtype=bool)
    right[n - gains :] = False
    candidate = np.ones(n, dtype=bool)
    candidate[:losses] = False
    return PairedFlips(right, candidate, np.arange(n), one_way)


def means(shift: float, n: int = 400) -> PairedTotals:
    values = 0.9 + np.random.default_rng(3).normal(0, 0.1, n)
    count = np.ones((n, 1))
    totals = UnitTotals(count, np.full((n, 1), 0.9), (values - values.mean() + 0.9 - shift)[:, None])
    return PairedTotals(totals, lambda c, m: m[..., 0] / c[..., 0], n, resolution=1e-6)


SAMPLES: list[Sample] = [flips(0), flips(3), flips(12, 9), flips(40), flips(8, one_way=True), means(0.0), means(0.008)]


@pytest.mark.parametrize("sample", SAMPLES)
@pytest.mark.parametrize("margin", [0.004, 0.01, 0.03])
def test_the_p_value_is_the_level_at_which_the_bound_reaches_the_margin(sample: Sample, margin: float) -> None:
    asked = Margin("m", margin)
    p = p_value(sample, asked)
    assert 0.0 < p <= 1.0
    for level in (0.001, 0.01, 0.05, 0.2, 0.4):
        assert holds(sample, asked, level) == (p <= level)
    bounds = [sample.difference - sample.widths(a)[0] for a in (1e-6, 1e-3, 0.01, 0.05, 0.2, 0.5)]
    assert bounds == sorted(bounds)


def test_the_p_value_of_no_flip_at_all_is_the_chance_of_seeing_none() -> None:
    assert p_value(flips(0, n=500), Margin("m", 0.01)) == pytest.approx(0.99**500, rel=1e-3)


def test_the_p_value_passes_one_half_where_the_loss_is_shown() -> None:
    assert p_value(flips(200), Margin("m", 0.01)) > 0.99
    assert p_value(flips(0, n=50), Margin("m", 0.001)) == 1.0  # less than one event


def test_a_bootstrap_tells_nothing_rarer_than_its_resamples() -> None:
    p = p_value(means(-0.2), Margin("m", 0.01))
    assert p == pytest.approx(1e-4, rel=1e-3)


def test_holm_divides_the_level_by_what_is_left_and_stops_at_the_first_failure() -> None:
    family = [
        (flips(8), Margin("middle", 0.015)),
        (flips(0), Margin("sure", 0.015)),
        (flips(12), Margin("weak", 0.015)),
    ]
    middle, sure, weak = holm(family)
    assert (sure.divisor, middle.divisor, weak.divisor) == (3, 2, 2)
    assert [s.note for s in (sure, middle, weak)] == ["Holm: 1 of 3", "Holm: 2 of 3", "Holm: stopped at 2 of 3"]
    assert sure.p_value is not None
    assert middle.p_value is not None
    assert sure.p_value < 0.05 / 3
    assert 0.025 < middle.p_value < 0.05
    assert [verdict(s, m, step)[0] for (s, m), step in zip(family, (middle, sure, weak), strict=True)] == [
        Verdict.INCONCLUSIVE, Verdict.NON_INFERIOR, Verdict.INCONCLUSIVE,
    ]  # fmt: skip
    assert verdict(*family[0])[0] is Verdict.NON_INFERIOR  # by itself


def test_the_last_of_a_family_has_its_whole_level() -> None:
    steps = holm([(flips(8), Margin("last", 0.015)), (flips(0), Margin("first", 0.015))])
    assert [s.divisor for s in steps] == [1, 2]
    assert steps[0].confidence(Margin("last", 0.015)) == 0.95


def test_each_margin_keeps_its_own_confidence_in_the_order_and_in_the_level() -> None:
    strict, mild = Margin("strict", 0.02, 0.99), Margin("mild", 0.02, 0.8)
    first, second = holm([(flips(8), strict), (flips(8), mild)])
    assert first.p_value == second.p_value
    assert (first.divisor, second.divisor) == (1, 2)  # the mild one has most to spare
    assert second.level(mild) == pytest.approx(0.1)


def test_a_single_margin_is_judged_as_it_stands() -> None:
    (step,) = holm([(flips(3), Margin("m", 0.02))])
    assert (step.divisor, step.note) == (1, "")


def classes(n: int, lost: int) -> tuple[Predictions, Predictions, np.ndarray]:
    gold = np.arange(n) % 3
    candidate = np.where(np.arange(n) < lost, (gold + 1) % 3, gold)
    return Predictions(gold), Predictions(candidate), gold


@pytest.mark.parametrize("lost", [0, 5, 9, 14, 60])
def test_bounds_verdicts_and_p_values_of_a_budget_agree(lost: int) -> None:
    margins = [Margin("accuracy", 0.02), Margin("macro_f1", 0.03, 0.9), Margin("agreement", 0.02, 0.99)]
    evidence = evaluate("sequence-classification", margins, *classes(1_000, lost))[:3]
    for e, margin in zip(evidence, margins, strict=True):
        assert e.margin is not None
        assert e.p_value is not None
        assert e.confidence >= margin.confidence
        assert (e.lower > -e.margin) == (e.verdict is Verdict.NON_INFERIOR) == (e.p_value <= 1 - e.confidence + 1e-12)
        assert e.interval[0] < e.lower
        assert "of 3" in e.note
    assert {e.verdict for e in evidence} != {Verdict.INCONCLUSIVE}


def test_inferior_is_told_at_the_metrics_own_level() -> None:
    found = evaluate(
        "sequence-classification",
        [Margin("accuracy", 0.02), Margin("macro_f1", 0.02), Margin("agreement", 0.02)],
        *classes(1_000, 31),
    )
    assert found[0].confidence > 0.98
    assert found[0].interval[1] > -0.02
    assert found[0].verdict is Verdict.INFERIOR


def test_what_is_not_judged_has_no_p_value_and_an_extreme_stays_outside_the_family() -> None:
    rng = np.random.default_rng(0)
    values = rng.normal(size=(200, 16))
    pair = Predictions(values), Predictions(values + 0.01 * rng.normal(size=values.shape))
    found = evaluate("embed", [Margin("cosine_worst", 0.05), Margin("cosine", 0.01)], *pair)
    worst, cosine, *reported = found
    assert worst.p_value is None
    assert "Holm" not in worst.note
    assert (cosine.confidence, cosine.note) == (0.95, "")
    assert reported
    assert all(e.p_value is None for e in reported)
