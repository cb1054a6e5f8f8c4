from __future__ import annotations

from medcompile.workshop import more_turns, undisturbed


def turns(seconds_each: float) -> int:
    taken = 0
    while more_turns(taken, taken * seconds_each):
        taken += 1
    return taken


def test_a_short_run_is_timed_more_often_than_a_long_one_whose_times_differ_less() -> None:
    assert turns(0.001) == 500
    assert 50 < turns(0.016) < 100
    assert turns(0.2) == 9
    assert turns(5.0) == 3


def test_a_time_is_told_without_what_others_on_the_machine_added() -> None:
    assert undisturbed([7.0, 5.0, 6.0]) == 5.0
    assert undisturbed([5.0, 5.1, 5.2, 5.2, 5.3, 5.4, *[9.0] * 24]) == 5.2
