"""Work done ahead in threads: while the caller is busy with one batch, the next ones are made ready.

Decoding and resizing leave Python's lock, as inference does, so that threads are enough. What the work is lives with
its caller; forming batches by deadline and priority is stream.py's.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice
from typing import TypeVar

from medcompile.resources import available_cores

T = TypeVar("T")
R = TypeVar("R")


def default_threads() -> int:
    """As many threads as this process may use cores, at most four: more only take memory and the model's cores."""
    return min(4, available_cores())


def ahead(
    work: Callable[[T], R],
    items: Iterable[T],
    *,
    depth: int,
    threads: int | None = None,
    pool: ThreadPoolExecutor | None = None,
) -> Iterator[R]:
    """work(item) for every item, in order, made by threads up to depth items ahead of the one that was asked for last.

    items is read in the caller's thread, and never further than depth ahead: that bounds the memory. An error of work
    or items is raised when its turn comes, after every result before it. Closing the iterator drops work not begun.
    pool: whose threads to use, and to leave open, instead of threads of its own.
    """
    source = iter(items)
    waiting: deque[Future[R]] = deque()
    workers = pool or ThreadPoolExecutor(threads or default_threads(), thread_name_prefix="medcompile-ahead")
    failure: Exception | None = None

    def read(count: int) -> None:
        nonlocal failure
        try:
            for item in islice(source, count):
                waiting.append(workers.submit(work, item))
        except Exception as error:  # noqa: BLE001  # the source's own error, raised below once its turn has come
            failure = error

    try:
        read(depth)
        while waiting:
            result = waiting.popleft().result()
            if failure is None:
                read(1)
            yield result
        if failure is not None:
            raise failure
    finally:
        for future in waiting:
            future.cancel()
        if pool is None:
            workers.shutdown(wait=False)
