"""Intervals, the rule of no difference and the alarm for regressions, on simulated timings whose truth is known."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest

from medcompile.bench import judgement, statistics
from medcompile.bench.results import Accuracy, Bench, Entry, Shape, Timing
from medcompile.errors import UsageError

Draw = Callable[[np.random.Generator, int], np.ndarray[tuple[int], np.dtype[np.float64]]]


def steady(rng: np.random.Generator, rounds: int) -> np.ndarray[tuple[int], np.dtype[np.float64]]:
    """Logs of times with 3 % of noise."""
    return rng.normal(0, 0.03, rounds)


def disturbed(rng: np.random.Generator, rounds: int) -> np.ndarray[tuple[int], np.dtype[np.float64]]:
    """The same, with one turn in ten lengthened by other work, by half on average."""
    return rng.normal(0, 0.03, rounds) + (rng.random(rounds) < 0.1) * rng.exponential(0.4, rounds)


def drifting(rng: np.random.Generator, rounds: int) -> np.ndarray[tuple[int], np.dtype[np.float64]]:
    return rng.normal(0, 0.03, rounds)  # the drift itself is common to all turns of a round: see turns()


def turns(draw: Draw, rng: np.random.Generator, rounds: int, ratio: float) -> tuple[list[float], list[float]]:
    """A contender's turns and the reference's, which are 10 ms; the whole machine may grow slower by half."""
    drift = np.linspace(0, 0.4, rounds) if draw is drifting else np.zeros(rounds)
    own, reference = draw(rng, rounds), draw(rng, rounds)
    return list(10 * ratio * np.exp(own + drift)), list(10 * np.exp(reference + drift))


@pytest.mark.parametrize("draw", [steady, disturbed, drifting])
@pytest.mark.parametrize("rounds", [6, 10, 20])
def test_the_interval_holds_the_true_ratio_in_about_95_of_100_runs(draw: Draw, rounds: int) -> None:
    rng = np.random.default_rng(1)
    found = [statistics.ratio(*turns(draw, rng, rounds, 0.8)) for _ in range(600)]
    held = [r for r in found if r is not None and r.low is not None and r.high is not None and r.low <= 0.8 <= r.high]
    assert len(held) / len(found) >= 0.935  # 600 runs tell 0.95 to within 0.018, twice


@pytest.mark.parametrize("draw", [steady, disturbed])
def test_two_equal_contenders_are_told_apart_in_at_most_5_of_100_runs(draw: Draw) -> None:
    rng = np.random.default_rng(2)
    found = [statistics.ratio(*turns(draw, rng, 10, 1.0)) for _ in range(600)]
    told_apart = sum(r is not None and r.no_difference is False for r in found)
    assert told_apart / len(found) <= 0.06


def test_a_contender_that_is_a_tenth_faster_is_told_so_in_most_runs_of_ten_rounds() -> None:
    rng = np.random.default_rng(3)
    found = [statistics.ratio(*turns(steady, rng, 10, 0.9)) for _ in range(200)]
    faster = sum(r is not None and r.high is not None and r.high < 1 for r in found)
    assert faster / len(found) > 0.9


def test_rounds_that_one_of_the_two_missed_do_not_count() -> None:
    found = statistics.ratio([2.0, None, 2.0, 4.0], [1.0, 1.0, None, 2.0])
    assert found is not None
    assert (found.value, found.rounds) == (pytest.approx(2.0), 2)


def test_fewer_than_six_rounds_have_no_interval_and_no_verdict() -> None:
    found = statistics.ratio([2.0] * 5, [1.0] * 5)
    assert found is not None
    assert (found.low, found.no_difference) == (None, None)
    assert statistics.ratio([None], [1.0]) is None


def test_a_percentile_beyond_the_outermost_run_is_not_told() -> None:
    values = [float(v) for v in range(99)]
    assert statistics.percentile(values, 0.99) is None
    assert statistics.percentile([*values, 99.0], 0.99) == pytest.approx(98.01)
    assert statistics.percentile(values[:9], 0.9) is None
    assert statistics.percentile(values[:3], 0.5) == 1.0


# ---- an earlier run against this one

NAMES = tuple(f"ours:{k}" for k in range(6))
CELLS = ("1x128", "8x128")


def bench(rng: np.random.Generator, factor: float = 1.0, draw: Draw = disturbed, machine: float = 1.0) -> Bench:
    """Six contenders of ours and a reference in two cells; the first contender slower by factor."""
    reference = {cell: 20 * machine * np.exp(draw(rng, 10)) for cell in CELLS}
    entries = [Entry("torch", "torch", "torch", cells=tuple(Timing(c, tuple(t)) for c, t in reference.items()))]
    for k, name in enumerate(NAMES):
        own = 10 * machine * (factor if k == 0 else 1.0)
        cells = tuple(Timing(cell, tuple(own * np.exp(draw(rng, 10)))) for cell in CELLS)
        entries.append(Entry(name, name, "ours", str(k), ours=True, cells=cells))
    shapes = tuple(Shape(cell, 1, 128, 0, 10) for cell in CELLS)
    return Bench("x", "bert", "embed", "model", 2, (0, 1), 10, 0, "torch", {}, "", {}, tuple(entries), shapes)


@pytest.mark.parametrize("draw", [steady, disturbed])
def test_no_change_raises_an_alarm_in_at_most_5_of_100_comparisons_even_between_machines(draw: Draw) -> None:
    rng = np.random.default_rng(4)
    alarms = 0
    for _ in range(200):
        old, new = bench(rng, draw=draw), bench(rng, draw=draw, machine=1.7)
        alarms += bool(judgement.regressions(judgement.compare(new, old, tolerance=0.0)))
    assert alarms / 200 <= 0.05


def test_a_contender_that_became_a_third_slower_raises_the_alarm() -> None:
    rng = np.random.default_rng(5)
    caught = 0
    for _ in range(40):
        found = judgement.regressions(judgement.compare(bench(rng, 1.33, steady), bench(rng, draw=steady)))
        caught += {(c.entry, c.cell) for c in found} >= {("ours:0", cell) for cell in CELLS}
    assert caught >= 36


def test_a_change_within_the_tolerance_is_let_pass() -> None:
    rng = np.random.default_rng(6)

    def exact(rng: np.random.Generator, rounds: int) -> np.ndarray[tuple[int], np.dtype[np.float64]]:
        return rng.normal(0, 1e-4, rounds)

    old, new = bench(rng, draw=exact), bench(rng, 1.015, exact)
    assert not judgement.regressions(judgement.compare(new, old))
    assert judgement.regressions(judgement.compare(new, old, tolerance=0.01))


def test_answers_that_have_become_wrong_are_a_regression() -> None:
    rng = np.random.default_rng(7)
    old, new = bench(rng, draw=steady), bench(rng, draw=steady)
    spoiled = replace(new.entries[1].cells[0], accuracy=Accuracy(8, wrong="answers hold NaN"))
    entry = replace(new.entries[1], cells=(spoiled, *new.entries[1].cells[1:]))
    new = replace(new, entries=(new.entries[0], entry, *new.entries[2:]))
    (found,) = judgement.regressions(judgement.compare(new, old))
    assert (found.entry, found.cell, found.wrong) == ("ours:0", "1x128", "answers hold NaN")
    assert not judgement.regressions(judgement.compare(new, new))


def test_a_peer_that_became_slower_fails_no_check_of_ours() -> None:
    rng = np.random.default_rng(8)
    old, new = bench(rng, draw=steady), bench(rng, 1.5, steady)
    theirs = [replace(b, entries=tuple(replace(e, ours=e.name != "ours:0") for e in b.entries)) for b in (old, new)]
    changes = judgement.compare(theirs[1], theirs[0])
    assert [c for c in changes if c.regressed and c.entry == "ours:0"]
    assert not judgement.regressions(changes)


def test_runs_of_different_threads_or_references_are_not_compared() -> None:
    found = bench(np.random.default_rng(9))
    with pytest.raises(UsageError, match="had threads 4, this one has 2"):
        judgement.compare(found, replace(found, threads=4))
    with pytest.raises(UsageError, match="reference"):
        judgement.compare(found, replace(found, reference="ours:1"))


# ---- what should make one doubt the numbers


def test_an_unsteady_clock_other_load_and_heat_are_warned_of() -> None:
    calm = bench(np.random.default_rng(10))
    shape = replace(calm.shapes[0], spin_ms=(1.0,) * 30, other_load=0.01, stolen=0.0)
    assert not list(judgement.warnings(replace(calm, shapes=(shape,))))
    falling = replace(shape, spin_ms=tuple(np.linspace(1.0, 1.2, 30)), other_load=0.3, stolen=0.2)
    told = " ".join(judgement.warnings(replace(calm, shapes=(falling,), throttled=3)))
    for word in ("unsteady", "fell by", "3 times", "other processes had 30%", "hypervisor gave 20%"):
        assert word in told
