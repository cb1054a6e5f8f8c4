from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest

from medcompile.runtime.flow import ahead


def test_results_keep_the_order_though_later_items_are_done_first() -> None:
    second = threading.Event()

    def work(item: int) -> int:
        if item == 0:
            assert second.wait(10)
        if item == 1:
            second.set()
        return item * 10

    assert list(ahead(work, range(6), depth=3, threads=2)) == [0, 10, 20, 30, 40, 50]


def test_the_next_items_are_worked_on_while_the_caller_is_busy_with_one() -> None:
    done = [threading.Event() for _ in range(4)]
    results = ahead(lambda i: done[i].set(), range(4), depth=2, threads=1)
    next(results)
    assert done[1].wait(10) and done[2].wait(10)  # the caller has not asked for these yet


def test_no_more_than_depth_items_are_read_beyond_the_one_handed_over() -> None:
    read: list[int] = []

    def source() -> Iterator[int]:
        for i in range(100):
            read.append(i)
            yield i

    results = ahead(lambda i: i, source(), depth=4, threads=2)
    assert next(results) == 0
    assert read == [0, 1, 2, 3, 4]
    assert [next(results), next(results)] == [1, 2]
    assert read == [0, 1, 2, 3, 4, 5, 6]


def test_an_error_of_the_work_comes_after_every_result_before_it() -> None:
    results = ahead(lambda i: 1 // (i - 2), range(5), depth=5, threads=2)
    assert [next(results), next(results)] == [-1, -1]
    with pytest.raises(ZeroDivisionError):
        next(results)


def test_an_error_of_the_source_comes_after_every_result_before_it() -> None:
    def source() -> Iterator[int]:
        yield from (1, 2)
        raise OSError("the disk is gone")

    results = ahead(lambda i: i, source(), depth=8, threads=2)
    assert [next(results), next(results)] == [1, 2]
    with pytest.raises(OSError, match="the disk is gone"):
        next(results)


def test_closing_drops_what_has_not_begun_and_ends_the_threads() -> None:
    begun: list[int] = []
    go, at_work = threading.Event(), threading.Event()

    def work(item: int) -> int:
        begun.append(item)
        if item == 1:
            at_work.set()
            assert go.wait(10)
        return item

    before = set(threading.enumerate())
    results = ahead(work, range(50), depth=10, threads=1)
    assert next(results) == 0
    assert at_work.wait(10)
    results.close()  # type: ignore[attr-defined]
    mine = set(threading.enumerate()) - before
    go.set()
    for thread in mine:
        thread.join(10)
        assert not thread.is_alive()
    assert begun == [0, 1]


def test_nothing_gives_nothing() -> None:
    assert list(ahead(lambda i: i, [], depth=2)) == []
