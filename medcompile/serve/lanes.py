"""Which texts and images go into an encoder's next batch: the earliest due, and those that go well with it.

The earliest due goes first (deadlines.py's patience for each priority, so that nothing starves), and takes those along
that are of the same kind and about as long, because padding is work for nothing. Pure bookkeeping: nothing runs here.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from medcompile.runtime.text import BATCH_TOKENS

BATCH = 64
"""Items of a batch at most; the graph's own profile may cut it into several runs."""
SHORTEST = 16
"""Tokens that every text counts for when batches are made: below, a run's cost is hardly that of its tokens."""
SLACK = 1.25
"""How much longer than the shortest of its batch an item may be."""


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
    """Items in lanes of one kind, about one length and one priority, in the order of arrival. Not thread-safe."""

    def __init__(self) -> None:
        self._lanes: dict[tuple[str, int], dict[str, deque[Item]]] = {}
        self._count = 0

    def __len__(self) -> int:
        return self._count

    def add(self, item: Item) -> None:
        bucket = math.ceil(math.log(max(item.length, SHORTEST)) / math.log(SLACK))
        lanes = self._lanes.setdefault((item.kind, bucket), {})
        lanes.setdefault(item.job.priority, deque()).append(item)
        self._count += 1

    def take(self) -> list[Item]:
        """The earliest due item and those that go with it, the earliest due of them first; [] where none waits."""
        best: tuple[float, tuple[str, int]] | None = None
        for key, lanes in list(self._lanes.items()):
            heads = [lane[0].due_s for lane in lanes.values() if self._clean(lane)]
            if not heads:
                del self._lanes[key]
            elif best is None or min(heads) < best[0]:
                best = min(heads), key
        if best is None:
            return []
        lanes = self._lanes[best[1]]
        batch: list[Item] = []
        while len(batch) < BATCH:
            open_lanes = [lane for lane in lanes.values() if self._clean(lane)]
            if not open_lanes:
                break
            lane = min(open_lanes, key=lambda lane: lane[0].due_s)
            longest = max([lane[0].length, *(item.length for item in batch)])
            if batch and longest * (len(batch) + 1) > BATCH_TOKENS:
                break
            batch.append(lane.popleft())
            self._count -= 1
        return batch

    def _clean(self, lane: deque[Item]) -> bool:
        """Drop what nobody waits for any more from the front. Whether anything is left."""
        while lane and lane[0].job.over:
            lane.popleft()
            self._count -= 1
        return bool(lane)
