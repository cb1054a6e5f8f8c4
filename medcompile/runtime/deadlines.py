"""Which request goes next, and when a batch of them does: deadlines and three priorities, as pure bookkeeping.

Nothing here runs, waits or reads a clock: it is told the time. The threads around it are stream.py's.

Who goes first. Every request is due `patience` after its arrival if routine, four times that if background, at once if
an emergency, and the earliest due goes first. So an emergency overtakes all routine requests that have not waited for
`patience` yet, and none starves: a request is overtaken by those alone that arrive less than its patience after it.
Within one priority the order is that of arrival.

When a batch goes. When it is full, when it holds an emergency, when nothing can join it, or when its oldest request
has waited for max_latency less what a run is expected to take.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from enum import StrEnum
from itertools import islice, takewhile
from typing import Any, Generic, TypeVar

from medcompile.errors import MedcompileError, UsageError

T = TypeVar("T")


class Priority(StrEnum):
    EMERGENCY = "emergency"
    ROUTINE = "routine"
    BACKGROUND = "background"


PATIENCES = {Priority.EMERGENCY: 0, Priority.ROUTINE: 1, Priority.BACKGROUND: 4}
"""After how many times the stream's patience a request is due."""


@dataclass(frozen=True)
class Request(Generic[T]):
    """What a source may give in place of a bare value: its priority, and a key that comes back with the answer."""

    value: T
    priority: str = Priority.ROUTINE
    key: str = ""

    def __post_init__(self) -> None:
        if self.priority not in list(Priority):
            raise UsageError(f"no priority {self.priority!r}", fix=f"choose from: {', '.join(Priority)}")


@dataclass(eq=False)
class Ticket:
    """One request on its way. ready: prepared, or found bad. value: what preparing made of it, then its answer."""

    index: int
    request: Request[Any]
    arrived_s: float
    due_s: float = 0.0
    ready: bool = True
    value: Any = None
    error: MedcompileError | None = None
    answered_s: float = 0.0

    @property
    def priority(self) -> Priority:
        return Priority(self.request.priority)


class Schedule:
    """Who goes next, and when a batch does. Not thread-safe; reads no clock. All times in seconds.

    batch: requests that make one full. A request that is not ready holds back only later ones of its own priority.
    """

    def __init__(self, batch: int, max_latency_s: float, patience_s: float) -> None:
        self._batch = batch
        self._max_latency_s = max_latency_s
        self.patience_s = patience_s
        self._lanes: dict[Priority, deque[Ticket]] = {p: deque() for p in Priority}

    def __len__(self) -> int:
        return sum(map(len, self._lanes.values()))

    def add(self, ticket: Ticket) -> None:
        """Within one priority, tickets are added in the order of arrival."""
        ticket.due_s = ticket.arrived_s + PATIENCES[ticket.priority] * self.patience_s
        self._lanes[ticket.priority].append(ticket)

    def wait_s(self, now_s: float, run_s: float, more: bool) -> float | None:
        """How long until a batch should go: 0 for now, None while nothing is ready.

        run_s: what a run is expected to take. more: whether further requests may join.
        """
        ready = sum(len(list(self._ready(lane))) for lane in self._lanes.values())
        if not ready:
            return None
        full = ready >= self._batch
        if full or any(self._ready(self._lanes[Priority.EMERGENCY])) or not (more or len(self) > ready):
            return 0.0
        oldest = min(lane[0].arrived_s for lane in self._lanes.values() if lane and lane[0].ready)
        return max(0.0, oldest + self._max_latency_s - run_s - now_s)

    def take(self) -> list[Ticket]:
        """The next batch, the earliest due first; fewer where fewer are ready."""
        batch: list[Ticket] = []
        while len(batch) < self._batch:
            heads = [lane for lane in self._lanes.values() if lane and lane[0].ready]
            if not heads:
                break
            batch.append(min(heads, key=lambda lane: lane[0].due_s).popleft())
        return batch

    def _ready(self, lane: deque[Ticket]) -> Iterator[Ticket]:
        return takewhile(lambda ticket: ticket.ready, islice(lane, self._batch))
