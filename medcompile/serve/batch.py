"""A batch: every record asked, as many at a time as fill the model's batches, and answered in the records' order.

Memory is bounded by what is read ahead, not by the file. Lines are written in order, so that a run can go on where
another one ended (spool.py); a slow one holds back only what is written, not what is asked, up to AHEAD.

A model's process that dies takes all that it was working on along, and which record it was nobody knows. So these are
asked again, fewer and fewer at a time, until whatever goes down with it alone is found; that one gets an error line.
"""

from __future__ import annotations

import asyncio
import heapq
import time
from collections import deque
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass, replace
from itertools import chain

from medcompile.errors import MedcompileError
from medcompile.serve import batch_lines
from medcompile.serve.batch_lines import Answered, Refused, Request
from medcompile.serve.files import Record, Source
from medcompile.serve.spool import Spool

IN_FLIGHT = 512
"""Texts, images or answers asked for at a time. A model's batch is far smaller, but is made of such as are alike."""
AHEAD, AHEAD_BYTES = 4096, 64 << 20
"""Records read and not yet written, at most, and the bytes of what they ask and were answered."""
COMMIT_S = 1.0
"""At most so long, about, is what a power cut takes; a kill takes only what was in flight."""
ALONE_TRIES = 2
"""Deaths of a model's process with one record in flight until that record is given up."""
LOST_IN_A_ROW = 3
"""Records given up one after another until the run is."""

MODEL_DOWN, QUEUE_FULL = 503, 429

Ask = Callable[[Request, str], Awaitable[Answered]]
"""Answers a request under a request id, whatever goes wrong. A status of 503: the model's process died, or is down."""


@dataclass(frozen=True)
class Job:
    """source: what is read. read: what a record asks. ask: answers it. ready: waits until its model can answer."""

    source: Source
    read: Callable[[Record], Request | Refused]
    ask: Ask
    ready: Callable[[Request], Awaitable[None]]


@dataclass(frozen=True)
class Progress:
    """position of total: how far the source was answered. records, failed: in all; new, seconds: in this run alone."""

    position: int
    total: int
    records: int
    failed: int
    new: int
    seconds: float
    tokens_in: int = 0
    tokens_out: int = 0


class Slots:
    """So many items in flight at most, the earliest record first. A record that is larger than all of it goes alone."""

    def __init__(self, limit: int) -> None:
        self._full = limit
        self.limit = limit
        self._used = 0
        self._waiting: list[tuple[int, int, asyncio.Future[bool]]] = []

    async def enter(self, number: int, items: int) -> bool:
        """Wait for a place. Returns whether nothing else is in flight, nor will be before this leaves."""
        turn: asyncio.Future[bool] = asyncio.get_running_loop().create_future()
        heapq.heappush(self._waiting, (number, items, turn))
        self._let_in()
        try:
            return await turn
        except asyncio.CancelledError:
            if turn.done() and not turn.cancelled():
                self.leave(items)
            raise

    def leave(self, items: int) -> None:
        self._used -= items
        self._let_in()

    def shrink(self) -> None:
        """A process died: find out with fewer whose fault it was."""
        self.limit = max(1, self.limit // 4)

    def grow(self, items: int) -> None:
        """Something was answered: about twice as many after each round, up to what it was at first."""
        if self.limit < self._full:
            self.limit = min(self._full, self.limit + items)
            self._let_in()

    def _let_in(self) -> None:
        while self._waiting:
            _, items, turn = self._waiting[0]
            if self._used and self._used + items > self.limit:
                return
            heapq.heappop(self._waiting)
            if not turn.cancelled():
                self._used += items
                turn.set_result(self.limit == 1)


@dataclass(frozen=True)
class _Pending:
    """A record on its way, without its data, which the task has parsed. The rest is Spool.add()'s."""

    position: int
    line: int
    size_bytes: int
    digest: bytes
    task: asyncio.Task[tuple[bytes, bool]]


class Batch:
    """One run. tell: is called often with how far it is."""

    def __init__(self, job: Job, spool: Spool, tell: Callable[[Progress], None], in_flight: int = IN_FLIGHT) -> None:
        self._job = job
        self._spool = spool
        self._tell = tell
        self._slots = Slots(in_flight)
        self._deaths = 0
        self._lost_in_a_row = 0
        self._failure: MedcompileError | None = None
        self._held_bytes = 0
        self._tokens_in = self._tokens_out = 0

    async def run(self) -> Progress:
        """Answer everything that no earlier run did. Afterwards the spool holds every line, and is open still.

        Raises MedcompileError if the disk is full, or a model can't be brought back; what was written is safe.
        """
        began_s, spool = time.monotonic(), self._spool
        records = self._kept(spool)
        before = spool.mark
        pending: deque[_Pending] = deque()
        committed_s = began_s
        ended = False

        def now() -> Progress:
            mark, passed_s = spool.mark, time.monotonic() - began_s
            new, total = mark.records - before.records, self._job.source.total
            tokens = (self._tokens_in, self._tokens_out)
            return Progress(mark.position, total, mark.records, mark.failed, new, passed_s, *tokens)

        try:
            while True:
                while not ended and len(pending) < AHEAD and self._held_bytes < AHEAD_BYTES:
                    record = next(records, None)
                    if record is None:
                        ended = True
                    else:
                        pending.append(self._begun(record))
                if not pending:
                    break
                await asyncio.wait([pending[0].task], timeout=COMMIT_S)
                if self._failure:
                    raise self._failure
                while pending and pending[0].task.done():
                    done = pending.popleft()
                    line, failed = done.task.result()
                    self._held_bytes -= done.size_bytes + len(line)
                    spool.add(line, done.digest, position=done.position, at_line=done.line, failed=failed)
                self._tell(now())
                if time.monotonic() - committed_s >= COMMIT_S:
                    spool.mark = replace(spool.mark, seconds=before.seconds + time.monotonic() - began_s)
                    await asyncio.to_thread(spool.commit, spool.flush())
                    committed_s = time.monotonic()
            spool.mark = replace(spool.mark, seconds=before.seconds + time.monotonic() - began_s)
            return now()
        finally:
            tasks = [one.task for one in pending]
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    def _kept(self, spool: Spool) -> Iterator[Record]:
        """Keep what is whole of an earlier run's last lines. Returns the records that are left."""
        spool.open()
        records = self._job.source.records(spool.mark.place)
        for line in spool.survivors():
            record = next(records, None)
            if record is None:
                break
            custom_id = self._job.read(record).custom_id
            failed = batch_lines.check(line, spool.id(record.number), custom_id)
            if failed is None:
                records = chain([record], records)
                break
            digest = batch_lines.digest(custom_id, record.number)
            spool.keep(line, digest, position=record.next, at_line=record.line, failed=failed)
        spool.cut()
        return records

    def _begun(self, record: Record) -> _Pending:
        request = self._job.read(record)
        size_bytes = len(record.data or b"")
        self._held_bytes += size_bytes
        digest = batch_lines.digest(request.custom_id, record.number)
        task = asyncio.create_task(self._line(record.number, request))
        return _Pending(record.next, record.line, size_bytes, digest, task)

    async def _line(self, number: int, request: Request | Refused) -> tuple[bytes, bool]:
        """The answer's line, and whether it tells an error."""
        its_id = self._spool.id(number)
        if isinstance(request, Refused):
            line, failed = batch_lines.refused_line(its_id, request), True
        else:
            try:
                answered = await self._answered(number, request, batch_lines.request_id(its_id))
            except MedcompileError as error:  # ends the run at once, not only when this record's turn has come
                self._failure = error
                raise
            self._tokens_in += answered.tokens_in
            self._tokens_out += answered.tokens_out
            line, failed = batch_lines.answer_line(its_id, request, answered), answered.failed
        self._held_bytes += len(line)
        return line, failed

    async def _answered(self, number: int, request: Request, request_id: str) -> Answered:
        alone_tries = 0
        while True:
            alone = await self._slots.enter(number, request.items)
            deaths = self._deaths
            try:
                await self._job.ready(request)
                answered = await self._job.ask(request, request_id)
            finally:
                self._slots.leave(request.items)
            if answered.status == QUEUE_FULL:
                await asyncio.sleep(answered.retry_after_s or 1.0)
                continue
            if answered.status != MODEL_DOWN:
                self._lost_in_a_row = 0
                self._slots.grow(request.items)
                return answered
            if deaths == self._deaths:  # the first to tell of this death
                self._deaths += 1
                self._slots.shrink()
            alone_tries += alone
            if alone_tries == ALONE_TRIES:
                self._give_up()
                return answered

    def _give_up(self) -> None:
        self._lost_in_a_row += 1
        if self._lost_in_a_row == LOST_IN_A_ROW:
            raise MedcompileError(
                f"a model's process ended at each of {LOST_IN_A_ROW} requests, one after another",
                fix="see its last words above; the same command goes on where this one ended",
            )
