"""Which texts and images go into an encoder's next batch: the earliest due, and those that are due after it.

The earliest due goes first (deadlines.py's patience for each priority, so that nothing starves), and takes along what
is of its kind, whatever its length: the encoder itself cuts a batch into runs of about one length, and spreads them
over the cores. An emergency takes other emergencies alone, as nobody else's work shall delay its answer. Pure
bookkeeping: nothing runs here.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from medcompile.runtime.deadlines import Priority
from medcompile.runtime.text import BATCH_TOKENS

BATCH = 64
"""Items of a batch at most."""


@dataclass
class Job:
    """A request: as many items as it has texts or images, answered together when the last is done."""

    number: int
    finish: Callable[[Job], None]
    priority: str
    arrived_s: float
    answers: list[Any]
    left: int
    tokens: int = 0
    batch: int = 0
    started_s: float = 0.0
    over: bool = False
    more: Mapping[str, Any] = field(default_factory=dict)

    @property
    def facts(self) -> dict[str, Any]:
        """For usage and metrics."""
        return {"tokens": self.tokens, "batch": self.batch, "queued_s": max(0.0, self.started_s - self.arrived_s)}


@dataclass(eq=False)
class Item:
    """One text, pair of texts, or image of a job. kind: items of one kind go through the same graph."""

    job: Job
    index: int
    kind: str
    value: Any
    length: int
    due_s: float


class Waiting:
    """Items in lanes of one kind and one priority, in the order of arrival. Not thread-safe."""

    def __init__(self) -> None:
        self._lanes: dict[tuple[str, str], deque[Item]] = {}
        self._count = 0

    def __len__(self) -> int:
        return self._count

    def add(self, item: Item) -> None:
        self._lanes.setdefault((item.kind, item.job.priority), deque()).append(item)
        self._count += 1

    def take(self) -> list[Item]:
        """The earliest due item and those that go with it, the earliest due of them first; [] where none waits."""
        self._clean()
        if not self._lanes:
            return []
        kind, priority = min(self._lanes, key=self._due_s)
        lanes = [(kind, priority)]
        if priority != Priority.EMERGENCY:
            lanes = [key for key in self._lanes if key[0] == kind]
        batch: list[Item] = []
        tokens = 0
        while lanes and len(batch) < BATCH:
            first = min(lanes, key=self._due_s)
            tokens += self._lanes[first][0].length
            if batch and tokens > BATCH_TOKENS:
                break
            batch.append(self._lanes[first].popleft())
            self._count -= 1
            self._clean()
            lanes = [key for key in lanes if key in self._lanes]
        return batch

    def _due_s(self, key: tuple[str, str]) -> float:
        return self._lanes[key][0].due_s

    def _clean(self) -> None:
        """Drop what nobody waits for any more from the front of the lanes, and lanes that are empty."""
        for key, lane in list(self._lanes.items()):
            while lane and lane[0].job.over:
                lane.popleft()
                self._count -= 1
            if not lane:
                del self._lanes[key]
