from __future__ import annotations

from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from medcompile.errors import UsageError
from medcompile.runtime.deadlines import PATIENCES, Priority, Request, Schedule, Ticket

E, R, B = Priority.EMERGENCY, Priority.ROUTINE, Priority.BACKGROUND


def ticket(index: int, arrived_s: float, priority: str = R, ready: bool = True) -> Ticket:
    return Ticket(index, Request(f"study {index}", priority), arrived_s, ready=ready)


def schedule(*tickets: Ticket, batch: int = 4, max_latency_s: float = 1.0, patience_s: float = 10.0) -> Schedule:
    made = Schedule(batch, max_latency_s, patience_s)
    for t in tickets:
        made.add(t)
    return made


def indices(tickets: Sequence[Ticket]) -> list[int]:
    return [t.index for t in tickets]


def test_a_batch_waits_for_mates_until_its_oldest_request_is_due() -> None:
    s = schedule(ticket(0, 5.0), ticket(1, 5.5))
    assert s.wait_s(5.5, run_s=0.0, more=True) == pytest.approx(0.5)
    assert s.wait_s(6.5, run_s=0.0, more=True) == 0


def test_the_run_that_follows_counts_as_part_of_the_latency() -> None:
    assert schedule(ticket(0, 5.0)).wait_s(5.0, run_s=0.7, more=True) == pytest.approx(0.3)
    assert schedule(ticket(0, 5.0)).wait_s(5.0, run_s=2.0, more=True) == 0


def test_a_full_batch_goes_at_once_and_so_does_one_that_nobody_can_join() -> None:
    assert schedule(*(ticket(i, 5.0) for i in range(4))).wait_s(5.0, 0.0, more=True) == 0
    assert schedule(ticket(0, 5.0)).wait_s(5.0, 0.0, more=False) == 0


def test_an_emergency_goes_at_once_and_takes_routine_requests_along() -> None:
    s = schedule(ticket(0, 5.0), ticket(1, 5.0, E))
    assert s.wait_s(5.0, 0.0, more=True) == 0
    assert indices(s.take()) == [1, 0]


def test_nothing_ready_is_nothing_to_wait_for() -> None:
    assert schedule().wait_s(5.0, 0.0, more=True) is None
    assert schedule(ticket(0, 5.0, ready=False)).wait_s(9.0, 0.0, more=False) is None


def test_a_request_still_being_prepared_holds_back_its_own_priority_alone() -> None:
    s = schedule(ticket(0, 5.0, ready=False), ticket(1, 5.1), ticket(2, 5.2, B))
    assert indices(s.take()) == [2]
    assert s.take() == []


def test_one_that_is_being_prepared_is_waited_for_though_the_source_has_ended() -> None:
    s = schedule(ticket(0, 5.0), ticket(1, 5.0, ready=False))
    assert s.wait_s(5.2, 0.0, more=False) == pytest.approx(0.8)


def test_an_emergency_does_not_overtake_what_has_waited_for_its_patience() -> None:
    s = schedule(ticket(0, 0.0), ticket(1, 0.1), ticket(2, 10.05, E), batch=3)
    assert indices(s.take()) == [0, 2, 1]


def test_background_is_overtaken_for_four_times_as_long() -> None:
    s = schedule(ticket(0, 0.0, B), ticket(1, 29.9), ticket(2, 30.1), batch=3)
    assert indices(s.take()) == [1, 0, 2]


def test_an_unknown_priority_names_those_there_are() -> None:
    with pytest.raises(UsageError, match="'urgent'") as error:
        Request("study", "urgent")
    assert "emergency, routine, background" in error.value.fix


STEPS = st.lists(
    st.one_of(
        st.tuples(st.floats(0, 5), st.sampled_from(list(Priority)), st.booleans()),  # after a while, one arrives
        st.integers(0, 30),  # the one that was being prepared since longest, counted from there, is ready
        st.none(),  # a batch goes
    ),
    max_size=80,
)


@given(STEPS, st.integers(1, 5), st.floats(0, 8))
@settings(max_examples=120, deadline=None)
def test_whatever_comes_nothing_is_lost_doubled_or_starved_and_each_priority_keeps_its_order(
    steps: list[tuple[float, Priority, bool] | int | None], batch: int, patience_s: float
) -> None:
    s = Schedule(batch, 1.0, patience_s)
    now_s = 0.0
    added: list[Ticket] = []
    raw: list[Ticket] = []
    gone: list[Ticket] = []
    for step in steps:
        if step is None:
            waiting = [t for t in added if t not in gone]
            held = {p: min((t.index for t in waiting if t.priority == p and not t.ready), default=99) for p in Priority}
            taken = s.take()
            assert len(taken) <= batch
            gone += taken
            for o in waiting:
                if o not in taken and o.index < held[o.priority]:  # it could have gone: only for less than its patience
                    assert len(taken) == batch
                    assert all(t.arrived_s <= o.arrived_s + PATIENCES[o.priority] * patience_s for t in taken)
        elif isinstance(step, int):
            if raw:
                raw.pop(step % len(raw)).ready = True
        else:
            now_s += step[0]
            added.append(ticket(len(added), now_s, step[1], ready=step[2]))
            raw += [] if step[2] else [added[-1]]
            s.add(added[-1])
        assert len(s) == len(added) - len(gone)
    for t in raw:
        t.ready = True
    while taken := s.take():
        gone += taken
    assert sorted(indices(gone)) == list(range(len(added)))
    for priority in Priority:
        mine = [t.index for t in gone if t.priority == priority]
        assert mine == sorted(mine)
