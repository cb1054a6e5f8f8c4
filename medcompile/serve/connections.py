"""Connections: how many, how long one may be silent, how large a request's head may be, and who must make room.

uvicorn waits for ever for a request's first line, takes heads of any size, and keeps a socket open that its client
never reads from. Here a Door looks over all connections once a second:

    no whole head within head_s       closed        the client that sends nothing, or a byte a second
    a head above head_bytes           431, closed
    nothing taken of an answer        cut           the client that does not read
    too many connections              the one that has waited longest without a request makes room for the new one

So whoever opens thousands of connections and says nothing loses them to those who ask.
"""

from __future__ import annotations

import asyncio
import resource
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

_LOOK_EVERY_S = 1.0
_SPARE_FILES = 256
"""Descriptors for what is not a connection: models, logs, the audit log."""


@dataclass(frozen=True)
class ConnectionLimits:
    """most: connections at once; None is as many as the system lets a process have files, up to 8192.

    head_s: from a connection's opening, or a request's first byte, to the end of its head; and for the rest of a body
    that was answered before its end. stalled_s: without a client taking a byte of what waits for it, and for the rest
    of an answer after a close.
    """

    most: int | None = None
    head_s: float = 10.0
    head_bytes: int = 64 << 10
    stalled_s: float = 30.0


class Door:
    """What all connections of one server share. `protocol` is what uvicorn.Config takes as http=."""

    def __init__(self, limits: ConnectionLimits | None = None) -> None:
        self.limits = limits or ConnectionLimits()
        self.most = self.limits.most or min(8192, _files() - _SPARE_FILES)
        self.strangers: OrderedDict[Connection, None] = OrderedDict()  # no request yet
        self.idle: OrderedDict[Connection, None] = OrderedDict()  # between requests
        self.busy: set[Connection] = set()
        self.turned_away = 0
        self._look: asyncio.TimerHandle | None = None

    def __len__(self) -> int:
        return len(self.strangers) + len(self.idle) + len(self.busy)

    @property
    def protocol(self) -> type[asyncio.Protocol]:
        return type("Connection", (Connection,), {"door": self})

    def enter(self, connection: Connection) -> bool:
        """Let a connection in; False where all others are at work."""
        if len(self) >= self.most:
            for waiting in (self.strangers, self.idle):
                if waiting:
                    self.turned_away += 1
                    next(iter(waiting)).cut()
                    break
            else:
                self.turned_away += 1
                return False
        self.strangers[connection] = None
        if self._look is None:
            self._look = connection.loop.call_later(_LOOK_EVERY_S, self._look_over, connection.loop)
        return True

    def works(self, connection: Connection) -> None:
        self.strangers.pop(connection, None)
        self.idle.pop(connection, None)
        self.busy.add(connection)

    def rests(self, connection: Connection) -> None:
        if connection in self.busy:
            self.busy.remove(connection)
            self.idle[connection] = None

    def leave(self, connection: Connection) -> None:
        self.strangers.pop(connection, None)
        self.idle.pop(connection, None)
        self.busy.discard(connection)

    def _look_over(self, loop: asyncio.AbstractEventLoop) -> None:
        now_s = loop.time()
        for connection in (*self.strangers, *self.idle, *self.busy):
            connection.looked_at(now_s)
        self._look = loop.call_later(_LOOK_EVERY_S, self._look_over, loop) if len(self) else None


@contextmanager
def handshakes_within(seconds: float) -> Iterator[None]:
    """Servers begun meanwhile end a TLS handshake after so long: uvicorn leaves it at asyncio's minute."""
    loop: Any = asyncio.get_running_loop()
    plain = loop.create_server

    async def create_server(*args: Any, **options: Any) -> Any:
        if options.get("ssl") is not None:
            options["ssl_handshake_timeout"] = seconds
        return await plain(*args, **options)

    loop.create_server = create_server
    try:
        yield
    finally:
        del loop.create_server


class Connection(HttpToolsProtocol):
    """uvicorn's, with an eye on its times and sizes."""

    door: Door

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self._head_since_s: float | None = self.loop.time()  # when the head that is awaited began; None: none is
        self._head_bytes = 0
        self._stalled_since_s: float | None = None
        self._waiting_bytes = 0
        self._inside = False
        self._in_body = False

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._inside = self.door.enter(self)
        if not self._inside:
            transport.write(b"HTTP/1.1 503 Service Unavailable\r\nretry-after: 1\r\ncontent-length: 0\r\n\r\n")
            transport.close()

    def connection_lost(self, exc: Exception | None) -> None:
        self.door.leave(self)
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        if not self._inside:
            return
        before = self.cycle
        awaiting = (before is None or before.response_complete) and not self._in_body
        if awaiting:
            if self._head_since_s is None:  # the first byte after an answer
                self._head_since_s = self.loop.time()
            self._head_bytes += len(data)
        super().data_received(data)
        if self.cycle is not before:  # a head is whole, and its request under way
            self._head_since_s, self._head_bytes = None, 0
            self.door.works(self)
        elif awaiting and self._head_bytes > self.door.limits.head_bytes and not self.transport.is_closing():
            self.transport.write(
                b"HTTP/1.1 431 Request Header Fields Too Large\r\nconnection: close\r\ncontent-length: 0\r\n\r\n"
            )
            self.transport.close()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        if self.cycle is not None and self.cycle.response_complete:  # none was pipelined
            self.door.rests(self)
            if self._in_body:
                self._head_since_s = self.loop.time()

    def on_headers_complete(self) -> None:
        self._in_body = True
        super().on_headers_complete()

    def on_message_complete(self) -> None:
        self._in_body = False
        if self.cycle is not None and self.cycle.response_complete:
            self._head_since_s = None
        super().on_message_complete()

    def looked_at(self, now_s: float) -> None:
        """End what takes too long. Called once a second."""
        limits = self.door.limits
        left = self.transport.get_write_buffer_size()
        if left and (left >= self._waiting_bytes or self.transport.is_closing()):
            if self._stalled_since_s is None:
                self._stalled_since_s = now_s
            elif now_s - self._stalled_since_s > limits.stalled_s:
                self.cut()
                return
        else:
            self._stalled_since_s = None
        self._waiting_bytes = left
        if self._head_since_s is not None and now_s - self._head_since_s > limits.head_s:
            self.cut()

    def cut(self) -> None:
        """End the connection now, whatever its client has not yet taken."""
        self.door.leave(self)
        self.transport.abort()


def _files() -> int:
    """How many files this process may have open, after asking for as many as it may ask for."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = 65_536 if hard == resource.RLIM_INFINITY else min(hard, 65_536)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        with suppress(ValueError, OSError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
            soft = wanted
    return 65_536 if soft == resource.RLIM_INFINITY else max(_SPARE_FILES + 64, soft)
