from __future__ import annotations

import gc
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from medcompile.errors import InputError, UsageError
from medcompile.runtime.deadlines import Priority, Request
from medcompile.runtime.stream import Answer, Clock, Stream

SOON = 10.0
"""Seconds after which a test that waits for an event has failed."""
LONG_MS = 3_600_000.0


class Held(Clock):
    """A clock that stands still until it is moved on. waits: set when somebody waits for a time to come."""

    def __init__(self) -> None:
        self._now_s = 0.0
        self._changed: threading.Condition | None = None
        self.waits = threading.Event()

    def now_s(self) -> float:
        return self._now_s

    def wait(self, changed: threading.Condition, timeout_s: float | None) -> None:
        self._changed = changed
        if timeout_s is not None:
            self.waits.set()
        changed.wait()

    def move(self, seconds: float) -> None:
        assert self._changed is not None
        with self._changed:
            self._now_s += seconds
            self._changed.notify_all()


class Source(Iterator[Any]):
    """An iterator that says how far it was read and whether it was closed; `last` is raised at its end."""

    def __init__(self, items: list[Any], last: Exception | None = None) -> None:
        self.items = items
        self.read = 0
        self.closed = threading.Event()
        self.last = last

    def __next__(self) -> Any:
        if self.read == len(self.items):
            raise self.last or StopIteration
        self.read += 1
        return self.items[self.read - 1]

    def close(self) -> None:
        self.closed.set()


class Model:
    """Runs that wait for `go` and are counted; a value below 0 is refused, a value of None is a bug."""

    def __init__(self, *, held: bool = False) -> None:
        self.batches: list[list[Any]] = []
        self.began = threading.Semaphore(0)
        self.go = threading.Event()
        if not held:
            self.go.set()

    def __call__(self, values: list[Any]) -> list[int]:
        self.batches.append(values)
        self.began.release()
        assert self.go.wait(SOON)
        if any(v < 0 for v in values):
            raise InputError("below zero")
        return [v * 10 for v in values]


def stream(source: Any, run: Callable[[list[Any]], Any], **settings: Any) -> Stream[Any, Any]:
    return Stream(source, run, **{"batch": 4, "max_latency_ms": LONG_MS, **settings})


def values(answers: list[Answer[Any]]) -> list[Any]:
    return [a.value for a in answers]


def until(condition: Callable[[], bool], works: Stream[Any, Any]) -> None:
    """Wait until the stream's threads have made it true."""
    changed = works._works.changed
    with changed:
        assert changed.wait_for(condition, SOON)


def no_thread_of(works: Stream[Any, Any]) -> bool:
    for thread in (threads := works._works._threads):
        thread.join(SOON)
    return not any(thread.is_alive() for thread in threads)


def test_answers_come_in_order_in_full_batches_with_index_and_key() -> None:
    model = Model()
    requests = [Request(i, key=f"study {i}") for i in range(10)]
    with stream(iter(requests), model, capacity=100) as answers:
        got = list(answers)
    assert values(got) == [i * 10 for i in range(10)]
    assert [a.index for a in got] == list(range(10))
    assert [a.key for a in got] == [r.key for r in requests]
    assert {a.priority for a in got} == {Priority.ROUTINE}
    assert model.batches == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]
    assert answers.pending == []


def test_an_empty_source_gives_no_answer() -> None:
    assert list(stream([], Model())) == []


def test_a_batch_that_is_not_full_goes_when_its_oldest_has_waited_for_the_latency() -> None:
    clock, model, more = Held(), Model(), threading.Event()

    def source() -> Iterator[int]:
        yield 1
        yield 2
        assert more.wait(SOON)

    with stream(source(), model, max_latency_ms=50, clock=clock) as answers:
        until(lambda: len(answers._works._schedule) == 2, answers)
        assert clock.waits.wait(SOON)
        clock.move(0.049)
        assert not model.batches
        clock.move(0.002)
        first = next(answers)
        assert model.batches == [[1, 2]]
        assert first.waited_s == pytest.approx(0.051)
        more.set()
        assert values(list(answers)) == [20]


def test_an_emergency_overtakes_routine_requests_already_queued() -> None:
    model = Model(held=True)
    requests = [Request(i) for i in range(8)] + [Request(100, "emergency", key="stroke"), Request(9)]
    with stream(requests, model, batch=2, capacity=100) as answers:
        until(lambda: len(answers._works._undelivered) == 10, answers)
        assert model.began.acquire(timeout=SOON)  # what is running by now was there before it
        model.go.set()
        got = list(answers)
    assert [a.index for a in got if a.priority == Priority.ROUTINE] == [0, 1, 2, 3, 4, 5, 6, 7, 9]
    assert model.batches[1][0] == 100 or model.batches[0][0] == 100
    assert len(got) == 10


def test_an_emergencys_answer_overtakes_answers_that_a_slow_consumer_has_not_taken() -> None:
    def source() -> Iterator[Request[int]]:
        yield from [Request(1), Request(2), Request(3)]
        yield Request(4, "emergency")

    with stream(source(), Model(), batch=1, capacity=10) as answers:
        until(lambda: answers._works._done, answers)
        assert values(list(answers)) == [40, 10, 20, 30]


def test_a_source_is_not_read_beyond_the_capacity_while_the_consumer_is_slow() -> None:
    source = Source(list(range(100)))
    with stream(source, Model(), batch=2, capacity=6) as answers:
        until(lambda: len(answers._works._answers) == 6, answers)
        assert source.read == 6
        assert next(answers).value == 0
        until(lambda: len(answers._works._undelivered) == 6, answers)
        assert source.read == 7
        assert values(list(answers)) == [i * 10 for i in range(1, 100)]


def test_a_capacity_below_a_batch_does_not_wait_for_a_full_one() -> None:
    model = Model()
    assert values(list(stream(range(7), model, batch=4, capacity=3))) == [i * 10 for i in range(7)]
    assert max(map(len, model.batches)) <= 3


def test_a_bad_request_gets_its_error_and_its_batch_mates_their_answers() -> None:
    got = list(stream([1, 2, -3, 4, 5], Model(), capacity=100))
    assert values(got) == [10, 20, None, 40, 50]
    assert [a.index for a in got if a.error is not None] == [2]
    assert isinstance(got[2].error, InputError)


def test_what_can_not_be_prepared_gets_its_error_and_never_reaches_the_model() -> None:
    def prepare(text: str) -> int:
        if not text.isdigit():
            raise InputError("not a number")
        return int(text)

    model = Model()
    got = list(stream(["1", "x", "3", "y"], model, prepare=prepare, capacity=100))
    assert values(got) == [10, None, 30, None]
    assert model.batches == [[1, 3]]


def test_order_is_kept_though_later_requests_are_prepared_first() -> None:
    second = threading.Event()

    def prepare(value: int) -> int:
        if value == 0:
            assert second.wait(SOON)
        if value == 1:
            second.set()
        return value

    works = stream(range(5), Model(), prepare=prepare, batch=1, capacity=100)
    if len(works._works._threads) < 4:
        works.close()
        pytest.skip("one core: nothing is prepared beside the first")
    assert values(list(works)) == [0, 10, 20, 30, 40]


def test_emergencies_are_prepared_before_routine_requests_that_came_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("medcompile.runtime.stream.default_threads", lambda: 1)
    go, order = threading.Event(), []

    def prepare(value: int) -> int:
        order.append(value)
        assert go.wait(SOON)
        return value

    requests = [Request(0), Request(1), Request(2, "background"), Request(3, "emergency")]
    with stream(requests, Model(), prepare=prepare, capacity=100) as answers:
        until(lambda: len(answers._works._undelivered) == 4 and len(answers._works._raw) <= 3, answers)
        go.set()
        assert sorted(values(list(answers))) == [0, 10, 20, 30]
    assert next(v for v in order if v != order[0]) == 3 or order[0] == 3
    assert order[-1] == 2


def test_an_error_of_the_source_is_raised_after_every_answer_to_what_it_gave() -> None:
    source = Source([1, 2, 3, 4, 5], OSError("the disk is gone"))
    answers = stream(source, Model(), capacity=100)
    assert values([next(answers) for _ in range(5)]) == [10, 20, 30, 40, 50]
    with pytest.raises(OSError, match="the disk is gone"):
        next(answers)
    assert list(answers) == []
    assert no_thread_of(answers)


def test_a_bug_of_the_model_ends_the_stream_and_pending_tells_what_has_no_answer() -> None:
    source = Source([1, 2, None, 4])
    answers = stream(source, Model(), batch=1, capacity=100)
    assert values([next(answers), next(answers)]) == [10, 20]
    with pytest.raises(TypeError):
        next(answers)
    assert [r.value for r in answers.pending] == [None, 4]
    assert no_thread_of(answers)
    assert source.closed.is_set()


def test_a_bug_of_preparing_ends_the_stream() -> None:
    answers = stream(["1", None], Model(), prepare=int, capacity=100)
    with pytest.raises(TypeError):
        list(answers)
    assert no_thread_of(answers)


def test_a_consumer_that_dies_leaves_no_thread_and_loses_nothing() -> None:
    source = Source(list(range(100)))
    answers = stream(source, Model(), batch=2, capacity=6)
    seen = []
    with pytest.raises(RuntimeError, match="the consumer died"), answers:
        for answer in answers:
            seen.append(answer.index)
            if len(seen) == 3:
                raise RuntimeError("the consumer died")
    assert no_thread_of(answers)
    assert source.closed.is_set()
    assert seen + [r.value for r in answers.pending] == list(range(source.read))
    assert len(answers.pending) <= 6
    assert list(answers) == []


def test_a_stream_that_nobody_holds_any_more_ends_its_threads_and_closes_its_source() -> None:
    source = Source(list(range(100)))
    answers = stream(source, Model(), batch=2, capacity=6)
    assert next(answers).value == 0
    threads = answers._works._threads
    del answers
    gc.collect()
    for thread in threads:
        thread.join(SOON)
        assert not thread.is_alive()
    assert source.closed.is_set()


def test_closing_waits_for_the_run_under_way_and_twice_is_as_good_as_once() -> None:
    model = Model(held=True)
    answers = stream(range(100), model, batch=2, capacity=6)
    assert model.began.acquire(timeout=SOON)
    closing = threading.Thread(target=answers.close)
    closing.start()
    until(lambda: answers._works._closed, answers)
    assert closing.is_alive()
    model.go.set()
    closing.join(SOON)
    assert no_thread_of(answers)
    answers.close()
    assert len(model.batches) == 1


def test_closing_does_not_hang_on_a_source_that_gives_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("medcompile.runtime.stream.CLOSING_S", 0.01)
    stuck, closed = threading.Event(), threading.Event()

    def source() -> Iterator[int]:
        try:
            yield 1
            assert stuck.wait(SOON)
            yield 2
        finally:
            closed.set()

    answers = stream(source(), Model(), batch=1)
    assert next(answers).value == 10
    answers.close()
    stuck.set()
    assert closed.wait(SOON)  # in its own thread, once it can be
    assert no_thread_of(answers)
    assert [r.value for r in answers.pending] == [2]


def test_a_consumer_that_waits_in_another_thread_is_let_go_by_close(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("medcompile.runtime.stream.CLOSING_S", 0.01)
    stuck = threading.Event()

    def source() -> Iterator[int]:
        assert stuck.wait(SOON)
        yield from ()

    answers = stream(source(), Model())
    got: list[Any] = []
    consumer = threading.Thread(target=lambda: got.extend([list(answers)]))
    consumer.start()
    answers._works.close()
    consumer.join(SOON)
    stuck.set()
    assert got == [[]]


@pytest.mark.parametrize(
    "wrong", [{"batch": 0}, {"capacity": 0}, {"max_latency_ms": -1}, {"patience_ms": -1}], ids=lambda w: next(iter(w))
)
def test_settings_that_can_not_be_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match=f"{next(iter(wrong))}="):
        stream([1], Model(), **wrong)


def test_one_text_is_no_stream_of_its_characters() -> None:
    with pytest.raises(UsageError, match="not str"):
        stream("chest pain", Model())


@given(
    st.lists(st.tuples(st.sampled_from(list(Priority)), st.sampled_from(["good", "bad", "unprepared"])), max_size=40),
    st.integers(1, 5),
    st.integers(1, 9),
    st.booleans(),
)
@settings(max_examples=60, deadline=None)
def test_every_request_is_answered_once_and_each_priority_in_order(
    load: list[tuple[Priority, str]], batch: int, capacity: int, prepared: bool
) -> None:
    def prepare(value: int) -> int:
        if load[abs(value)][1] == "unprepared":
            raise InputError("unprepared")
        return value

    requests = [Request(-i if load[i][1] == "bad" else i, p, key=str(i)) for i, (p, _) in enumerate(load)]
    works = stream(
        iter(requests), Model(), batch=batch, capacity=capacity, prepare=prepare if prepared else None, max_latency_ms=0
    )
    got = list(works)
    assert sorted(a.index for a in got) == list(range(len(load)))
    assert no_thread_of(works)
    for priority in Priority:
        mine = [a.index for a in got if a.priority == priority]
        assert mine == sorted(mine)
    for a in got:
        assert a.key == str(a.index)
        bad = (load[a.index][1] == "bad" and a.index) or (prepared and load[a.index][1] == "unprepared")
        assert (a.error is not None) == bool(bad)
        assert a.error is not None or a.value == a.index * 10
