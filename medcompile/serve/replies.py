"""Answers on their way to a client: one JSON document, or server-sent events; either ends when the client is gone.

Work for a client that has left is work taken from the others, so both watch for that while they wait.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Coroutine, Mapping, MutableMapping
from contextlib import aclosing
from typing import Any, TypeVar

from fastapi.responses import Response

from medcompile.serve import failures, wire

T = TypeVar("T")
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]

DONE = b"data: [DONE]\n\n"
JSON = "application/json"
UNWATCHED_S = 0.02
"""So long the client is not watched: what is answered sooner is not worth it."""
_QUIET_S = 15.0
"""After so long without a word a stream says that it is alive, for proxies that cut silent connections."""


class ClientLeft(Exception):
    """The client closed its connection before the answer was there."""


def document(value: Any, status: int = 200, headers: Mapping[str, str] | None = None) -> Response:
    return Response(wire.dumps(value), status, dict(headers or {}), JSON)


def failure(error: BaseException) -> Response:
    return document(failures.body_of(error), failures.status_of(error), failures.headers_of(error))


async def while_connected(receive: Receive, work: Coroutine[Any, Any, T]) -> T:
    """What work returns. It is cancelled when the client leaves, and ClientLeft raised."""
    task = asyncio.ensure_future(work)
    gone: asyncio.Future[None] | None = None
    try:
        await asyncio.wait({task}, timeout=UNWATCHED_S)
        if not task.done():
            gone = asyncio.ensure_future(_gone(receive))
            await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            return task.result()
        raise ClientLeft
    finally:
        if gone:
            gone.cancel()
        if not task.done():
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)


class EventStream(Response):
    """Pieces of an answer as server-sent events, [DONE] at the end. An error on the way is the last event but that.

    ended: called once with the error that ended it, or None.
    """

    media_type = "text/event-stream"

    def __init__(
        self, pieces: AsyncGenerator[dict[str, Any], None], ended: Callable[[BaseException | None], Awaitable[None]]
    ) -> None:
        super().__init__(headers={"Cache-Control": "no-store", "X-Accel-Buffering": "no"})
        del self.headers["content-length"]
        self._pieces = pieces
        self._ended = ended
        self._told_s = time.monotonic()

    async def __call__(self, scope: Any, receive: Receive, send: Send) -> None:
        error: BaseException | None = None
        try:
            await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
            await while_connected(receive, self._write(send))
        except BaseException as cut:  # told to whoever counts, and raised again unless it is the client's leaving
            error = cut
            if not isinstance(cut, ClientLeft | Exception):
                raise
        finally:
            await self._ended(error)

    async def _write(self, send: Send) -> None:
        pulse = asyncio.ensure_future(self._pulse(send))
        failed: Exception | None = None
        try:
            async with aclosing(self._pieces) as pieces:
                async for piece in pieces:
                    await self._event(send, b"data: %s\n\n" % wire.dumps(piece))
        except OSError:  # the connection broke while it was written to
            raise ClientLeft from None
        except Exception as error:  # noqa: BLE001  # the status is sent already, so the error is told in the stream
            failed = error
            await self._event(send, b"data: %s\n\n" % wire.dumps(failures.body_of(error)))
        finally:
            pulse.cancel()
        await send({"type": "http.response.body", "body": DONE, "more_body": False})
        if failed:
            raise failed

    async def _event(self, send: Send, data: bytes) -> None:
        self._told_s = time.monotonic()
        await send({"type": "http.response.body", "body": data, "more_body": True})

    async def _pulse(self, send: Send) -> None:
        while True:
            await asyncio.sleep(_QUIET_S)
            if time.monotonic() - self._told_s >= _QUIET_S:
                await self._event(send, b": waiting\n\n")


async def _gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
