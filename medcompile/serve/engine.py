"""One bundle's worker process as the server sees it: ask it something, and have one answer or many.

The process is started, watched and started again here; what runs in it is worker.py's. A request that is given up
(its client is gone, its time is over) is cancelled there too. The line is bounded: beyond it, QueueFull at once, since
an answer that comes too late is work for nobody.
"""

from __future__ import annotations

import asyncio
import logging
import os
import resource
import socket
import subprocess
import sys
import time
from collections.abc import AsyncGenerator, AsyncIterator, Mapping
from contextlib import asynccontextmanager
from enum import StrEnum
from itertools import count
from pathlib import Path
from typing import Any, cast

from medcompile import bundle
from medcompile.errors import MedcompileError
from medcompile.runtime.deadlines import Priority
from medcompile.serve.failures import DeadlinePassed, Draining, QueueFull, WorkerDown, rebuilt
from medcompile.serve.frames import Frame, Unpacker, packed
from medcompile.serve.settings import Limits, Logging, Model

SHARES: Mapping[str, float] = {Priority.EMERGENCY: 1.25, Priority.ROUTINE: 1.0, Priority.BACKGROUND: 0.75}
"""How much of the line each priority may fill: what can wait is turned away first."""
FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.1, 30.0
"""Before a worker that died is started again; doubled for each time that it died soon after its start."""
STEADY_S = 60.0
"""A worker that lived so long did not die of its start."""

STATS_S = 1.0
"""How long a worker has to say how it is."""

log = logging.getLogger("medcompile.serve")


class State(StrEnum):
    STARTING = "starting"
    READY = "ready"
    DOWN = "down"
    CLOSED = "closed"


class Engine:
    """A bundle in a process of its own. All methods belong to the event loop that called start().

    name: what clients ask for. digest, tasks: the bundle's. facts: what the worker told of itself when it was ready.
    restarts: how often it was started again.
    """

    def __init__(self, model: Model, limits: Limits, logging: Logging) -> None:
        found = bundle.read(model.path, check=False)
        self.model = model
        self.name = model.name or found.name
        self.digest = found.digest
        self.tasks = tuple(found.tasks)
        self.facts: dict[str, Any] = {}
        self.state = State.STARTING
        self.restarts = 0
        self.created = int((model.path / bundle.MANIFEST).stat().st_mtime)
        self._limits = limits
        self._logging = logging
        self._ids = count(1)
        self._waiting: dict[int, _Asked] = {}
        self._told: dict[int, _Asked] = {}
        self._pending_bytes = 0
        self._rate = _Rate()
        self._process: subprocess.Popen[bytes] | None = None
        self._link: _Link | None = None
        self._lost = asyncio.Event()
        self._keepers: list[asyncio.Task[None]] = []
        self._draining = False

    @property
    def in_flight(self) -> int:
        return len(self._waiting)

    @property
    def pid(self) -> int | None:
        return self._process.pid if self._process else None

    @property
    def ready(self) -> bool:
        return self.state is State.READY and not self._draining

    @property
    def resident_bytes(self) -> int:
        """Memory of the worker's process; 0 where it can't be told."""
        try:
            pages = Path(f"/proc/{self.pid}/statm").read_text(encoding="ascii").split()[1]
            return int(pages) * resource.getpagesize()
        except (OSError, IndexError, ValueError):
            return 0

    async def stats(self) -> dict[str, Any]:
        """What the worker counts, or {} where it can't answer at once. Asked even when the line is full."""
        if self.state is not State.READY or self._link is None:
            return {}
        number, asked = next(self._ids), _Asked()
        self._told[number] = asked
        self._link.send({"op": "stats", "id": number})
        try:
            async with asyncio.timeout(STATS_S):
                return (await asked.next()).header
        except (TimeoutError, MedcompileError):
            return {}
        finally:
            del self._told[number]

    async def start(self) -> None:
        """Start the worker and wait until its model is loaded. Raises what load() raised there."""
        await self._spawn()
        self._keepers = [asyncio.create_task(self._keep()), asyncio.create_task(self._look_after())]

    async def ask(
        self,
        op: str,
        payload: Mapping[str, Any],
        body: bytes = b"",
        *,
        priority: str = Priority.ROUTINE,
        timeout_s: float | None = None,
    ) -> Frame:
        """One answer. Raises QueueFull, WorkerDown, DeadlinePassed, or what the session raised."""
        self._check_open(priority, len(body))
        async with self._entered(op, payload, body, priority, timeout_s) as asked:
            return await asked.next()

    async def stream(
        self,
        op: str,
        payload: Mapping[str, Any],
        body: bytes = b"",
        *,
        priority: str = Priority.ROUTINE,
        timeout_s: float | None = None,
    ) -> AsyncGenerator[Frame, None]:
        """Answers until one that says that no more come. Closing the iterator cancels. Raises as ask() does."""
        self._check_open(priority, len(body))
        async with self._entered(op, payload, body, priority, timeout_s) as asked:
            while True:
                frame = await asked.next()
                yield frame
                if not frame.header.get("more"):
                    return

    async def until_ready(self) -> None:
        """Wait for a worker that is being started again."""
        while not self.ready and self.state is not State.CLOSED:
            await asyncio.sleep(0.05)

    def refuse(self) -> None:
        """Take nothing new from now on."""
        self._draining = True

    async def drain(self) -> None:
        """Take nothing new, and wait for what is under way."""
        self.refuse()
        while self._waiting:
            await asyncio.sleep(0.02)

    async def close(self) -> None:
        """End the worker; what is still under way gets WorkerDown."""
        self._draining, self.state = True, State.CLOSED
        for keeper in self._keepers:
            keeper.cancel()
        await asyncio.gather(*self._keepers, return_exceptions=True)
        await self._reap(grace_s=5.0)
        self._fail_all()

    # ---- requests

    @asynccontextmanager
    async def _entered(
        self, op: str, payload: Mapping[str, Any], body: bytes, priority: str, timeout_s: float | None
    ) -> AsyncIterator[_Asked]:
        assert self._link
        number, link, asked = next(self._ids), self._link, _Asked()
        limit_s = timeout_s or self._limits.timeout_s
        late = DeadlinePassed(f"{self.name} had no whole answer after {limit_s:g} s", fix="ask for less, or later")
        timer = asyncio.get_running_loop().call_later(limit_s, asked.put, late)
        self._waiting[number] = asked
        self._pending_bytes += len(body)
        try:
            link.send({"op": op, "id": number, "priority": priority, **payload}, body)
            yield asked
        finally:
            timer.cancel()
            del self._waiting[number]
            self._pending_bytes -= len(body)
            if asked.over:
                self._rate.add()
            elif link is self._link:
                link.send({"op": "cancel", "id": number})

    def _check_open(self, priority: str, size: int) -> None:
        if self._draining:
            raise Draining("the server is stopping", fix="ask another server", retry_after_s=5)
        if self._link is None or self.state not in (State.READY, State.STARTING):  # what is starting has a line, too
            raise WorkerDown(f"{self.name} is being started again", fix="try again", retry_after_s=2)
        limit = int(self._limits.queue * SHARES[priority])
        if len(self._waiting) >= limit:
            raise QueueFull(
                f"{len(self._waiting)} requests wait for {self.name}; {priority} ones are turned away from {limit} on",
                fix="try again later",
                retry_after_s=self._rate.wait_s(len(self._waiting)),
            )
        if size and self._pending_bytes + size > self._limits.pending_bytes:
            raise QueueFull(
                f"{self.name} holds {self._pending_bytes >> 20} MiB of waiting images",
                fix="try again later",
                retry_after_s=self._rate.wait_s(len(self._waiting)),
            )

    def _received(self, frame: Frame) -> None:
        number = frame.header["id"]
        asked = self._waiting.get(number) or self._told.get(number)
        if asked is None:  # it was given up while its answer was on the way
            return
        error = frame.header.get("error")
        asked.over = not frame.header.get("more")
        asked.put(rebuilt(error) if error else frame)

    # ---- the process

    async def _spawn(self) -> None:
        ours, theirs = socket.socketpair()
        try:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "medcompile.serve.worker", str(theirs.fileno()), self.name],
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                env={**os.environ, "PYTHONUNBUFFERED": "1"},
            )
        finally:
            theirs.close()
        ours.setblocking(False)
        self._lost = asyncio.Event()
        loop = asyncio.get_running_loop()
        _, link = await loop.create_connection(lambda: _Link(self, self._lost), sock=ours)
        self._link, self.state = link, State.STARTING  # from now on requests wait for it
        m = self.model
        told: dict[str, Any] = {"path": str(m.path), "backend": m.backend, "variant": m.variant}
        told |= {"threads": m.threads, "kv_blocks": m.kv_blocks, "name": self.name}
        told["text_tokens"] = self._limits.text_tokens
        told |= {"log_level": self._logging.level, "log_json": self._logging.as_json}
        try:
            async with self._entered("load", told, b"", Priority.EMERGENCY, self._limits.start_s) as asked:
                ready = await asked.next()
        except WorkerDown:
            self.state = State.DOWN
            raise
        except BaseException:
            self.state = State.DOWN
            await self._reap(grace_s=0.0)
            raise
        self.facts, self.state = ready.header, State.READY
        log.info("%s: ready, %s on %s", self.name, self.facts.get("variant"), self.facts.get("target"))

    async def _keep(self) -> None:
        """Start the worker again whenever it dies."""
        pause_s, since_s = FIRST_PAUSE_S, time.monotonic()
        while True:
            await self._lost.wait()
            code = await self._reap(grace_s=1.0)
            if time.monotonic() - since_s > STEADY_S:
                pause_s = FIRST_PAUSE_S
            log.error("%s: the worker ended with %s; started again in %.1f s", self.name, _ending(code), pause_s)
            await asyncio.sleep(pause_s)
            pause_s = min(2 * pause_s, LONGEST_PAUSE_S)
            since_s = time.monotonic()
            self.restarts += 1
            try:
                await self._spawn()
            except MedcompileError as error:
                log.error("%s: could not be started again: %s", self.name, error.message)
                self._lost.set()

    async def _look_after(self) -> None:
        """End a worker that hangs, in its model or altogether, so that it is started again."""
        limit_s = self._limits.stuck_s
        heard_s = time.monotonic()
        while True:
            await asyncio.sleep(limit_s / 10)
            told = await self.stats()
            if told or self.state is not State.READY:
                heard_s = time.monotonic()
            hangs_s = max(told.get("busy_for_s", 0.0), time.monotonic() - heard_s)
            if hangs_s > limit_s and self._process:
                log.error("%s: no sign of life for %.0f s; the worker is ended", self.name, hangs_s)
                self._process.kill()
                heard_s = time.monotonic()

    def _died(self) -> None:
        if self.state is not State.CLOSED:
            self.state = State.DOWN
        self._fail_all()

    def _fail_all(self) -> None:
        for asked in (*self._waiting.values(), *self._told.values()):
            asked.over = True
            asked.put(
                WorkerDown(f"the process of {self.name} ended during this request", fix="try again", retry_after_s=1)
            )

    async def _reap(self, grace_s: float) -> int | None:
        """End the process, if it has not ended by itself, and return its code."""
        if self._link:
            self._link.close()
            self._link = None
        process, self._process = self._process, None
        if process is None:
            return None
        try:
            return await asyncio.to_thread(process.wait, grace_s)
        except subprocess.TimeoutExpired:
            process.kill()
            return await asyncio.to_thread(process.wait)


class _Asked:
    """One request on its way. over: the worker has no more to say of it."""

    def __init__(self) -> None:
        self.over = False
        self._said: asyncio.Queue[Frame | MedcompileError] = asyncio.Queue()
        self.put = self._said.put_nowait

    async def next(self) -> Frame:
        found = await self._said.get()
        if isinstance(found, MedcompileError):
            raise found
        return found


class _Link(asyncio.Protocol):
    """The server's end of the socket."""

    def __init__(self, engine: Engine, lost: asyncio.Event) -> None:
        self._engine = engine
        self._lost = lost
        self._unpacker = Unpacker()
        self._transport: asyncio.Transport | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)  # uvloop's is none by its class

    def data_received(self, data: bytes) -> None:
        for frame in self._unpacker.feed(data):
            self._engine._received(frame)

    def connection_lost(self, exc: Exception | None) -> None:
        if self._engine._link in (self, None):
            self._engine._died()
        self._lost.set()

    def send(self, header: Mapping[str, Any], body: bytes = b"") -> None:
        if self._transport and not self._transport.is_closing():
            self._transport.write(packed(header, body))

    def close(self) -> None:
        if self._transport:
            self._transport.close()


class _Rate:
    """How fast answers come, to say when it is worth trying again."""

    def __init__(self) -> None:
        self._per_s = 0.0
        self._last_s = time.monotonic()

    def add(self) -> None:
        now_s = time.monotonic()
        passed_s = max(now_s - self._last_s, 1e-4)
        self._per_s += 0.1 * (1 / passed_s - self._per_s)
        self._last_s = now_s

    def wait_s(self, waiting: int) -> float:
        return min(60.0, max(1.0, waiting / 2 / max(self._per_s, 0.1)))


def _ending(code: int | None) -> str:
    if code is None:
        return "no code"
    return f"signal {-code}" if code < 0 else f"code {code}"
