"""Answering a stream of requests in time: batches by deadline, three priorities, back-pressure.

One thread reads the source, some prepare what was read (decode, resize), one runs batches, and the consumer takes
answers; who goes when is deadlines.py's. What preparing and running mean is the caller's: images, texts and anything
else that goes in batches stream alike.

A run is expected to take what the longest of the last eight took. Nothing can join a batch once the source has ended,
or once `capacity` is reached and the consumer has nothing left to take. A run under way is never broken off, so an
emergency waits for at most one batch before its own; a smaller batch is a shorter wait.
"""

from __future__ import annotations

import heapq
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing, nullcontext
from dataclasses import dataclass
from itertools import count
from typing import Any, Generic, Self, TypeVar

from medcompile.errors import MedcompileError, UsageError
from medcompile.runtime.deadlines import Priority, Request, Schedule, Ticket
from medcompile.runtime.flow import default_threads

T = TypeVar("T")
R = TypeVar("R")

CLOSING_S = 1.0
"""How long close() waits for a source that is giving an item just then; one that is stuck ends its thread later."""


@dataclass(frozen=True)
class Answer(Generic[R]):
    """The answer to one request, or what was wrong with it. index: its place in the order of arrival, from 0.

    waited_s: from its arrival until the answer was there.
    """

    index: int
    key: str
    priority: Priority
    value: R | None
    error: MedcompileError | None
    waited_s: float


class Clock:
    """Time as a stream sees it, so that a test can hold it still."""

    def now_s(self) -> float:
        return time.monotonic()

    def wait(self, changed: threading.Condition, timeout_s: float | None) -> None:
        changed.wait(timeout_s)


class Stream(Iterator[Answer[R]], Generic[T, R]):
    """An iterator of Answers to what source gives: bare values, or Requests. A context manager; threads end with it.

    run: prepared values -> as many answers, called in one thread. prepare: called in several threads; None for none.
    batch: requests per run. max_latency_ms: what a request should wait at most, its run included, where the load
    allows. capacity: requests read and not yet taken by the consumer, at most; this bounds the memory, and a source is
    not read beyond it. patience_ms: how long routine requests let emergencies overtake.
    A MedcompileError of prepare or run is the answer to its request, and the stream goes on: a failing batch is run
    again one by one to find whose it is. Any other error of theirs ends the stream. An error of the source is raised
    after every answer to what was read before it. Raises UsageError for settings that can't be.
    """

    def __init__(
        self,
        source: Iterable[T | Request[T]],
        run: Callable[[list[Any]], Iterable[R]],
        *,
        batch: int,
        max_latency_ms: float,
        prepare: Callable[[T], Any] | None = None,
        capacity: int | None = None,
        patience_ms: float = 30_000.0,
        clock: Clock | None = None,
    ) -> None:
        if isinstance(source, (str, bytes)) or not isinstance(source, Iterable):
            raise UsageError(f"a stream reads an iterable of requests, not {type(source).__name__}")
        capacity = 4 * batch if capacity is None else capacity
        if batch < 1 or capacity < 1 or max_latency_ms < 0 or patience_ms < 0:
            raise UsageError(
                f"batch={batch}, capacity={capacity}, max_latency_ms={max_latency_ms}, patience_ms={patience_ms}",
                fix="the first two are at least 1, the others at least 0",
            )
        schedule = Schedule(batch, max_latency_ms / 1000, patience_ms / 1000)
        self._works = _Works(iter(source), prepare, run, schedule, capacity, clock or Clock())
        self._end = weakref.finalize(self, self._works.close)  # the threads know the works alone, so this can be freed
        self._works.start()

    @property
    def pending(self) -> list[Request[T]]:
        """What was read from the source and not delivered, in the order of arrival: after close(), what to repeat."""
        return self._works.pending()

    def close(self) -> None:
        """Stop: let a run under way end, close the source if it can be. Safe to call twice."""
        self._end()

    def __next__(self) -> Answer[R]:
        t = self._works.next_ticket()
        waited_s = t.answered_s - t.arrived_s
        return Answer(t.index, t.request.key, t.priority, t.value if t.error is None else None, t.error, waited_s)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


class _Works:
    """What a stream's threads share. Every field that changes does so under `changed`."""

    def __init__(
        self,
        source: Iterator[Any],
        prepare: Callable[[Any], Any] | None,
        run: Callable[[list[Any]], Iterable[Any]],
        schedule: Schedule,
        capacity: int,
        clock: Clock,
    ) -> None:
        self.changed = threading.Condition()  # its lock may be taken twice by one thread, as the collector may ask for
        self._source = source
        self._prepare = prepare
        self._run = run
        self._schedule = schedule
        self._capacity = capacity
        self._clock = clock
        self._raw: list[tuple[float, int, Ticket]] = []  # a heap of what waits for preparing, the earliest due first
        self._answers = Schedule(1, 0.0, schedule.patience_s)  # the consumer, too, gets the earliest due first
        self._undelivered: dict[int, Ticket] = {}
        self._lasted_s: deque[float] = deque([0.0], maxlen=8)
        self._ended = self._done = self._closed = False
        self._failure: BaseException | None = None  # the source's, raised when all is delivered
        self._broken: BaseException | None = None  # ours: prepare's or run's
        work = [self._read_all, self._run_all, *[self._prepare_all] * (default_threads() if prepare else 0)]
        self._threads = [threading.Thread(target=w, name=f"medcompile-stream{w.__name__}", daemon=True) for w in work]

    def start(self) -> None:
        for thread in self._threads:
            thread.start()

    def close(self) -> None:
        with self.changed:
            self._closed = True
            self.changed.notify_all()
        if threading.current_thread() in self._threads:  # the collector runs in any thread, and none can join itself
            return
        for thread in self._threads:
            thread.join(CLOSING_S if thread is self._threads[0] else None)

    def pending(self) -> list[Request[Any]]:
        with self.changed:
            return [ticket.request for ticket in self._undelivered.values()]

    def next_ticket(self) -> Ticket:
        with self.changed:
            while not self._closed:
                if taken := self._answers.take():
                    del self._undelivered[taken[0].index]
                    self.changed.notify_all()
                    return taken[0]
                if self._broken or self._done:
                    error = self._broken or self._failure
                    self._closed, self._broken, self._failure = True, None, None
                    self.changed.notify_all()
                    if error is not None:
                        raise error
                    break
                self.changed.wait()
            raise StopIteration

    @property
    def _stopped(self) -> bool:
        return self._closed or self._broken is not None

    def _read_all(self) -> None:
        try:
            with closing(self._source) if hasattr(self._source, "close") else nullcontext():  # type: ignore[type-var]
                for index in count():
                    with self.changed:
                        while len(self._undelivered) >= self._capacity and not self._stopped:
                            self.changed.wait()
                        if self._stopped:
                            break
                    try:
                        item = next(self._source)
                    except StopIteration:
                        break
                    self._arrived(index, item if isinstance(item, Request) else Request(item))
        except BaseException as error:  # noqa: BLE001  # whatever ends a source must reach the consumer, not this thread
            self._failure = error
        finally:
            with self.changed:
                self._ended = True
                self.changed.notify_all()

    def _arrived(self, index: int, request: Request[Any]) -> None:
        with self.changed:
            ticket = Ticket(index, request, self._clock.now_s(), ready=self._prepare is None, value=request.value)
            self._undelivered[index] = ticket
            self._schedule.add(ticket)
            if not ticket.ready:
                heapq.heappush(self._raw, (ticket.due_s, index, ticket))
            self.changed.notify_all()

    def _prepare_all(self) -> None:
        assert self._prepare is not None
        while True:
            with self.changed:
                while not self._raw and not self._ended and not self._stopped:
                    self.changed.wait()
                if not self._raw or self._stopped:
                    return
                ticket = heapq.heappop(self._raw)[2]
            try:
                ticket.value = self._prepare(ticket.value)
            except MedcompileError as error:
                ticket.error = error
            except BaseException as error:  # noqa: BLE001  # a bug must reach the consumer
                self._break(error)
                return
            with self.changed:
                ticket.ready = True
                self.changed.notify_all()

    def _run_all(self) -> None:
        while batch := self._next_batch():
            started_s = self._clock.now_s()
            try:
                self._answer([ticket for ticket in batch if ticket.error is None])
            except BaseException as error:  # noqa: BLE001  # a bug must reach the consumer
                self._break(error)
                return
            with self.changed:
                now_s = self._clock.now_s()
                self._lasted_s.append(now_s - started_s)
                for ticket in batch:
                    ticket.answered_s = now_s
                    self._answers.add(ticket)
                self.changed.notify_all()
        with self.changed:
            self._done = True
            self.changed.notify_all()

    def _next_batch(self) -> list[Ticket]:
        """Wait until a batch should go; [] once none will."""
        with self.changed:
            while not self._stopped and not (self._ended and not len(self._schedule)):
                more = not self._ended and (len(self._undelivered) < self._capacity or len(self._answers) > 0)
                wait_s = self._schedule.wait_s(self._clock.now_s(), max(self._lasted_s), more)
                if wait_s == 0:
                    return self._schedule.take()
                self._clock.wait(self.changed, wait_s)
            return []

    def _answer(self, tickets: list[Ticket]) -> None:
        if not tickets:
            return
        try:
            answers = self._run([ticket.value for ticket in tickets])
        except MedcompileError as error:
            if len(tickets) == 1:
                tickets[0].error = error
            else:
                for ticket in tickets:
                    self._answer([ticket])
            return
        for ticket, answer in zip(tickets, answers, strict=True):
            ticket.value = answer

    def _break(self, error: BaseException) -> None:
        with self.changed:
            self._broken = self._broken or error
            self.changed.notify_all()
