"""The outermost middleware: every request gets an id, and every answer the headers that keep a browser from harm."""

from __future__ import annotations

import re
import uuid

from medcompile.serve import logs
from medcompile.serve.asgi import App, Message, Receive, Scope, Send, header

_UUID = re.compile(r"[0-9a-fA-F]{8}-?[0-9a-fA-F]{4}-?[0-9a-fA-F]{4}-?[0-9a-fA-F]{4}-?[0-9a-fA-F]{12}")

_ALWAYS = (
    (b"cache-control", b"no-store"),
    (b"content-security-policy", b"default-src 'none'; frame-ancestors 'none'"),
    (b"cross-origin-resource-policy", b"same-origin"),
    (b"referrer-policy", b"no-referrer"),
    (b"x-content-type-options", b"nosniff"),
    (b"x-frame-options", b"DENY"),
)
_UNDER_TLS = (b"strict-transport-security", b"max-age=31536000")


class Entrance:
    """Puts `request_id` into the scope's state, into what is logged meanwhile, and into the answer's X-Request-ID.

    A client's own X-Request-ID is taken only where it is a UUID: what else stands there could be a patient's name.
    Headers that the app sets itself stay as it set them.
    """

    def __init__(self, app: App) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        asked = header(scope, b"x-request-id")
        request_id = asked.lower() if _UUID.fullmatch(asked) else str(uuid.uuid4())
        scope.setdefault("state", {})["request_id"] = request_id
        ours = [*_ALWAYS, (b"x-request-id", request_id.encode())]
        if scope.get("scheme") == "https":
            ours.append(_UNDER_TLS)

        async def sent(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = list(message.get("headers", ()))
                there = {name.lower() for name, _ in headers}
                message = {**message, "headers": headers + [pair for pair in ours if pair[0] not in there]}
            await send(message)

        with logs.of_request(request_id):
            await self._app(scope, receive, sent)
