"""How large a body may be, how long it may take to come, and how much of all bodies is held at once.

A body is taken in whole before the app sees it, counted as it comes whatever its Content-Length says: every route here
needs it whole, and what is too large or too slow is turned away without the app's doing. Place it inside of guard.py,
so that only callers who may ask make the server hold anything.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass

from medcompile.serve.asgi import App, Message, Receive, Refusal, Scope, Send, header


@dataclass(frozen=True)
class BodyLimits:
    """bytes: of one body. seconds: from its first byte to its last. held_bytes: of all that are held at once.

    send_s: how long one piece of an answer may wait for its client to take it.
    """

    bytes: int = 32 << 20
    seconds: float = 30.0
    held_bytes: int = 512 << 20
    send_s: float = 60.0


class Bodies:
    def __init__(self, app: App, limits: BodyLimits | None = None) -> None:
        self._app, self.limits = app, limits or BodyLimits()
        self.held_bytes = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        held = _Held(self)
        try:
            refusal = held.expect(header(scope, b"content-length"))
            try:
                if refusal is None:
                    async with asyncio.timeout(self.limits.seconds):
                        refusal = await held.take(receive)
            except TimeoutError:
                refusal = Refusal(
                    408, "body_too_slow", f"the body did not come within {self.limits.seconds:g} s", headers=_CLOSE
                )
            if held.left:
                return
            if refusal is not None:
                held.let_go()
                await held.thrown_away(receive)
                await refusal.to(self._timed(send))
                return
            await self._app(scope, held.replayed(receive), self._timed(send))
        finally:
            held.let_go()

    def _timed(self, send: Send) -> Send:
        """A client that takes nothing of its answer for too long has left: what works for it is stopped."""

        async def sent(message: Message) -> None:
            try:
                async with asyncio.timeout(self.limits.send_s):
                    await send(message)
            except TimeoutError:
                raise ClientStalled from None

        return sent


class ClientStalled(OSError):
    """Starlette and uvicorn take an OSError out of send() as a client that left."""


_CLOSE = {"Connection": "close"}
_THROWN_S = 2.0
_THROWN_BYTES = 256 << 20


class _Held:
    """The body of one request. counted: its bytes within those that all requests hold. left: the client is gone."""

    def __init__(self, bodies: Bodies) -> None:
        self._bodies, self._limits = bodies, bodies.limits
        self._body = bytearray()
        self.counted = 0
        self.left = False
        self._more = True

    def let_go(self) -> None:
        self._body = bytearray()
        self._bodies.held_bytes -= self.counted
        self.counted = 0

    def expect(self, length: str) -> Refusal | None:
        """Turns away by Content-Length, before a byte is read. A wrong one is the HTTP parser's to refuse."""
        return self._too_large() if length.isdigit() and int(length) > self._limits.bytes else None

    async def take(self, receive: Receive) -> Refusal | None:
        while self._more:
            message = await receive()
            if message["type"] == "http.disconnect":
                self.left = True
                return None
            piece = message.get("body", b"")
            self._more = message.get("more_body", False)
            if len(self._body) + len(piece) > self._limits.bytes:
                return self._too_large()
            if self._bodies.held_bytes + len(piece) > self._limits.held_bytes:
                return Refusal(
                    503,
                    "too_much_under_way",
                    "the server holds as many bytes of requests as it may; try again",
                    "server_error",
                    {"Retry-After": "1", **_CLOSE},
                )
            self._body += piece
            self.counted += len(piece)
            self._bodies.held_bytes += len(piece)
        return None

    async def thrown_away(self, receive: Receive) -> None:
        """Read on for a while before a refusal, as a client that is still sending would not read it."""
        thrown = 0
        try:
            async with asyncio.timeout(_THROWN_S):
                while self._more and thrown < _THROWN_BYTES:
                    message = await receive()
                    thrown += len(message.get("body", b""))
                    self._more = message["type"] == "http.request" and message.get("more_body", False)
        except TimeoutError:
            return

    def replayed(self, receive: Receive) -> Receive:
        """receive() as the app sees it: the body in one message, then what comes (the client's leaving)."""
        given = False

        async def again() -> Message:
            nonlocal given
            if given:
                return await receive()
            given = True
            body, self._body = bytes(self._body), bytearray()
            return {"type": "http.request", "body": body, "more_body": False}

        return again

    def _too_large(self) -> Refusal:
        return Refusal(413, "request_too_large", f"a body may have {self._limits.bytes} bytes at most", headers=_CLOSE)
