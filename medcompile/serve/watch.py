"""The outermost middleware that looks: how long each request took, how it ended, for the metrics and the access log.

A route is told as it is written in the app ("/v1/models/{model}"), never as the client wrote it. What a request may do
is guard.py's.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

from medcompile.serve import logs
from medcompile.serve.metrics import OTHER, Metrics

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

LEFT = 499
"""The status of a request whose client left before the end of the answer."""
QUIET = {"/health/live", "/health/ready", "/metrics"}
"""Routes that machines ask every few seconds: in the access log only where they failed."""

_REFUSED = {401: "unauthorized", 403: "forbidden", 408: "timeout", 413: "too_large", 429: "rate_limit"}
"""Why the guard turned a request away, before any route was found for it."""


class Watch:
    """Put it inside of what sets the request id and outside of all else, refusals included."""

    def __init__(self, app: App, metrics: Metrics) -> None:
        self._app = app
        self._metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        seen = _Seen()

        async def received() -> Message:
            message = await receive()
            if message["type"] == "http.disconnect":
                seen.left = not seen.ended
            else:
                seen.received_bytes += len(message.get("body", b""))
            return message

        async def sent(message: Message) -> None:
            if message["type"] == "http.response.start":
                seen.status = message["status"]
            elif message["type"] == "http.response.body":
                seen.sent_bytes += len(message.get("body", b""))
                seen.ended = not message.get("more_body", False)
            await send(message)

        self._metrics.began()
        began_s = time.perf_counter()
        try:
            await self._app(scope, received, sent)
        finally:  # told after the answer's bytes are on their way, which go out when this turn of the loop ends
            asyncio.get_running_loop().call_soon(self._tell, scope, seen, time.perf_counter() - began_s)

    def _tell(self, scope: Scope, seen: _Seen, seconds: float) -> None:
        cut = seen.left and not seen.ended
        status = LEFT if cut else seen.status
        if "route" not in scope and status in _REFUSED:
            self._metrics.refused(_REFUSED[status])
        route = str(getattr(scope.get("route"), "path", OTHER))
        self._metrics.request(scope["method"], route, status, seconds)
        if route in QUIET and status < 400:
            return
        caller = scope.get("state", {}).get("caller")
        logs.access(
            logs.Access(
                method=scope["method"] if scope["method"].isalpha() else OTHER,
                route=route,
                status=status,
                seconds=seconds,
                received_bytes=seen.received_bytes,
                sent_bytes=seen.sent_bytes,
                key=str(getattr(caller, "name", "")),
                client=str((scope.get("client") or ("",))[0]),
                cut=cut,
            )
        )


class _Seen:
    """What passed by of one request. status: 500 unless the app said another."""

    def __init__(self) -> None:
        self.status = 500
        self.received_bytes = 0
        self.sent_bytes = 0
        self.left = False
        self.ended = False
