from __future__ import annotations

import numpy as np

from medcompile.runtime.kv_cache import BlockPool
from medcompile.runtime.scheduler import Scheduler, Sequence, Work, step_batch


def sequence(length: int, room: int = 8, first: int = 0) -> Sequence:
    buffer = np.zeros(length + room, np.int64)
    buffer[:length] = np.arange(first, first + length)
    return Sequence(buffer, length)


def scheduler(blocks: int = 64, size: int = 4, *, tokens: int = 16, slots: int = 4, ageing: int = 10) -> Scheduler:
    return Scheduler(BlockPool(blocks, size), step_tokens=tokens, slots=slots, ageing=ageing, cheap_tokens=4)


def advance(s: Scheduler) -> list[Work]:
    """One step in which every token chosen is 1; who has no room left leaves."""
    works = s.plan()
    for work in works:
        s.commit(work, np.ones(int(work.ends), np.int64))
        if work.sequence.length == len(work.sequence.buffer):
            s.remove(work.sequence)
    return works


def counts(works: list[Work]) -> dict[int, int]:
    """Tokens of this step by the sequence's first token."""
    return {int(w.sequence.buffer[0]): w.count for w in works}


def test_a_long_prompt_is_computed_in_chunks_while_others_go_on_token_by_token() -> None:
    s = scheduler(tokens=8)
    s.add(sequence(3, first=100))
    advance(s)
    s.add(sequence(20, first=200))
    assert [counts(advance(s)) for _ in range(4)] == [
        {100: 1, 200: 7},
        {100: 1, 200: 7},
        {100: 1, 200: 6},
        {100: 1, 200: 1},
    ]


def test_answers_go_on_even_where_an_urgent_long_prompt_fills_the_step() -> None:
    s = scheduler(tokens=8)
    s.add(sequence(3, first=100))
    advance(s)
    s.add(sequence(20, first=200), priority=-5)
    assert counts(advance(s)) == {100: 1, 200: 7}
    assert [int(r.buffer[0]) for r in s.running] == [200, 100]


def test_a_sequence_joins_the_step_after_it_came_and_leaves_its_place_at_once() -> None:
    s = scheduler(slots=1)
    s.add(sequence(3, room=2, first=100))
    s.add(sequence(3, room=2, first=200))
    assert [list(counts(advance(s))) for _ in range(4)] == [[100], [100], [200], [200]]
    assert s.pool.free == 64


def test_when_blocks_run_out_the_last_to_come_gives_way_and_finds_its_full_blocks_again() -> None:
    s = scheduler(blocks=5, size=4)
    first, second = sequence(7, room=9, first=100), sequence(5, room=9, first=200)
    s.add(first)
    s.add(second)
    for _ in range(6):
        advance(s)
    assert s.preemptions == 1
    assert s.running == [first]
    assert s.waiting == [second]
    assert second.blocks == []
    assert second.length > 5  # what it said already stays said
    while first in s.running:
        advance(s)
    assert s.preemptions == 1  # it came back when there was room to grow, not to be sent away again
    s.plan()
    assert s.running == [second]
    assert second.cached == 0  # of its prompt as it came
    assert second.length == 9
    assert second.computed >= 4


def test_nobody_is_let_in_who_would_be_sent_away_when_those_who_run_grow_by_a_block() -> None:
    s = scheduler(blocks=4, size=4)
    grows, comes = sequence(3, room=4, first=100), sequence(12, room=2, first=200)
    s.add(grows)
    advance(s)
    s.add(comes)  # would fill the three blocks that are free
    while grows in s.running:
        advance(s)
        assert s.pool.free > 0
    assert s.preemptions == 0
    assert list(counts(advance(s))) == [200]


def test_equal_prompts_that_come_together_are_computed_once() -> None:
    s = scheduler(tokens=64, slots=8)
    for _ in range(4):
        s.add(sequence(17))
    computed = sum(w.count for _ in range(2) for w in advance(s))
    assert computed == 17 + 1 + 3 * 1  # sixteen of seventeen tokens lie in full blocks


def test_a_prompt_that_is_cached_to_its_last_token_copies_one_block_and_computes_one_token() -> None:
    s = scheduler()
    s.add(sequence(8, room=1))
    advance(s)
    again = sequence(8, room=1)
    s.add(again)
    (work,) = s.plan()
    assert (work.count, again.computed) == (1, 7)
    assert again.copy is not None
    shared, own = again.copy
    assert again.blocks[-1] == own != shared
    assert s.pool.published(shared)
    assert not s.pool.published(own)


def test_a_copy_that_the_pool_has_no_block_for_is_done_without() -> None:
    s = scheduler(blocks=2)
    s.add(sequence(8, room=1))
    advance(s)
    again = sequence(8, room=1)
    s.add(again)
    (work,) = s.plan()
    assert (work.count, again.computed, again.copy) == (4, 4, None)


def test_a_smaller_priority_goes_first_and_takes_the_place_of_one_that_runs() -> None:
    s = scheduler(slots=1)
    late, urgent = sequence(3, first=100), sequence(3, first=200)
    s.add(late, priority=1)
    advance(s)
    s.add(urgent, priority=0)
    assert list(counts(advance(s))) == [200]
    assert s.waiting == [late]


def test_waiting_makes_up_for_priority_so_that_none_starves_under_a_flood_of_urgent_ones() -> None:
    for priority in (0, 1, 3):
        s = scheduler(slots=1, ageing=10)
        patient = sequence(3, room=2, first=9000)
        s.add(patient, priority=priority)
        steps = 0
        while patient.length < len(patient.buffer):
            s.add(sequence(3, room=2, first=steps))  # one comes each step, and each takes two
            advance(s)
            steps += 1
            assert steps < 1000
        came_before = priority * 10 + 2  # those that may go before it: one a step until its wait makes up for it
        assert steps <= 2 * came_before + 2


def test_nobody_goes_before_one_who_came_ageing_steps_earlier_per_level_of_priority() -> None:
    s = scheduler(slots=1, ageing=10)
    s.add(sequence(3, first=1))
    advance(s)
    s.add(sequence(3, first=2), priority=2)
    for _ in range(21):
        s.plan()
    s.add(sequence(3, first=3), priority=0)
    assert [int(w.buffer[0]) for w in s.waiting] == [2, 3]
    s.add(sequence(3, first=4), priority=-1)
    assert [int(w.buffer[0]) for w in s.waiting] == [4, 2, 3]


def test_removing_frees_at_once_whether_it_runs_or_waits_and_only_once() -> None:
    s = scheduler(slots=1)
    runs, waits = sequence(10), sequence(10, first=50)
    s.add(runs)
    s.add(waits)
    (work,) = s.plan()
    assert s.pool.free == 61
    assert s.remove(runs)
    assert s.remove(waits)
    assert not s.remove(runs)
    assert s.pool.free == 64
    s.commit(work, np.ones(1, np.int64))  # the step that was under way finds nobody
    assert runs.length == 10
    assert s.plan() == []


def test_a_steps_arrays_say_which_tokens_lie_where() -> None:
    s = scheduler(tokens=9)
    s.add(sequence(5, first=100))
    advance(s)
    s.add(sequence(30, first=200))
    batch = step_batch(s.plan(), 4)
    assert batch.input_ids.tolist() == [1, *range(200, 208)]
    assert batch.positions.tolist() == [5, *range(8)]
    assert batch.query_starts.tolist() == [0, 1, 9]
    assert batch.past_lens.tolist() == [5, 0]
    assert batch.block_table.shape == (2, 2)  # as wide as this step needs, though the prompt owns eight blocks
    assert batch.logit_rows.tolist() == [0]  # a chunk of a prompt gives none
