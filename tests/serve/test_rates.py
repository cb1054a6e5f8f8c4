"""Rates: no caller ever gets more than its bucket and its rate allow, and none is starved by another."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from medcompile.serve.rates import Rate, Rates


class Clock:
    def __init__(self) -> None:
        self.now_s = 0.0

    def __call__(self) -> float:
        return self.now_s


def test_a_burst_goes_through_at_once_and_then_the_rate_holds() -> None:
    clock, rate = Clock(), Rate(60, 3)
    rates = Rates(clock)
    assert [rates.take("a", rate) for _ in range(3)] == [0, 0, 0] and rates.left("a", rate) == 0
    assert rates.take("a", rate) == 1.0
    clock.now_s = 0.9
    assert 0.09 < rates.take("a", rate) < 0.11  # a refusal costs nothing
    clock.now_s = 1.0
    assert rates.take("a", rate) == 0
    assert rates.take("b", rate) == 0 and rates.left("b", rate) == 2


@given(
    per_minute=st.floats(0.5, 10_000),
    burst=st.integers(1, 50),
    pauses=st.lists(st.floats(0, 5), min_size=1, max_size=200),
)
def test_over_any_time_no_more_than_the_burst_and_the_rate_go_through(
    per_minute: float, burst: int, pauses: list[float]
) -> None:
    clock, rate = Clock(), Rate(per_minute, burst)
    rates = Rates(clock)
    through: list[float] = []
    for pause in pauses:
        clock.now_s += pause
        wait_s = rates.take("a", rate)
        if wait_s == 0:
            through.append(clock.now_s)
        else:
            clock.now_s += wait_s
            assert rates.take("a", rate) < 1e-6  # who waits as long as told gets through
            through.append(clock.now_s)
    for first in range(len(through)):
        for last in range(first, len(through)):
            allowed = burst + (through[last] - through[first]) * per_minute / 60
            assert last - first + 1 <= allowed + 1e-6


def test_names_that_no_longer_ask_are_forgotten() -> None:
    rates = Rates(Clock())
    for number in range(70_000):
        rates.take(str(number), Rate(60, 1))
    assert len(rates._spent) == 65_536
