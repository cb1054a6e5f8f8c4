"""Batches of encoders: the earliest due first, emergencies apart, and nobody left behind."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from medcompile.runtime.text import BATCH_TOKENS
from medcompile.serve.lanes import BATCH, Item, Job, Waiting

DUE_S = {"emergency": 0.0, "routine": 30.0, "background": 120.0}


def item(length: int = 10, priority: str = "routine", arrived_s: float = 0.0, kind: str = "embed") -> Item:
    job = Job(0, lambda _: None, priority, arrived_s, [None], 1)
    return Item(job, 0, kind, None, length, arrived_s + DUE_S[priority])


def all_batches(waiting: Waiting) -> list[list[Item]]:
    found = []
    while batch := waiting.take():
        found.append(batch)
    return found


@given(
    st.lists(
        st.tuples(st.integers(0, 3000), st.sampled_from(sorted(DUE_S)), st.sampled_from(["embed", "extract"])),
        max_size=150,
    )
)
def test_everything_comes_out_once_in_bounded_batches_of_one_kind(
    wanted: list[tuple[int, str, str]],
) -> None:
    waiting, items = Waiting(), [item(n, p, float(i), kind) for i, (n, p, kind) in enumerate(wanted)]
    for one in items:
        waiting.add(one)
    assert len(waiting) == len(items)
    batches = all_batches(waiting)
    assert sorted(id(i) for batch in batches for i in batch) == sorted(map(id, items))
    assert len(waiting) == 0
    for batch in batches:
        assert len({i.kind for i in batch}) == 1
        assert len(batch) <= BATCH
        assert len(batch) == 1 or sum(i.length for i in batch) <= BATCH_TOKENS
        assert [i.due_s for i in batch] == sorted(i.due_s for i in batch)


@given(st.lists(st.tuples(st.integers(0, 3000), st.sampled_from(sorted(DUE_S))), min_size=1, max_size=60))
def test_every_batch_holds_the_earliest_due_of_all_that_wait(wanted: list[tuple[int, str]]) -> None:
    waiting, left = Waiting(), [item(n, p, float(i)) for i, (n, p) in enumerate(wanted)]
    for one in left:
        waiting.add(one)
    for batch in all_batches(waiting):
        assert min(left, key=lambda i: i.due_s) in batch
        left = [one for one in left if one not in batch]


def test_texts_of_any_length_share_a_batch_and_an_emergency_waits_for_none_of_them() -> None:
    waiting = Waiting()
    long, short, emergency = item(3000), item(5, "background"), item(5, "emergency", 1.0)
    for one in (long, short, emergency):
        waiting.add(one)
    assert waiting.take() == [emergency]
    assert waiting.take() == [long, short]


def test_an_emergency_overtakes_and_a_background_item_that_waited_long_enough_does_not_starve() -> None:
    waiting = Waiting()
    background, routine = item(10, "background"), item(BATCH_TOKENS)
    for one in (background, routine, item(500, "emergency", 5.0)):
        waiting.add(one)
    assert [batch[0].job.priority for batch in (waiting.take(), waiting.take())] == ["emergency", "routine"]
    waiting.add(item(500, "routine", 200.0))
    assert waiting.take()[0] is background


def test_items_of_requests_that_were_given_up_are_dropped() -> None:
    waiting, gone, there = Waiting(), item(), item()
    for one in (gone, there):
        waiting.add(one)
    gone.job.over = True
    assert waiting.take() == [there]
    assert waiting.take() == []
    assert len(waiting) == 0
