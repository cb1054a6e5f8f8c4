"""The middleware that writes one line of the audit log for each request, before the last of its answer goes out.

So nobody holds a whole answer that the log does not know of. Where the line can't be written, the answer is not sent.
What the model took for it comes from the route: it puts an object with Tally's fields into the scope's state.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from typing import Any

from medcompile.errors import AuditError
from medcompile.serve.asgi import App, Message, Receive, Refusal, Scope, Send
from medcompile.serve.audit import AuditLog, Record

LEFT = 499
UNMATCHED = "unmatched"
"""The route of a path that there is none for: what a client wrote as a path is never recorded."""

_UNRECORDED = frozenset({"/health/live", "/health/ready", "/metrics", "/docs", "/openapi.json"})
_REFUSED_EVERY_S = 1.0


class Trail:
    """Put it outside of guard.py, so that refusals are recorded as well.

    Requests without a valid key are recorded once a second at most, with their number: whoever has no key can't fill
    the disk. Routes that machines ask every few seconds, and that tell nothing of anyone, are not recorded.
    """

    def __init__(self, app: App, log: AuditLog, clock: Callable[[], float] = time.monotonic) -> None:
        self._app, self._log, self._clock = app, log, clock
        self._refused = 0
        self._refused_told_s = -_REFUSED_EVERY_S

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        passing = _Passing(self, scope, send)
        try:
            await self._app(scope, receive, passing)
        except BaseException as error:
            passing.ended(LEFT if isinstance(error, (OSError, asyncio.CancelledError)) else 500)
            raise
        passing.ended(LEFT)

    async def record(self, scope: Scope, status: int) -> None:
        """Write a request's line. Raises AuditError."""
        one = self._told(scope, status)
        if one is None:
            return
        if self._log.waits:
            await asyncio.to_thread(self._log.append, one)
        else:
            self._log.append(one)

    def record_now(self, scope: Scope, status: int) -> None:
        one = self._told(scope, status)
        if one is not None:
            self._log.append(one)

    def _told(self, scope: Scope, status: int) -> Record | None:
        """A request as a record; None where it is not recorded by itself."""
        route = str(getattr(scope.get("route"), "path", UNMATCHED))
        if route in _UNRECORDED and status < 400:
            return None
        state = scope.get("state", {})
        caller = str(getattr(state.get("caller"), "name", ""))
        refused = 0
        if not caller:
            self._refused += 1
            if self._clock() - self._refused_told_s < _REFUSED_EVERY_S:
                return None
            self._refused_told_s = self._clock()
            refused, self._refused = self._refused, 0
        tally: Any = state.get("tally")
        return Record(
            caller=caller,
            request_id=str(state.get("request_id", "")),
            route=route,
            status=status,
            model=str(getattr(tally, "model", "")),
            bundle=str(getattr(tally, "digest", "")),
            items=int(getattr(tally, "items", 0)),
            tokens_in=int(getattr(tally, "tokens_in", 0)),
            tokens_out=int(getattr(tally, "tokens_out", 0)),
            purpose=str(state.get("purpose", "")),
            client=str((scope.get("client") or ("",))[0]),
            cached=bool(state.get("cached", False)),
            refused=refused,
        )


class _Passing:
    """One answer on its way out: the start is held back until there is a body, the body's end until it is recorded."""

    def __init__(self, trail: Trail, scope: Scope, send: Send) -> None:
        self._trail, self._scope, self._send = trail, scope, send
        self._start: Message | None = None
        self._status = 0
        self._done = False

    async def __call__(self, message: Message) -> None:
        if self._done:
            return
        if message["type"] == "http.response.start":
            self._status, self._start = message["status"], message
            return
        if message["type"] == "http.response.body" and not message.get("more_body", False):
            self._done = True
            try:
                await self._trail.record(self._scope, self._status)
            except AuditError:
                if self._start is None:  # a stream that has begun is cut off: its client sees that it is not whole
                    raise
                await _CANT_RECORD.to(self._send)
                return
        if self._start is not None:
            start, self._start = self._start, None
            await self._send(start)
        await self._send(message)

    def ended(self, status: int) -> None:
        """The app is through; where the answer is not, that is recorded."""
        if not self._done:
            self._done = True
            self._trail.record_now(self._scope, status)


_CANT_RECORD = Refusal(
    503,
    "audit_log_unavailable",
    "the audit log can't be written, so no answer is given",
    "server_error",
    {"Retry-After": "30"},
)
